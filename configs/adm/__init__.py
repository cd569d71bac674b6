"""ADM (arXiv 2105.05233): class-conditional generators, upsamplers, and classifiers that guide them."""

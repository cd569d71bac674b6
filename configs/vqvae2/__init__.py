"""VQ-VAE-2 (arXiv 1906.00446): pictures as codes of several maps, coarse to fine."""

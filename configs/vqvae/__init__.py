"""VQ-VAE (arXiv 1711.00937): pictures as codes of one map, and a prior of the codes."""

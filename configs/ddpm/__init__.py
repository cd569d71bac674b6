"""DDPM (arXiv 2006.11239): unconditional pictures, a fixed variance, the simple loss."""

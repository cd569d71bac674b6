"""Improved DDPM (arXiv 2102.09672): a learned variance, cosine noise, importance-sampled times."""

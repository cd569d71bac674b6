"""DALL-E 1 (arXiv 2102.12092): a dVAE turns pictures into codes, a transformer draws them from captions."""

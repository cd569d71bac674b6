"""DALL-E 1 (arXiv 2102.12092): a tokenizer of pictures, a transformer of captions and their codes."""

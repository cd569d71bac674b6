"""Data sources, transforms and tokenizers; the only package that may import TensorFlow, and only inside
functions."""

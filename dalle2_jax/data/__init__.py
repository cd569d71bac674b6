"""Data sources, transforms and tokenizers; the only package with TensorFlow, imported inside functions."""

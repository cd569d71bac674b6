"""VQGAN (arXiv 2012.09841): a tokenizer with adversarial and feature losses."""

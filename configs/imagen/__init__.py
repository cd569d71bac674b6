"""Imagen (arXiv 2205.11487): a frozen T5, a decoder of its states, and two Efficient U-Nets as upsamplers."""

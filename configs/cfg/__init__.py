"""Classifier-free guidance (arXiv 2207.12598): one network with and without its class.

Its log SNR is continuous; here it has 65,536 values.
"""

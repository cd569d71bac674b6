"""Classifier-free guidance (arXiv 2207.12598): one network with and without its class, continuous time."""

"""Weights of others, in and out: one file a format, each a table of names over one engine (tables.py)."""

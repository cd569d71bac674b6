"""Weights in formats of other libraries, one file a format: tables of names for the engine in tables.py."""

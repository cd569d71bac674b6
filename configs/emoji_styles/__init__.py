"""Recipes for emoji in several styles, and the judges of their drawings."""

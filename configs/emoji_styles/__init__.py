"""Recipes for emoji in several styles (docs/emoji.md), and the judges of their drawings."""

"""Recipes for pictures of emoji: docs/emoji.md."""

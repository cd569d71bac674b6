"""The recipes of the quickstart, and what steers its decoder."""

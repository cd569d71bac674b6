"""The recipes of the quickstart, and of guides for its decoder."""

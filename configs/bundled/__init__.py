"""The recipes of the model that comes with the package."""

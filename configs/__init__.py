"""Recipes: one file a stage and dataset, each with `get_config(preset='')`."""

"""python -m dalle2_jax.edit: pictures from pictures."""

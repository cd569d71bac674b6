"""python -m dalle2_jax.train: one loop for every stage."""

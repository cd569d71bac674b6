"""python -m dalle2_jax.generate: a model directory opened, and what is drawn with it."""

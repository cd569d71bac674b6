"""python -m dalle2_jax.evaluate: a model directory, or pictures, measured. One file a metric."""

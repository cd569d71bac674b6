"""python -m dalle2_jax.preflight: a training step compiled for devices that are not there."""

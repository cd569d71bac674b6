"""python -m dalle2_jax.generate: draws pictures with a model directory."""

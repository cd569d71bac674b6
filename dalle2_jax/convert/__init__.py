"""python -m dalle2_jax.convert: workdirs and weights of others to model directories, and out again."""

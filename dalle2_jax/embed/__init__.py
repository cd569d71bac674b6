"""python -m dalle2_jax.embed: what frozen stages compute of a data set, stored."""

"""Pictures as 256 levels, which people and files have, and as floats in [-1, 1], which networks read."""

from typing import Any

import jax
import jax.numpy as jnp


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] floats to the nearest of 256 levels."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]; `to_uint8` undoes it."""
    return (images.astype(jnp.float32) - 127.5) / 127.5


@jax.jit
def as_floats(batch: Any) -> Any:
    """The tree with its uint8 arrays, which are pictures, as floats; all else as it is."""
    return jax.tree.map(lambda x: to_float(x) if x.dtype == jnp.uint8 else x, batch)

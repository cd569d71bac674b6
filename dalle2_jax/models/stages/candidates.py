"""Several embeddings drawn for a caption, of which the closest one is kept (section 2.2 of the paper)."""

import jax
import jax.numpy as jnp

from dalle2_jax.models.stages.clip import unit_norm


def split_keys(keys: jax.Array, count: int) -> jax.Array:
    """One key a caption -> one key a candidate: [B] -> [B count].

    Candidates of a caption are neighbours, so that sharding over the batch does not part them. The first is
    the same for every `count`.
    """
    fold_in = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
    return fold_in(keys, jnp.arange(count)).reshape(len(keys) * count, *keys.shape[1:])


def spread(read, size: int, count: int):
    """What was read of `size` captions, for each candidate: arrays [B n, ...] -> [B count n, ...].

    n is how often a caption was read: once, or, for guidance, with and without condition.
    """

    def of_array(x):
        x = x.reshape(size, 1, -1, *x.shape[1:])
        return jnp.repeat(x, count, axis=1).reshape(-1, *x.shape[3:])

    return jax.tree.map(of_array, read)


def closest(candidates: jax.Array, text_embed: jax.Array) -> jax.Array:
    """Of candidates [B count, E] those of the largest cosine with text_embed [B, E]: [B, E]."""
    candidates = candidates.reshape(len(text_embed), -1, candidates.shape[-1])
    cosine = (unit_norm(candidates) * unit_norm(text_embed)[:, None]).sum(axis=-1)
    return jnp.take_along_axis(candidates, cosine.argmax(axis=1)[:, None, None], axis=1)[:, 0]

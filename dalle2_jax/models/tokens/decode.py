"""The decode loop: tokens drawn one after the other from a network with a cache, in one scan.

For each position k, in this order:

    guidance      l = u + s (c - u)                        c, u: logits with and without the condition
    allowed       l = -inf for the tokens that may not stand at k
    temperature   l = l / temperature
    top-k         l = -inf below the k-th largest
    top-p         l = -inf outside the smallest set of largest tokens whose probabilities sum to p or more
                  (nucleus sampling, Holtzman et al., arXiv 1904.09751)
    draw          token ~ softmax(l)
    forced        the given token in its place, if there is one

An option that is None leaves no trace in the compiled program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """How tokens are drawn; numbers may be traced.

    temperature: above 0. top_k: 1 .. V. top_p: in (0, 1]. guidance_scale: a number or [B, 1]; None: no
    guidance. allowed: [V] or [length, V] bool. forced: [B, length] int32, negative where a token is drawn.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    guidance_scale: float | jax.Array | None = None
    allowed: jax.Array | None = None
    forced: jax.Array | None = None


def decode(
    step: Callable, embed: Callable, first, caches, keys: jax.Array, length: int, options: Options
) -> jax.Array:
    """Draws tokens [B, length] int32; those of an example depend on its own key and rows alone.

    Args:
      step: (x, k, caches) -> (logits [R, V] float32 of token k, caches), k in 0 .. length - 1.
      embed: tokens [R] int32 -> x, the next input of `step`.
      first: the first x.
      caches: the state of `step` before token 0.
      keys: [B], one an example; token k is drawn with fold_in(key, k).
      options: with guidance R = 2 B, rows with and without the condition in turn; else R = B.
    """
    guided = options.guidance_scale is not None
    allowed = options.allowed
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (length, allowed.shape[-1]))
    forced = None if options.forced is None else options.forced.T  # [length, B]

    def one_token(carry, given):
        (x, caches), (k, allowed, forced) = carry, given
        logits, caches = step(x, k, caches)
        if guided:
            logits = guide(logits, options.guidance_scale)
        logits = restrict(logits, options, allowed)
        of_token = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, k)
        tokens = jax.vmap(jax.random.categorical)(of_token, logits)  # [B]
        if forced is not None:
            tokens = jnp.where(forced >= 0, forced, tokens)
        x = embed(jnp.repeat(tokens, 2) if guided else tokens)
        return (x, caches), tokens

    _, tokens = jax.lax.scan(one_token, (first, caches), (jnp.arange(length), allowed, forced))
    return tokens.T.astype(jnp.int32)


def guide(logits: jax.Array, scale: float | jax.Array) -> jax.Array:
    """logits [2 B, V], with and without the condition in turn -> u + s (c - u) [B, V]."""
    return logits[1::2] + scale * (logits[0::2] - logits[1::2])


def restrict(logits: jax.Array, options: Options, allowed: jax.Array | None = None) -> jax.Array:
    """logits [B, V] -> those drawn from, [B, V]: over the temperature, -inf for the tokens left out.

    Tokens that are equal to the last one kept by top-k or top-p are kept, too.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    logits = logits / options.temperature
    if options.top_k is None and options.top_p is None:
        return logits
    falling = jnp.sort(logits, axis=-1, descending=True)
    kept = jnp.ones(logits.shape, bool)  # of `falling`; always its first few entries
    if options.top_k is not None:
        kept &= jnp.arange(logits.shape[-1]) < options.top_k
    if options.top_p is not None:
        p = jax.nn.softmax(falling, axis=-1, where=kept)
        before = jnp.cumsum(p, axis=-1) - p  # of the larger tokens
        kept &= (before < options.top_p) | (options.top_p >= 1)  # rounding may lift `before` to 1
    last = jnp.take_along_axis(falling, kept.sum(axis=-1, keepdims=True) - 1, axis=-1)  # [B, 1]
    return jnp.where(logits >= last, logits, -jnp.inf)

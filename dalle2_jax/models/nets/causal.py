"""The pre-LN transformer block, which also decodes position by position with a preallocated cache.

    h = x + attn(norm1(x)),    h' = h + cross(norm_cross(h), context),    y = h' + mlp(norm2(h'))

The second sum is there for a block with `cross` alone. Masks and positions are data. A mask says for each
query which keys it sees, so that one block serves encoders, causal sequences and sparse patterns. Positions
are added to x before the first block, so that any table serves: learned, by row and column, by frame.

With a cache a block gets some positions of a sequence, x [B, n, C] from `start` on, and computes what it
would compute for them in the whole sequence:

    cache.keys[start : start + n], cache.values[...] = those of x
    each query attends to the first M positions of the cache, where mask [.., n, M] is True

The initialisation is CLIP's: with width w and depth n, qkv and queries of attention have std w^-1/2, the
projections that write into the residual stream w^-1/2 (2n)^-1/2, and fc1 (2w)^-1/2.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.runtime.partition import constrain


class Cache(NamedTuple):
    """Keys and values of N positions, each [B, N, H, D]; N is the whole length from the beginning."""

    keys: jax.Array
    values: jax.Array


def empty_cache(batch_size: int, length: int, width: int, num_heads: int, dtype: DTypeLike) -> Cache:
    """The cache of one block before its first position."""
    zeros = jnp.zeros((batch_size, length, num_heads, width // num_heads), dtype)
    return Cache(zeros, zeros)


def causal_mask(length: int) -> jax.Array:
    """[1, 1, N, N] bool: position i sees positions j <= i."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def out_std(width: int, depth: int) -> float:
    """Standard deviation of the kernels that write into the residual stream of `depth` blocks."""
    return width**-0.5 * (2 * depth) ** -0.5


class Attention(nn.Module):
    """Self-attention; the kernel `qkv` holds the blocks q | k | v, heads contiguous inside each."""

    num_heads: int
    out_std: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, cache: Cache | None, start: int | jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, n, C], mask broadcastable to [B, H, n, M], True where seen -> ([B, n, C], cache with x)."""
        width = x.shape[-1]
        init = layers.normal(width**-0.5)
        qkv = layers.Dense(3 * width, dtype=self.dtype, kernel_init=init, name="qkv")(x)
        q, k, v = (layers.split_heads(y, width // self.num_heads) for y in jnp.split(qkv, 3, axis=-1))
        if cache is not None:
            assert mask is not None  # its length is that of the filled part of the cache
            pairs = zip(cache, (k, v), strict=True)
            cache = Cache(
                *(jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1) for old, new in pairs)
            )
            k, v = (y[:, : mask.shape[-1]] for y in cache)  # [B, M, H, D]
        h = layers.attention(q, k, v, mask)
        out = layers.Dense(width, dtype=self.dtype, kernel_init=layers.normal(self.out_std), name="out")
        return out(h), cache


class CrossAttention(nn.Module):
    """Attention of a sequence to a context, the states of another."""

    width: int
    num_heads: int
    out_std: float
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        init = layers.normal(self.width**-0.5)
        self.q = layers.Dense(self.width, dtype=self.dtype, kernel_init=init)
        self.kv = layers.Dense(2 * self.width, dtype=self.dtype, kernel_init=init)
        out_init = layers.normal(self.out_std)
        self.out = layers.Dense(self.width, dtype=self.dtype, kernel_init=out_init)

    def read(self, states: jax.Array) -> Cache:
        """states [B, L, D] -> their keys and values [B, L, H, C / H]."""
        k, v = jnp.split(self.kv(states.astype(self.dtype)), 2, axis=-1)
        return Cache(*(layers.split_heads(y, self.width // self.num_heads) for y in (k, v)))

    def __call__(self, x: jax.Array, context: jax.Array | Cache, mask: jax.Array) -> jax.Array:
        """x [B, n, C], context: states [B, L, D] or what `read` made of them, mask [B, L] -> [B, n, C]."""
        k, v = context if isinstance(context, Cache) else self.read(context)
        q = layers.split_heads(self.q(x), self.width // self.num_heads)
        return self.out(layers.attention(q, k, v, mask[:, None, None, :]))


class Mlp(nn.Module):
    """Dense to four times the width, or to `hidden`, activation, Dense back."""

    activation: str
    out_std: float
    dtype: DTypeLike = jnp.float32
    hidden: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, N, width] -> the same shape."""
        width = x.shape[-1]
        init = layers.normal((2 * width) ** -0.5)
        hidden = self.hidden or 4 * width
        h = layers.Dense(hidden, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        h = layers.activation(self.activation)(h)
        return layers.Dense(width, dtype=self.dtype, kernel_init=layers.normal(self.out_std), name="fc2")(h)


class Block(nn.Module):
    """norm1, attn, with `cross_attention` norm_cross, cross, then norm2, mlp.

    mlp_width: of the MLP's inner layer, 0 for four times the width. cross_attention: whether the block reads
    a context too.
    """

    width: int
    num_heads: int
    activation: str
    out_std: float
    dtype: DTypeLike = jnp.float32
    mlp_width: int = 0
    cross_attention: bool = False

    def setup(self):
        """Declare the layers (Flax)."""
        self.norm1, self.attn = layers.LayerNorm(), Attention(self.num_heads, self.out_std, self.dtype)
        if self.cross_attention:
            self.norm_cross = layers.LayerNorm()
            self.cross = CrossAttention(self.width, self.num_heads, self.out_std, self.dtype)
        self.norm2 = layers.LayerNorm()
        self.mlp = Mlp(self.activation, self.out_std, self.dtype, self.mlp_width)

    def read(self, states: jax.Array) -> Cache:
        """States of the context [B, L, D] -> their keys and values, which a call takes in their place."""
        return self.cross.read(states)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
        context: jax.Array | Cache | None = None,
        context_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """One block over x.

        Args:
          x: [B, n, C]; with a cache, the positions from `start` on.
          mask: broadcastable to [B, H, n, M], True where seen; M <= N says how many positions of the cache
            are looked at.
          context, context_mask: states [B, L, D] or what `read` made of them, [B, L].

        Returns:
          [B, n, C], and the cache with the keys and values of x, or None.
        """
        h, cache = self.attn(self.norm1(x).astype(self.dtype), mask, cache, start)
        x = x + h
        if self.cross_attention:
            x = x + self.cross(self.norm_cross(x).astype(self.dtype), context, context_mask)
        return constrain(x + self.mlp(self.norm2(x).astype(self.dtype))), cache

"""dalle-mini's network: BART with NormFormer's norms, an encoder of captions and a causal decoder of codes.

    h = x + norm(attn(norm(x)))            and in the decoder the same with attention to the caption
    y = h + fc2(norm(gelu(fc_gate(n)) fc1(n))),   n = norm(h)

No layer has a bias but the norms; embeddings are normed; GELU is exact.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import Cache, empty_cache
from dalle2_jax.models.nets.tokens import Unembedding
from dalle2_jax.models.nets.transformer import Embedding, TokenEmbedding
from dalle2_jax.runtime.partition import constrain


class Attention(nn.Module):
    """norm, attention of x to itself or to other states, norm."""

    width: int
    num_heads: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        self.norm, self.norm_after = layers.LayerNorm(), layers.LayerNorm()
        self.q, self.k, self.v, self.out = (
            layers.Dense(self.width, use_bias=False, dtype=self.dtype) for _ in range(4)
        )

    def read(self, states: jax.Array) -> Cache:
        """states [B, N, C] -> their keys and values [B, N, H, D]."""
        head_dim = self.width // self.num_heads
        return Cache(*(layers.split_heads(layer(states), head_dim) for layer in (self.k, self.v)))

    def __call__(
        self, x: jax.Array, mask: jax.Array, states: Cache | None, cache: Cache | None, start: int | jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """x [B, n, C] from position `start` on -> (what is added to x, the cache with x).

        states: of a caption; None: x attends to itself. mask: broadcastable to [B, H, n, M].
        """
        h = self.norm(x).astype(self.dtype)
        if states is None:
            states = self.read(h)
            if cache is not None:
                pairs = zip(cache, states, strict=True)
                cache = Cache(
                    *(jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1) for old, new in pairs)
                )
                states = cache
        q = layers.split_heads(self.q(h), self.width // self.num_heads)
        return self.norm_after(self.out(layers.attention(q, *states, mask))), cache


class Glu(nn.Module):
    """norm, a gated inner layer with a norm of its own, and back to the width."""

    width: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, n, C] -> [B, n, C]."""
        h = layers.LayerNorm(name="norm")(x).astype(self.dtype)
        gate, inner = (
            layers.Dense(self.hidden, use_bias=False, dtype=self.dtype, name=name)(h)
            for name in ("fc_gate", "fc1")
        )
        h = layers.LayerNorm(name="norm_inner")(nn.gelu(gate, approximate=False) * inner)
        return layers.Dense(self.width, use_bias=False, dtype=self.dtype, name="fc2")(h.astype(self.dtype))


class Block(nn.Module):
    """Attention, in a decoder attention to the caption, and the gated layers."""

    width: int
    num_heads: int
    hidden: int
    cross: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        self.attn = Attention(self.width, self.num_heads, self.dtype)
        if self.cross:
            self.cross_attn = Attention(self.width, self.num_heads, self.dtype)
        self.glu = Glu(self.width, self.hidden, self.dtype)

    def read(self, states: jax.Array) -> Cache:
        """Keys and values of a caption's states."""
        return self.cross_attn.read(states)

    def __call__(self, x, mask, text=None, text_mask=None, cache=None, start=0):
        """(x [B, n, C] behind the block, the cache); text: what `read` made, text_mask: [B, L]."""
        h, cache = self.attn(x, mask, None, cache, start)
        x = x + h
        if self.cross:
            x = x + self.cross_attn(x, text_mask[:, None, None, :], text, None, 0)[0]
        return constrain(x + self.glu(x)), cache


class DalleMiniNet(nn.Module):
    """A caption's tokens and codes so far -> logits of the next code.

    num_ids: ids of codes that are embedded and predicted, the start among them. num_positions: codes of a
    picture. hidden: of the gated layers.
    """

    vocab_size: int
    context_length: int
    num_ids: int
    num_positions: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        block = layers.remat(Block, self.remat)
        common = dict(width=self.width, num_heads=self.num_heads, hidden=self.hidden, dtype=self.dtype)
        self.text_embedding = TokenEmbedding(self.vocab_size, self.width, self.dtype)
        self.text_position = Embedding((self.context_length, self.width))
        self.text_norm_in, self.text_norm_out = layers.LayerNorm(), layers.LayerNorm()
        self.text_block = [block(**common) for _ in range(self.depth)]
        self.code_embedding = TokenEmbedding(self.num_ids, self.width, self.dtype)
        self.code_position = Embedding((self.num_positions, self.width))
        self.norm_in, self.norm_out = layers.LayerNorm(), layers.LayerNorm()
        self.block = [block(**common, cross=True) for _ in range(self.depth)]
        self.logits = Unembedding(self.num_ids, self.dtype)

    def encode(self, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
        """tokens [B, L] int32, token_mask [B, L] -> states [B, L, C]."""
        x = self.text_norm_in(self.text_embedding(tokens) + self.text_position().astype(self.dtype))
        x = x.astype(self.dtype)
        for block in self.text_block:
            x, _ = block(x, token_mask[:, None, None, :])
        return self.text_norm_out(x).astype(self.dtype)

    def read(self, states: jax.Array) -> tuple[Cache, ...]:
        """Keys and values of a caption's states for every block of the decoder."""
        return tuple(block.read(states) for block in self.block)

    def empty_caches(self, size: int) -> tuple[Cache, ...]:
        """The caches of the decoder of `size` pictures before their first code."""
        cache = empty_cache(size, self.num_positions, self.width, self.num_heads, self.dtype)
        return (cache,) * self.depth

    def decode(
        self,
        ids: jax.Array,
        text: tuple[Cache, ...],
        text_mask: jax.Array,
        caches: tuple[Cache, ...] | None = None,
        start: int | jax.Array = 0,
    ) -> tuple[jax.Array, tuple[Cache | None, ...]]:
        """(logits [B, n, num_ids] float32 of what follows ids [B, n] from position `start` on, the caches).

        text: what `read` made of the caption, text_mask [B, L].
        """
        position = jax.lax.dynamic_slice_in_dim(self.code_position(), start, ids.shape[1])
        x = self.norm_in(self.code_embedding(ids) + position.astype(self.dtype)).astype(self.dtype)
        length = ids.shape[1] if caches is None else self.num_positions
        mask = (jnp.arange(length) <= start + jnp.arange(ids.shape[1])[:, None])[None, None]
        after = []
        for block, own, cache in zip(self.block, text, caches or [None] * self.depth, strict=True):
            x, cache = block(x, mask, own, text_mask, cache, start)
            after.append(cache)
        return self.logits(self.norm_out(x)), tuple(after)

    def __call__(self, tokens: jax.Array, token_mask: jax.Array, ids: jax.Array) -> jax.Array:
        """Logits [B, n, num_ids] float32 of what follows each of ids [B, n], for these captions."""
        text = self.read(self.encode(tokens, token_mask))
        return self.decode(ids, text, token_mask)[0]

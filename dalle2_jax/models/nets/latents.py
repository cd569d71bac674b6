"""The autoregressive prior's network: a text encoder, and a causal decoder of an image embedding's codes.

The decoder's sequence is z_t, dot, code_1 .. code_{K-1}: CLIP's text embedding, the bucket of the dot product
z_i . z_t, and the codes so far; the outputs from `dot` on are the logits of code_1 .. code_K. Every block
also reads the caption by cross-attention: Table 3's latent context of 384 has no room for 256 text tokens
beside 319 codes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.transformer import Embedding, Mlp, TokenEmbedding, TransformerStack, causal_mask
from dalle2_jax.runtime.partition import constrain

Cache = tuple[jax.Array, jax.Array]


class CachedAttention(nn.Module):
    """Causal self-attention over a whole sequence, or position by position with cached keys and values."""

    width: int
    num_heads: int
    out_std: float
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        init = layers.normal(self.width**-0.5)
        self.qkv = layers.Dense(3 * self.width, dtype=self.dtype, kernel_init=init)
        out_init = layers.normal(self.out_std)
        self.out = layers.Dense(self.width, dtype=self.dtype, kernel_init=out_init)

    def _split(self, x):
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        return [layers.split_heads(y, self.width // self.num_heads) for y in parts]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> [B, N, C]; position i sees positions up to i."""
        q, k, v = self._split(x)
        return self.out(layers.attention(q, k, v, causal_mask(x.shape[1])))

    def step(self, x: jax.Array, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache]:
        """x [B, 1, C] at position `index`, cache of [B, N, H, D] -> (output [B, 1, C], cache)."""
        q, k, v = self._split(x)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
            for old, new in zip(cache, (k, v), strict=True)
        )
        seen = (jnp.arange(keys.shape[1]) <= index)[None, None, None]
        return self.out(layers.attention(q, keys, values, seen)), (keys, values)


class CrossAttention(nn.Module):
    """Attention of a sequence to the states of another."""

    width: int
    num_heads: int
    out_std: float
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        init = layers.normal(self.width**-0.5)
        self.q = layers.Dense(self.width, dtype=self.dtype, kernel_init=init)
        self.kv = layers.Dense(2 * self.width, dtype=self.dtype, kernel_init=init)
        out_init = layers.normal(self.out_std)
        self.out = layers.Dense(self.width, dtype=self.dtype, kernel_init=out_init)

    def read(self, states: jax.Array) -> Cache:
        """states [B, L, D] -> keys and values [B, L, H, C / H]."""
        k, v = jnp.split(self.kv(states.astype(self.dtype)), 2, axis=-1)
        return tuple(layers.split_heads(y, self.width // self.num_heads) for y in (k, v))

    def __call__(self, x: jax.Array, text: Cache, mask: jax.Array) -> jax.Array:
        """x [B, N, C], keys and values of the states, mask [B, L] -> [B, N, C]."""
        q = layers.split_heads(self.q(x), self.width // self.num_heads)
        return self.out(layers.attention(q, *text, mask[:, None, None, :]))


class LatentBlock(nn.Module):
    """One pre-LN block: causal self-attention, attention to the caption, MLP."""

    width: int
    num_heads: int
    out_std: float
    activation: str
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        attention = (self.width, self.num_heads, self.out_std, self.dtype)
        self.norm1, self.attn = layers.LayerNorm(), CachedAttention(*attention)
        self.norm_cross, self.cross = layers.LayerNorm(), CrossAttention(*attention)
        self.norm2, self.mlp = layers.LayerNorm(), Mlp(self.activation, self.out_std, self.dtype)

    def _rest(self, x, text, mask):
        x = x + self.cross(self.norm_cross(x).astype(self.dtype), text, mask)
        return constrain(x + self.mlp(self.norm2(x).astype(self.dtype)))

    def __call__(self, x: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, N, C], text states [B, L, D], mask [B, L] -> [B, N, C]."""
        x = x + self.attn(self.norm1(x).astype(self.dtype))
        return self._rest(x, self.cross.read(states), mask)

    def read(self, states: jax.Array) -> Cache:
        """What `step` needs of the text states."""
        return self.cross.read(states)

    def step(
        self, x: jax.Array, text: Cache, mask: jax.Array, cache: Cache, index: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One position, x [B, 1, C] at `index` -> (output [B, 1, C], cache)."""
        h, cache = self.attn.step(self.norm1(x).astype(self.dtype), cache, index)
        return self._rest(x + h, text, mask), cache


class LatentTransformer(nn.Module):
    """Caption, text embedding, dot product and codes so far -> logits of the next code.

    `text` has vocab_size, context_length, width, depth, num_heads of the encoder, which sees the whole
    caption but no padding. Dropping the text hides the caption and puts learned vectors in the place of the
    text embedding and the dot product; one learned state is always there to be read.
    """

    embed_dim: int
    num_codes: int
    num_buckets: int
    num_dot_buckets: int
    text: dict
    width: int
    depth: int
    num_heads: int
    activation: str = "gelu"
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        text, dtype = self.text, self.dtype
        self.token_embedding = TokenEmbedding(text["vocab_size"], text["width"], dtype)
        self.text_position = Embedding((text["context_length"], text["width"]), stddev=0.01)
        self.text_transformer = TransformerStack(
            text["depth"], text["num_heads"], self.activation, self.remat, dtype
        )
        self.text_norm_out = layers.LayerNorm()
        self.null_state = Embedding((1, text["width"]))
        self.text_embed_proj = layers.Dense(self.width, dtype=dtype)
        self.null_text_embed, self.null_dot = Embedding((self.width,)), Embedding((self.width,))
        self.dot_embedding = TokenEmbedding(self.num_dot_buckets, self.width, dtype)
        self.code_embedding = TokenEmbedding(self.num_buckets, self.width, dtype)
        self.latent_position = Embedding((self.num_codes + 1, self.width), stddev=0.01)
        out_std = self.width**-0.5 * (2 * self.depth) ** -0.5
        block = layers.remat(LatentBlock, self.remat)
        self.block = [
            block(self.width, self.num_heads, out_std, self.activation, dtype) for _ in range(self.depth)
        ]
        self.norm_out = layers.LayerNorm()
        self.logits = layers.Dense(self.num_buckets, dtype=dtype)

    def encode(
        self, tokens: jax.Array, token_mask: jax.Array, drop: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(states [B, 1 + L, D], which of them may be read [B, 1 + L]) of captions [B, L]."""
        x = self.token_embedding(tokens) + self.text_position().astype(self.dtype)
        states = self.text_norm_out(self.text_transformer(x, token_mask[:, None, None, :]))
        null = jnp.broadcast_to(self.null_state(), (len(states), *self.null_state().shape))
        mask = jnp.pad(token_mask & ~drop[:, None], ((0, 0), (1, 0)), constant_values=True)
        return jnp.concatenate([null, states], axis=1), mask

    def prefix(self, text_embed: jax.Array, dot: jax.Array, drop: jax.Array) -> jax.Array:
        """The first two inputs of the decoder, [B, 2, C]: text embedding [B, E], dot product's bucket [B]."""
        hidden = drop[:, None]
        z_t = jnp.where(hidden, self.null_text_embed(), self.text_embed_proj(text_embed))
        dot = jnp.where(hidden, self.null_dot(), self.dot_embedding(dot))
        return jnp.stack([z_t, dot], axis=1).astype(self.dtype)

    def _head(self, x):
        return self.logits(self.norm_out(x).astype(self.dtype)).astype(jnp.float32)

    def __call__(
        self,
        text_embed: jax.Array,
        dot: jax.Array,
        codes: jax.Array,
        tokens: jax.Array,
        token_mask: jax.Array,
        drop: jax.Array,
    ) -> jax.Array:
        """Logits [B, K, buckets] float32 of codes [B, K], each from those before it."""
        states, mask = self.encode(tokens, token_mask, drop)
        before = self.code_embedding(codes[:, :-1])
        x = jnp.concatenate([self.prefix(text_embed, dot, drop), before], axis=1)
        x = x + self.latent_position().astype(self.dtype)
        for block in self.block:
            x = block(x, states, mask)
        return self._head(x[:, 1:])

    def read(self, states: jax.Array) -> tuple[Cache, ...]:
        """Keys and values of the text states for every block: what `step` reads."""
        return tuple(block.read(states) for block in self.block)

    def empty_cache(self, size: int) -> tuple[Cache, ...]:
        """The caches of `size` sequences before their first position."""
        shape = (size, self.num_codes + 1, self.num_heads, self.width // self.num_heads)
        return tuple((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.depth))

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codes [B] as inputs of `step`, [B, C]."""
        return self.code_embedding(codes)

    def step(
        self,
        x: jax.Array,
        index: jax.Array,
        text: tuple[Cache, ...],
        mask: jax.Array,
        caches: tuple[Cache, ...],
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """One position: input [B, C] at `index` -> (logits [B, buckets] of what comes next, caches)."""
        x = (x + self.latent_position()[index].astype(self.dtype))[:, None]
        grown = []
        for block, known, cache in zip(self.block, text, caches, strict=True):
            x, cache = block.step(x, known, mask, cache, index)
            grown.append(cache)
        return self._head(x[:, 0]), tuple(grown)

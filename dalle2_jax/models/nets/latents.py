"""The autoregressive prior's network: a text encoder, and a causal decoder of an image embedding's codes.

The decoder's sequence is z_t, dot, code_1 .. code_{K-1}: CLIP's text embedding, the bucket of the dot product
z_i . z_t, and the codes so far; the outputs from `dot` on are the logits of code_1 .. code_K. Every block
also reads the caption by cross-attention: Table 3's latent context of 384 has no room for 256 text tokens
beside 319 codes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import Block, Cache, causal_mask, empty_cache, out_std
from dalle2_jax.models.nets.transformer import Embedding, TokenEmbedding, TransformerStack


class LatentTransformer(nn.Module):
    """Caption, text embedding, dot product and codes so far -> logits of the next code.

    text: vocab_size, context_length, width, depth, num_heads of the encoder. It sees the whole caption but no
    padding. Dropping the text masks the caption and replaces text embedding and dot product by learned
    vectors. One learned state is always there, so that no row of attention is masked as a whole.
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
    dtype: DTypeLike = jnp.float32

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
        block, std = layers.remat(Block, self.remat), out_std(self.width, self.depth)
        common = (self.width, self.num_heads, self.activation, std, dtype)
        self.block = [block(*common, cross_attention=True) for _ in range(self.depth)]
        self.norm_out = layers.LayerNorm()
        self.logits = layers.Dense(self.num_buckets, dtype=dtype)

    def encode(
        self, tokens: jax.Array, token_mask: jax.Array, drop: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """tokens [B, L] int32, token_mask [B, L], drop [B] -> states [B, 1 + L, D] and their mask [B, 1 + L].

        State 0 is the learned one.
        """
        x = self.token_embedding(tokens) + self.text_position().astype(self.dtype)
        states = self.text_norm_out(self.text_transformer(x, token_mask[:, None, None, :]))
        null = jnp.broadcast_to(self.null_state(), (len(states), *self.null_state().shape))  # [B, 1, D]
        mask = jnp.pad(token_mask & ~drop[:, None], ((0, 0), (1, 0)), constant_values=True)
        return jnp.concatenate([null, states], axis=1), mask

    def prefix(self, text_embed: jax.Array, dot: jax.Array, drop: jax.Array) -> jax.Array:
        """text_embed [B, E], dot [B] (a bucket), drop [B] -> the decoder's first two inputs, [B, 2, C]."""
        hidden = drop[:, None]  # [B, 1]
        z_t = jnp.where(hidden, self.null_text_embed(), self.text_embed_proj(text_embed))
        dot = jnp.where(hidden, self.null_dot(), self.dot_embedding(dot))
        return jnp.stack([z_t, dot], axis=1).astype(self.dtype)

    def _head(self, x):
        """States [..., C] -> logits [..., buckets]; the softmax over them is float32."""
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
        before = self.code_embedding(codes[:, :-1])  # [B, K - 1, C]: the last code predicts nothing
        # [B, K + 1, C]: z_t, dot, code_1 .. code_{K-1}
        x = jnp.concatenate([self.prefix(text_embed, dot, drop), before], axis=1)
        x = x + self.latent_position().astype(self.dtype)
        for block in self.block:
            x, _ = block(x, causal_mask(x.shape[1]), context=states, context_mask=mask)
        return self._head(x[:, 1:])  # the outputs at dot, code_1 .. code_{K-1}: K of them

    def read(self, states: jax.Array) -> tuple[Cache, ...]:
        """Keys and values of the text states for every block: what `step` reads."""
        return tuple(block.read(states) for block in self.block)

    def empty_caches(self, size: int) -> tuple[Cache, ...]:
        """The blocks' caches of `size` sequences before their first position."""
        cache = empty_cache(size, self.num_codes + 1, self.width, self.num_heads, self.dtype)
        return (cache,) * self.depth

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codes [B] as inputs of `step`, [B, C]."""
        return self.code_embedding(codes)

    def step(
        self,
        x: jax.Array,
        index: jax.Array,
        text: tuple[Cache, ...],
        text_mask: jax.Array,
        caches: tuple[Cache, ...],
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """One position: input [B, C] at `index` -> (logits [B, buckets] of what comes next, caches)."""
        x = (x + self.latent_position()[index].astype(self.dtype))[:, None]  # [B, 1, C]
        # row `index` of the causal mask: [1, 1, 1, K + 1]
        mask = jax.lax.dynamic_slice_in_dim(causal_mask(self.num_codes + 1), index, 1, axis=2)
        after = []
        for block, context, cache in zip(self.block, text, caches, strict=True):
            x, cache = block(x, mask, cache, index, context, text_mask)
            after.append(cache)
        return self._head(x[:, 0]), tuple(after)

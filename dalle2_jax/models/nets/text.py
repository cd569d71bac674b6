"""Text transformers: CLIP's (causal, pooled at the end of text) and GLIDE's (which has no attention mask)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import causal_mask
from dalle2_jax.models.nets.transformer import Embedding, TokenEmbedding, TransformerStack


def last_true(mask: jax.Array) -> jax.Array:
    """Position [B] int32 of the last True of mask [B, L]: where the end-of-text token stands."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


class CLIPTextTransformer(nn.Module):
    """CLIP's text tower: causal; it needs no padding mask, as padding stands after the pooled token."""

    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    embed_dim: int
    activation: str = "gelu"
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens [B, L] int32, token_mask [B, L] -> (embedding [B, E], states [B, L, D]), float32.

        The embedding is not normalised. The states are those after the final layer norm; the one at the last
        True of token_mask is projected to the embedding.
        """
        x = TokenEmbedding(self.vocab_size, self.width, self.dtype, name="token_embedding")(tokens)
        position = Embedding((self.context_length, self.width), stddev=0.01, name="position")()
        x = x + position[: tokens.shape[1]].astype(self.dtype)
        common = (self.depth, self.num_heads, self.activation, self.remat, self.dtype)
        stack = TransformerStack(*common, scan=self.scan, name="transformer")
        states = layers.LayerNorm(name="norm_out")(stack(x, causal_mask(tokens.shape[1])))
        # the state at the end of text: [B, L, D] -> [B, D]
        pooled = jnp.take_along_axis(states, last_true(token_mask)[:, None, None], axis=1)[:, 0]
        init = layers.normal(self.width**-0.5)
        proj = layers.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=init, name="proj")
        return proj(pooled.astype(self.dtype)).astype(jnp.float32), states


class GlideTextTransformer(nn.Module):
    """GLIDE's text transformer: no attention mask, and a learned embedding where there is no token.

    A dropped caption is the sequence without a token: all its positions hold their padding embedding.
    scan_blocks: compile the blocks as one loop; see `TransformerStack`.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    activation: str = "gelu"
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32
    scan_blocks: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
        """tokens [B, L] int32, token_mask [B, L] -> states [B, L, D] float32, after the final layer norm."""
        x = TokenEmbedding(self.vocab_size, self.width, self.dtype, name="token_embedding")(tokens)
        x = x + Embedding((self.context_length, self.width), stddev=0.01, name="position")().astype(
            self.dtype
        )
        padding = Embedding((self.context_length, self.width), stddev=0.01, name="padding")().astype(
            self.dtype
        )
        x = jnp.where(token_mask[..., None], x, padding)
        common = (self.depth, self.num_heads, self.activation, self.remat, self.dtype)
        stack = TransformerStack(*common, scan=self.scan_blocks, name="transformer")
        return layers.LayerNorm(name="norm_out")(stack(x))


class TextPool(nn.Module):
    """A text's states as one vector: norm, attention of their mean to all of them, Dense, norm (Imagen, IF).

    The query is the mean of the states plus a position; keys and values are those of the mean and the states.
    """

    num_heads: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        """states [B, L, D], mask [B, L] bool, True = read -> [B, features]. Raises ValueError if heads do not
        divide D."""
        width = states.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"text states of width {width} cannot have pool_heads {self.num_heads}")
        x = layers.LayerNorm(name="norm1")(states)
        count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)  # [B, 1]
        mean = jnp.where(mask[..., None], x, 0).sum(axis=1) / count  # [B, D]
        position = Embedding((width,), stddev=width**-0.5, name="position")()
        x = jnp.concatenate([(mean + position)[:, None], x], axis=1).astype(self.dtype)  # [B, 1 + L, D]
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)[:, None, None, :]
        q = layers.Dense(width, dtype=self.dtype, name="q")(x[:, :1])
        k, v = jnp.split(layers.Dense(2 * width, dtype=self.dtype, name="kv")(x), 2, axis=-1)
        q, k, v = (layers.split_heads(y, width // self.num_heads) for y in (q, k, v))
        pooled = layers.attention(q, k, v, mask)[:, 0]
        out = layers.Dense(self.features, dtype=self.dtype, name="proj")(pooled)
        return layers.LayerNorm(name="norm2")(out).astype(self.dtype)

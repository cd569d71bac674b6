"""The encoder of T5 v1.1 (arXiv 1910.10683, with the gated units of arXiv 2002.05202).

    h = x + attn(rms_norm(x)),    y = h + wo(gelu(wi_0 n) * wi_1 n)  with n = rms_norm(h)

Attention has no 1 / sqrt(d): the initialisation carries it. There are no positions but a bias of each head by
the bucket of key - query, one table for all blocks.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.transformer import TokenEmbedding

NUM_BUCKETS, MAX_DISTANCE = 32, 128


def buckets(length: int) -> jax.Array:
    """[N, N] int32: the bucket of each key (axis 1) for each query (axis 0).

    Half of the buckets are for keys behind the query. Of each half the first half are distances 0 .. 7, the
    others grow by the logarithm up to MAX_DISTANCE, beyond which all distances share the last one.
    """
    half = NUM_BUCKETS // 2
    exact = half // 2

    def bucket(distance: int) -> int:  # in Python's floats: float32 is one off at powers of two
        if distance < exact:
            return distance
        share = math.log(distance / exact) / math.log(MAX_DISTANCE / exact)
        return min(exact + int(share * (half - exact)), half - 1)

    distance = jnp.arange(length)[None] - jnp.arange(length)[:, None]  # key - query
    table = jnp.array([bucket(number) for number in range(max(length, 1))], jnp.int32)
    return half * (distance > 0) + table[jnp.abs(distance)]


def _qkv_init(head_dim: int, key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Kernel [C, 3 H D] of q, k, v: variance 1 / C, of q 1 / (C D), since nothing else scales q k^T."""
    kernel = layers.normal(shape[0] ** -0.5)(key, shape, dtype)
    return kernel * jnp.where(jnp.arange(shape[1]) < shape[1] // 3, head_dim**-0.5, 1.0).astype(dtype)


class T5Block(nn.Module):
    """Self-attention and a gated MLP, both without biases and behind an RMS norm."""

    num_heads: int
    head_dim: int
    mlp_width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x [B, N, C], bias [B or 1, H, N, N] float32 -> [B, N, C]."""
        width, inner = x.shape[-1], self.num_heads * self.head_dim
        dense = partial(layers.Dense, use_bias=False, dtype=self.dtype)
        h = layers.RMSNorm(name="norm1")(x).astype(self.dtype)
        qkv = dense(3 * inner, kernel_init=partial(_qkv_init, self.head_dim), name="qkv")(h)
        q, k, v = (layers.split_heads(y, self.head_dim) for y in jnp.split(qkv, 3, axis=-1))
        # softmax(q k^T + bias) v, without a scale
        h = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0)
        h = h.reshape(*h.shape[:2], inner)  # [B, N, H, D] -> [B, N, H D]
        x = x + dense(width, kernel_init=layers.normal(inner**-0.5), name="out")(h)
        h = layers.RMSNorm(name="norm2")(x).astype(self.dtype)
        init = layers.normal(width**-0.5)
        gate = dense(self.mlp_width, kernel_init=init, name="fc_gate")(h)
        h = nn.gelu(gate, approximate=True) * dense(self.mlp_width, kernel_init=init, name="fc1")(h)
        return x + dense(width, kernel_init=layers.normal(self.mlp_width**-0.5), name="fc2")(h)


class T5Encoder(nn.Module):
    """Token ids -> states of a text; padded positions are never attended to."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    head_dim: int = 64
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
        """tokens [B, N] int32, token_mask [B, N] bool -> states [B, N, width] float32."""
        # of variance 1: a block, whose output is as large, does not drown the token
        x = TokenEmbedding(self.vocab_size, self.width, self.dtype, 1.0, name="token_embedding")(tokens)
        shape = (NUM_BUCKETS, self.num_heads)
        table = self.param("position_bias", layers.normal(self.width**-0.5), shape, jnp.float32)
        bias = table[buckets(tokens.shape[1])].transpose(2, 0, 1)[None]  # [1, H, N, N]
        # a large finite number: a text without a token gets finite states
        bias = jnp.where(token_mask[:, None, None, :], bias, -1e9)  # [B, H, N, N]
        block = layers.remat(T5Block, self.remat)
        for i in range(self.depth):
            common = (self.num_heads, self.head_dim, self.mlp_width, self.dtype)
            x = block(*common, name=f"block_{i}")(x, bias)
        return layers.RMSNorm(name="norm_out")(x)

"""A plain transformer on patches of pixels, in the place of the U-Net (JiT, arXiv 2511.13720).

    c = time + pooled conditions,  (s1, b1, g1, s2, b2, g2) = W silu(c) + w, zeros at first (adaLN-zero)
    h = x + g1 attn(rms_norm(x) (1 + s1) + b1),    y = h + g2 mlp(rms_norm(h) (1 + s2) + b2)
    attn: softmax(R q' (R k')^T / sqrt(D)) v,  q' = rms_norm(q),  k' = rms_norm(k)
    mlp:  fc2 (silu(fc_gate x) * fc1 x)

R rotates the D / 2 pairs of entries (i, i + D / 2) of a head, half of them by the patch's row and half by its
column, times 10000^(-k / (D / 4)). A product q k depends on the difference of two positions alone. There is
no other position, so that a network of windows runs on any window.

Context tokens join the sequence in front of a middle block and leave it behind the last one. They are not
rotated. The first of them are learned tokens, to each of which the pooled conditions are added.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.transformer import Embedding, scan_blocks
from dalle2_jax.runtime.partition import constrain

TIME_WIDTH = 256  # of the sinusoids
_BASE = 10_000.0  # the slowest rotation takes 2 pi 10000 patches


def rotary_waves(
    rows: Sequence[float], columns: Sequence[float], head_dim: int, context: int = 0
) -> jax.Array:
    """Cosines and sines [2, context + R C, D / 2] float32 of the angles of `context` tokens, which are zero,
    then row by row of the patches at `rows` [R] and `columns` [C].

    Constants: XLA would compute cosines again for every head of every example.
    """
    frequencies = [_BASE ** -(4 * k / head_dim) for k in range(head_dim // 4)]
    patches = [[at * f for at in (row, column) for f in frequencies] for row in rows for column in columns]
    angles = [[0.0] * (head_dim // 2)] * context + patches
    waves = [[[wave(angle) for angle in token] for token in angles] for wave in (math.cos, math.sin)]
    return jnp.asarray(waves, jnp.float32)


def rotate(x: jax.Array, waves: jax.Array) -> jax.Array:
    """x [B, N, H, D] float32 with each pair (i, i + D / 2) rotated; waves [2, N, D / 2] of `rotary_waves`."""
    cos, sin = waves[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def to_patches(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H W / size^2, size size C], row by row. ValueError for sides that do not divide."""
    _, height, width, channels = x.shape
    if height % size or width % size:
        raise ValueError(f"sides must be multiples of patch_size {size}, got {(height, width)}")
    x = x.reshape(-1, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return x.reshape(len(x), -1, size * size * channels)


def from_patches(x: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """The inverse of `to_patches`: [B, N, size size C] -> [B, height, width, C]."""
    x = x.reshape(len(x), height // size, width // size, size, size, -1).swapaxes(2, 3)
    return x.reshape(len(x), height, width, -1)


class ViTBlock(nn.Module):
    """One block of the module's docstring."""

    num_heads: int
    mlp_width: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cond: jax.Array,
        waves: jax.Array,
        mask: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """x [B, N, C], cond [B, C] = silu(c), waves [2, N, D / 2], mask [B, 1, 1, N] -> [B, N, C]."""
        width = x.shape[-1]
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(6, self.dtype, "modulation", cond, width)

        def added(gate, h):
            h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
            return x + (gate * h).astype(self.dtype)

        def turned(name, y):
            return rotate(layers.RMSNorm(name=name)(y), waves).astype(self.dtype)

        h = (layers.RMSNorm(name="norm1")(x) * (1 + scale1) + shift1).astype(self.dtype)
        qkv = jnp.split(dense(3 * width, name="qkv")(h), 3, axis=-1)
        q, k, v = (layers.split_heads(y, width // self.num_heads) for y in qkv)
        h = layers.attention(turned("norm_q", q), turned("norm_k", k), v, mask, cudnn=True)
        x = added(gate1, dense(width, name="out")(h))
        h = (layers.RMSNorm(name="norm2")(x) * (1 + scale2) + shift2).astype(self.dtype)
        h = nn.silu(dense(self.mlp_width, name="fc_gate")(h)) * dense(self.mlp_width, name="fc1")(h)
        return constrain(added(gate2, dense(width, name="fc2")(h)))


def modulation(count: int, dtype: DTypeLike, name: str, cond: jax.Array, width: int) -> list[jax.Array]:
    """`count` vectors [B, 1, width] float32 of cond [B, width], zeros at first; call it inside a module."""
    zeros = nn.initializers.zeros
    made = layers.Dense(count * width, dtype=dtype, kernel_init=zeros, name=name)(cond)
    return jnp.split(made.astype(jnp.float32)[:, None], count, axis=-1)


class PixelViT(nn.Module):
    """Takes the place of `unet.UNet`: x and conditions -> the network's output for every pixel.

    Attributes:
      out_channels: with those of a learned variance. patch_size: side of a patch, in pixels.
      width, depth, num_heads: of the blocks; width / num_heads is a multiple of 4.
      mlp_width: of the MLPs' inner layer; 0: 8 / 3 of the width, for as many parameters as a plain MLP of
        four times the width has.
      bottleneck: patches are projected to so many entries, then to the width; 0: at once.
      context_tokens: learned tokens to which the pooled conditions are added.
      context_start: the block, counted from 0, that the context tokens join at; None: depth // 3.
      remat: see `layers.remat`, by block. scan_blocks: compile the blocks as two loops, one without and one
        with context; see `TransformerStack`.
    """

    out_channels: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int = 0
    bottleneck: int = 128
    context_tokens: int = 32
    context_start: int | None = None
    dropout: float = 0.0
    remat: bool | str = False
    scan_blocks: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        emb: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        *,
        pooled: jax.Array | None = None,
        known: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The output [B, H, W, out_channels], float32.

        Args:
          x: [B, H, W, C_in].
          emb: [B, width], the sum of the embeddings of time and pooled conditions.
          context, context_mask: tokens [B, K, D], and which are real [B, K] bool; None: all.
          pooled: [B, width], the pooled conditions without the time; None: there are none.
          known: [B, H, W, 4], further channels of input, whose weights begin as zeros: a network that was
            trained without them can be trained on with them.

        Raises:
          ValueError: H or W is not a multiple of patch_size.
        """
        _, height, width, _ = x.shape
        dense = functools.partial(layers.Dense, self.width, dtype=self.dtype)
        h = to_patches(x.astype(self.dtype), self.patch_size)
        if self.bottleneck:
            h = layers.Dense(self.bottleneck, use_bias=False, dtype=self.dtype, name="patches_bottleneck")(h)
        h = dense(name="patches_in")(h)
        if known is not None:
            patches = to_patches(known.astype(self.dtype), self.patch_size)
            h = h + dense(use_bias=False, kernel_init=nn.initializers.zeros, name="patches_known")(patches)

        tokens = []
        if pooled is not None and self.context_tokens:
            position = Embedding((self.context_tokens, self.width), name="position")()
            tokens.append(pooled[:, None].astype(self.dtype) + position.astype(self.dtype))
        if context is not None:
            if context_mask is not None:  # learned tokens and patches are always seen
                ends = sum(part.shape[1] for part in tokens), h.shape[1]
                context_mask = jnp.pad(context_mask, ((0, 0), ends), constant_values=True)[:, None, None]
            tokens.append(dense(name="context_proj")(layers.RMSNorm(name="norm_context")(context)))

        rows, columns = (range(side // self.patch_size) for side in (height, width))
        waves = functools.partial(rotary_waves, rows, columns, self.width // self.num_heads)
        cond = nn.silu(emb.astype(self.dtype))
        start = self.depth // 3 if self.context_start is None else self.context_start
        start = start if tokens else self.depth
        h = self._blocks(range(start), constrain(h), cond, waves(), None, deterministic)
        count = sum(part.shape[1] for part in tokens)
        h, last = constrain(jnp.concatenate([*tokens, h], axis=1)), range(start, self.depth)
        h = self._blocks(last, h, cond, waves(context=count), context_mask, deterministic)[:, count:]

        shift, scale = modulation(2, self.dtype, "modulation_out", cond, self.width)
        h = (layers.RMSNorm(name="norm_out")(h) * (1 + scale) + shift).astype(self.dtype)
        outputs, zeros = self.patch_size**2 * self.out_channels, nn.initializers.zeros
        h = layers.Dense(outputs, dtype=self.dtype, kernel_init=zeros, name="patches_out")(h)
        return from_patches(h.astype(jnp.float32), self.patch_size, height, width)

    def _blocks(
        self,
        numbers: range,
        x: jax.Array,
        cond: jax.Array,
        waves: jax.Array,
        mask: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """x [B, N, width] behind the blocks of these numbers; waves [2, N, D / 2]."""
        scanned = self.scan_blocks and not self.is_initializing()
        block = layers.remat(ViTBlock, self.remat, static_argnums=(5,), prevent_cse=not scanned)
        settings = (self.num_heads, self.mlp_width or 8 * self.width // 3, self.dropout, self.dtype)
        names = [f"block_{i}" for i in numbers]
        if not scanned or not names:
            for name in names:
                x = block(*settings, name=name)(x, cond, waves, mask, deterministic)
            return x
        one, draws = block(*settings, parent=None), bool(self.dropout) and not deterministic
        keys = jax.random.split(self.make_rng("dropout"), len(names)) if draws else None

        def apply(params, x, key):
            rngs = {"dropout": key} if draws else {}
            return one.apply({"params": params}, x, cond, waves, mask, deterministic, rngs=rngs)

        return scan_blocks(apply, [self.variables["params"][name] for name in names], x, keys)

"""PixelSNAIL: gated causal convolutions and causal attention over a map of codes (VQ-VAE-2's priors).

Chen et al., arXiv 1712.09763, as in VQ-VAE-2 (arXiv 1906.00446, appendix B). The logits of a code follow from
the codes above it and to its left, in raster order:

    x_0 = conv of the rows above + conv of the codes to the left        both shifted, so that none sees itself
    r   = x + a * sigmoid(b),   (a, b) = conv(elu(conv(elu(x)))) + condition                  a gated residual
    block: gated residuals, then attention with keys of (input, r, place) and queries of (r, place)

Convolutions have normed weights: w = g v / |v|, of each output channel (Salimans & Kingma, arXiv 1602.07868).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.transformer import Embedding
from dalle2_jax.runtime.partition import constrain


class NormedConv(nn.Module):
    """A convolution with normed weights; `causal` sees the rows above and, in its own, what lies to the left.

    kernel: (rows, columns). pads: zeros (above, below), (left, right); None: alike, so that the size stays.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] | None = None
    causal: bool = False
    bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, features]."""
        # XLA computes other numbers where `tensor` splits C and `fsdp` the features.
        x = constrain(x.astype(self.dtype))
        rows, columns = self.kernel
        shape = (rows, columns, x.shape[-1], self.features)
        v = self.param("kernel", layers.lecun_normal(), shape, jnp.float32)
        gain = self.param("scale", nn.initializers.ones, (self.features,), jnp.float32)
        pads = self.pads or ((rows // 2, rows // 2), (columns // 2, columns // 2))
        if self.causal:  # of the last row only what lies before its middle
            seen = (jnp.arange(rows)[:, None] < rows - 1) | (jnp.arange(columns) < columns // 2)
            v = v * seen[..., None, None]
            pads = ((rows - 1, 0), (columns // 2, columns // 2))
        norm = jnp.sqrt(jnp.square(v).sum(axis=(0, 1, 2)) + 1e-12)
        w = (v * gain / norm).astype(self.dtype)
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, w, (1, 1), pads, dimension_numbers=axes)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(
                self.dtype
            )
        return y


class GatedResidual(nn.Module):
    """x + a * sigmoid(b). hidden: channels between the two convolutions."""

    hidden: int
    kernel: int = 1
    causal: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        extra: jax.Array | None = None,
        condition: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """x [B, H, W, C], extra [B, H, W, E] added between the convolutions, condition [B, H, W, D] or
        [B, 1, 1, D] added to (a, b) -> [B, H, W, C]."""
        how: dict[str, Any] = dict(kernel=(self.kernel, self.kernel), causal=self.causal, dtype=self.dtype)
        h = NormedConv(self.hidden, **how, name="conv1")(nn.elu(x))
        if extra is not None:
            h = h + NormedConv(self.hidden, dtype=self.dtype, name="extra")(nn.elu(extra))
        h = nn.Dropout(self.dropout, deterministic=deterministic)(nn.elu(h))
        h = NormedConv(2 * x.shape[-1], **how, name="conv2")(h)
        if condition is not None:
            h = h + NormedConv(2 * x.shape[-1], bias=False, dtype=self.dtype, name="condition")(condition)
        a, b = jnp.split(h, 2, axis=-1)
        return x + a * nn.sigmoid(b)


class CausalAttention(nn.Module):
    """Attention of each place to those before it; the first place, which has none, gets zeros."""

    features: int
    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """queries [B, H, W, C], keys [B, H, W, D] -> [B, H, W, features]."""
        size, height, width, _ = queries.shape

        def heads(x, name):
            y = NormedConv(self.features, dtype=self.dtype, name=name)(x)
            return layers.split_heads(y.reshape(size, height * width, -1), self.features // self.num_heads)

        q, k, v = heads(queries, "q"), heads(keys, "k"), heads(keys, "v")
        place = jnp.arange(height * width)
        mask = place[:, None] > place
        h = layers.attention(q, k, v, mask[None, None]) * (place > 0)[:, None].astype(v.dtype)
        return h.reshape(size, height, width, self.features)


class PixelBlock(nn.Module):
    """Gated residuals, then attention, or without it a 1 x 1 convolution that reads the place."""

    num_res_blocks: int
    hidden: int
    kernel: int
    num_heads: int
    attention: bool
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: jax.Array, place: jax.Array, condition: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """x [B, H, W, C], place [B, H, W, 2], condition: see `GatedResidual` -> [B, H, W, C]."""
        channels, out = x.shape[-1], x
        how: dict[str, Any] = dict(dropout=self.dropout, dtype=self.dtype)
        for i in range(self.num_res_blocks):
            block = GatedResidual(self.hidden, self.kernel, causal=True, **how, name=f"res_{i}")
            out = block(out, None, condition, deterministic)
        if not self.attention:
            return NormedConv(channels, dtype=self.dtype, name="mix")(jnp.concatenate([out, place], axis=-1))

        def mixed(parts, name):
            return GatedResidual(channels, **how, name=name)(
                jnp.concatenate(parts, axis=-1), deterministic=deterministic
            )

        keys, queries = mixed([x, out, place], "keys"), mixed([out, place], "queries")
        read = CausalAttention(channels // 2, self.num_heads, self.dtype, name="attn")(queries, keys)
        return GatedResidual(channels, **how, name="res_out")(out, read, deterministic=deterministic)


class PixelSnail(nn.Module):
    """Codes so far, the level above and the class -> logits of every code of one map.

    num_upper: entries of the code book of the level above, 0: there is none. num_classes: of labels, 0 for
    none; the last row of their table is no label. num_blocks blocks of num_res_blocks gated residuals of
    `hidden` channels; out_blocks, upper_blocks: residuals before the logits, and of the level above.
    """

    num_codes: int
    width: int
    hidden: int
    num_blocks: int
    num_res_blocks: int
    num_heads: int = 8
    kernel: int = 5
    attention: bool = True
    out_blocks: int = 0
    upper_blocks: int = 0
    num_upper: int = 0
    num_classes: int = 0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        upper: jax.Array | None = None,
        label: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """codes [B, H, W] int32, upper [B, h, w] with h dividing H, label [B], num_classes for none -> logits
        [B, H, W, num_codes] float32."""
        size, height, width = codes.shape
        x = jax.nn.one_hot(codes, self.num_codes, dtype=self.dtype)
        half = self.kernel // 2
        # of the rows above: kernel [k / 2, k], then a shift down; of the codes to the left, a shift right
        above = NormedConv(
            self.width,
            (half, self.kernel),
            ((half - 1, 0), (half, half)),
            dtype=self.dtype,
            name="rows_above",
        )
        pads = ((half, 0), (half - 1, 0))
        left = NormedConv(self.width, (half + 1, half), pads, dtype=self.dtype, name="left")
        x = _shifted(above(x), axis=1) + _shifted(left(x), axis=2)
        condition = self._condition(upper, label, (height, width), deterministic)
        place = jnp.stack(
            jnp.meshgrid(jnp.arange(height) / height, jnp.arange(width) / width, indexing="ij"), axis=-1
        )
        place = jnp.broadcast_to(place - 0.5, (size, height, width, 2)).astype(self.dtype)
        how: dict[str, Any] = dict(dropout=self.dropout, dtype=self.dtype)
        for i in range(self.num_blocks):
            block = PixelBlock(
                self.num_res_blocks,
                self.hidden,
                self.kernel,
                self.num_heads,
                self.attention,
                **how,
                name=f"block_{i}",
            )
            x = constrain(block(x, place, condition, deterministic))
        for i in range(self.out_blocks):
            x = GatedResidual(self.hidden, **how, name=f"out_{i}")(x, deterministic=deterministic)
        logits = NormedConv(self.num_codes, dtype=self.dtype, name="logits")(nn.elu(x))
        return logits.astype(jnp.float32)

    def _condition(
        self,
        upper: jax.Array | None,
        label: jax.Array | None,
        grid: tuple[int, int],
        deterministic: bool,
    ) -> jax.Array | None:
        """[B, H, W, C] or [B, 1, 1, C]; None: there is no condition."""
        found: list[jax.Array] = []
        if self.num_upper:
            assert upper is not None
            how: dict[str, Any] = dict(dropout=self.dropout, dtype=self.dtype)
            h = jax.nn.one_hot(upper, self.num_upper, dtype=self.dtype)
            h = NormedConv(self.width, (self.kernel, self.kernel), dtype=self.dtype, name="upper")(h)
            for i in range(self.upper_blocks):
                block = GatedResidual(self.hidden, self.kernel, **how, name=f"upper_{i}")
                h = block(h, deterministic=deterministic)
            for axis, (side, wanted) in enumerate(zip(upper.shape[1:], grid, strict=True), 1):
                h = jnp.repeat(h, wanted // side, axis=axis)  # nearest
            found.append(h)
        if self.num_classes:
            table = Embedding((self.num_classes + 1, self.width), name="label_embedding")()
            found.append(table.astype(self.dtype)[label][:, None, None])
        return functools.reduce(jnp.add, found) if found else None


def _shifted(x: jax.Array, axis: int) -> jax.Array:
    """x one place further along an axis; zeros come in."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (1, 0)
    return jax.lax.slice_in_dim(jnp.pad(x, pads), 0, x.shape[axis], axis=axis)

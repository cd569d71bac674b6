"""Encoder and decoder of DALL-E 1's dVAE (arXiv 2102.12092, appendix A.1; the layout of its released code).

A block adds convolutions of a quarter of its width, each behind a ReLU, scaled by 1 / layers^2. Groups of
blocks have 1, 2, 4, ... times `channels`; max pooling halves the side between the encoder's groups, nearest
neighbours double it between the decoder's. The code book is the decoder's first 1 x 1 convolution: it belongs
to the quantizer (`tokens.quantize.Gumbel`), so that the decoder begins with vectors. On a mesh the output of
every convolution has all its channels on each device: see `nets.vqvae`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.runtime.partition import constrain

MARGIN = 0.1  # pixels in [0, 1] are squeezed into [MARGIN, 1 - MARGIN]


class Block(nn.Module):
    """x + f(x) / layers^2 with four convolutions of these kernel sizes; x is projected to another width."""

    channels: int
    kernels: tuple[int, ...]
    num_layers: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, channels]."""
        h, hidden = x, self.channels // 4
        for i, kernel in enumerate(self.kernels, 1):
            width = self.channels if i == len(self.kernels) else hidden
            h = constrain(layers.conv(width, kernel, dtype=self.dtype, name=f"conv_{i}")(nn.relu(h)))
        if x.shape[-1] != self.channels:
            x = constrain(layers.conv(self.channels, 1, dtype=self.dtype, name="skip")(x))
        return constrain(x + h / self.num_layers**2)


class DVAENet(nn.Module):
    """The networks of one code map.

    Attributes:
      channels: of the finest group. num_groups: the side is divided by 2^(num_groups - 1).
      num_blocks: of a group. in_width: logits that the quantizer reads. out_width: of its vectors.
      out_channels: maps of the decoder.
    """

    channels: int
    in_width: int
    out_width: int
    num_groups: int = 4
    num_blocks: int = 2
    out_channels: int = 6
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Blocks are called GROUP_BLOCK, groups counted in the order in which they run."""
        count, conv = self.num_groups * self.num_blocks, layers.conv
        widths = [self.channels * 2**i for i in range(self.num_groups)]

        def blocks(order, kernels):
            return [
                Block(width, kernels, count, self.dtype) for width in order for _ in range(self.num_blocks)
            ]

        self.encoder_in = conv(self.channels, 7, dtype=self.dtype, name=None)
        self.encoder_blocks = blocks(widths, (3, 3, 3, 1))
        self.encoder_out = conv(self.in_width, 1, dtype=self.dtype, name=None)
        self.decoder_blocks = blocks(widths[::-1], (1, 3, 3, 3))
        self.decoder_out = conv(self.out_channels, 1, dtype=self.dtype, name=None)

    def _through(self, blocks, x: jax.Array, between) -> jax.Array:
        for i, block in enumerate(blocks):
            if i and i % self.num_blocks == 0:
                x = between(x)
            x = block(x)
        return x

    def features(self, x: jax.Array) -> tuple[jax.Array]:
        """x [B, H, W, 3] in [-1, 1] -> ([B, h, w, C],)."""
        x = (1 - 2 * MARGIN) * (x + 1) / 2 + MARGIN
        x = self._through(self.encoder_blocks, constrain(self.encoder_in(x.astype(self.dtype))), _max_pool)
        return (x,)

    def project(self, level: int, features: tuple, quantized: list) -> jax.Array:
        """Logits [B, h, w, in_width] float32."""
        return constrain(self.encoder_out(nn.relu(features[0])).astype(jnp.float32))

    def decode(self, quantized: list[jax.Array]) -> jax.Array:
        """[q [B, h, w, out_width]] -> maps [B, H, W, out_channels] float32."""
        x = self._through(self.decoder_blocks, constrain(quantized[0].astype(self.dtype)), layers.upsample)
        return constrain(self.decoder_out(nn.relu(x)).astype(jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Makes the parameters."""
        z = self.project(0, self.features(x), [])
        return self.decode([jnp.zeros((*z.shape[:-1], self.out_width))])


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), strides=(2, 2))

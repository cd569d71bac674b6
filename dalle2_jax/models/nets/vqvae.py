"""The autoencoder of VQ-VAE (arXiv 1711.00937) and VQ-VAE-2 (arXiv 1906.00446), of one code map or several.

Encoders halve the side by 4 x 4 convolutions of stride 2, decoders double it by their transposes; residual
blocks (ReLU, 3 x 3, ReLU, 1 x 1) stand between. Level 0 is the top, the coarsest map, and the last one is the
bottom. With e_l the features of level l, q_l its quantized vectors, u_l all vectors down to level l:

    u_0 = q_0,       u_l = [up(u_(l-1)), q_l],   d_l = decoder_l(u_l) at the side of level l + 1
    z_0 = 1x1(e_0),  z_l = 1x1([d_(l-1), e_l])                        these are quantized
    output = decoder(u_bottom)

On a mesh the output of every convolution has all its channels on each device (`constrain`). Where `tensor`
splits the channels of a convolution's input and `fsdp` those of its output, XLA computes wrong gradients.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.runtime.partition import constrain


def up_conv(features: int, dtype: DTypeLike, name: str | None) -> nn.Module:
    """A transposed 4 x 4 convolution of stride 2, which doubles the side (torch's with padding 1)."""
    return nn.ConvTranspose(
        features,
        (4, 4),
        strides=(2, 2),
        padding="SAME",
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=layers.lecun_normal(),
        name=name,
    )


def down_conv(features: int, dtype: DTypeLike, name: str) -> nn.Module:
    """A 4 x 4 convolution of stride 2, which halves the side."""
    return layers.conv(features, 4, stride=2, padding=((1, 1), (1, 1)), dtype=dtype, name=name)


class ResStack(nn.Module):
    """Residual blocks: ReLU, 3 x 3, ReLU, 1 x 1, each added to its input; then ReLU."""

    residual_channels: int
    num_res_blocks: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> the same shape."""
        for i in range(self.num_res_blocks):
            h = layers.conv(self.residual_channels, dtype=self.dtype, name=f"res_{i}_conv1")(nn.relu(x))
            h = layers.conv(x.shape[-1], 1, dtype=self.dtype, name=f"res_{i}_conv2")(nn.relu(constrain(h)))
            x = constrain(x + h)
        return nn.relu(x)


class Encoder(nn.Module):
    """x [B, H, W, C] -> [B, H / stride, W / stride, channels]; halved: see `VQVAENet`."""

    channels: int
    residual_channels: int
    num_res_blocks: int
    stride: int
    halved: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """See the class."""
        count = self.stride.bit_length() - 1
        for i in range(count):
            width = self.channels // 2 if self.halved and i == 0 else self.channels
            x = constrain(down_conv(width, self.dtype, f"down_{i}")(x if i == 0 else nn.relu(x)))
        if self.halved:
            x = constrain(layers.conv(self.channels, dtype=self.dtype, name="conv")(nn.relu(x)))
        return ResStack(self.residual_channels, self.num_res_blocks, self.dtype, name="stack")(constrain(x))


class Decoder(nn.Module):
    """x [B, h, w, C] -> [B, h * stride, w * stride, out_channels]."""

    out_channels: int
    channels: int
    residual_channels: int
    num_res_blocks: int
    stride: int
    halved: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """See the class."""
        x = constrain(layers.conv(self.channels, dtype=self.dtype, name="conv")(x))
        x = ResStack(self.residual_channels, self.num_res_blocks, self.dtype, name="stack")(constrain(x))
        count, last = self.stride.bit_length() - 1, self.channels // 2 if self.halved else self.channels
        for i in range(count - 1):
            x = up_conv(last if i == count - 2 else self.channels, self.dtype, f"up_{i}")(x)
            x = constrain(nn.relu(x))
        return constrain(up_conv(self.out_channels, self.dtype, f"up_{count - 1}")(x))


class VQVAENet(nn.Module):
    """The module's network.

    Attributes:
      channels, residual_channels, num_res_blocks: of every encoder and decoder.
      strides: of the levels in the order in which they are encoded, the bottom's first: (4, 2).
      in_width, out_width: channels that the quantizer reads and gives.
      halved: the first convolution has half the channels, and a 3 x 3 one follows the strided ones (VQ-VAE-2
        and Sonnet's example); else there is neither (the VQ-VAE paper).
    """

    channels: int
    residual_channels: int
    num_res_blocks: int
    strides: tuple[int, ...]
    in_width: int
    out_width: int
    out_channels: int = 3
    halved: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Level l has stride strides[-1 - l]; encoders are those of the levels, top first."""
        sizes = (self.channels, self.residual_channels, self.num_res_blocks)
        how, top_first = dict(halved=self.halved, dtype=self.dtype), self.strides[::-1]
        levels = len(top_first)
        self.encoders = [Encoder(*sizes, stride, **how) for stride in top_first]
        outs = [self.in_width] * (levels - 1) + [self.out_channels]
        # The way up from level l has the stride by which level l + 1 was halved to it.
        self.decoders = [
            Decoder(out, *sizes, stride, **how) for out, stride in zip(outs, top_first, strict=True)
        ]
        self.projections = [layers.conv(self.in_width, 1, dtype=self.dtype, name=None) for _ in range(levels)]
        self.ups = [up_conv((level + 1) * self.out_width, self.dtype, None) for level in range(levels - 1)]

    def features(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """x [B, H, W, 3] -> e_l [B, h_l, w_l, C], top first."""
        found = []
        for encoder in self.encoders[::-1]:
            x = encoder(x.astype(self.dtype))
            found.append(x)
        return tuple(found[::-1])

    def project(self, level: int, features: tuple, quantized: list[jax.Array]) -> jax.Array:
        """z_l [B, h, w, in_width] float32; quantized: q of the levels above it."""
        x = features[level]
        if level:
            decoded = self.decoders[level - 1](self._lifted(quantized))
            x = constrain(jnp.concatenate([decoded, x], axis=-1))
        return constrain(self.projections[level](x).astype(jnp.float32))

    def _lifted(self, quantized: list[jax.Array]) -> jax.Array:
        """u_l of q_0 ... q_l."""
        u = constrain(quantized[0].astype(self.dtype))
        for up, q in zip(self.ups, quantized[1:], strict=False):
            u = constrain(jnp.concatenate([constrain(up(u)), q.astype(self.dtype)], axis=-1))
        return u

    def decode(self, quantized: list[jax.Array]) -> jax.Array:
        """q_l [B, h_l, w_l, out_width], top first -> [B, H, W, out_channels] float32."""
        return self.decoders[-1](self._lifted(quantized)).astype(jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Makes the parameters."""
        features = self.features(x)
        quantized: list[jax.Array] = []
        for level in range(len(self.strides)):
            z = self.project(level, features, quantized)
            quantized.append(jnp.zeros((*z.shape[:-1], self.out_width)))
        return self.decode(quantized)

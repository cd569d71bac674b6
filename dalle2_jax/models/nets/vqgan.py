"""The autoencoder of VQGAN (arXiv 2012.09841; the layout of its released code) and its patch discriminator.

Residual blocks (group norm, SiLU, 3 x 3, twice) at each level, a convolution of stride 2 with TensorFlow's
padding on the way down, nearest neighbours and a convolution on the way up, single-head attention over all
positions at some sides and in the middle. Group norms have epsilon 1e-6.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.runtime.partition import constrain


def _norm(name: str) -> nn.Module:
    return layers.GroupNorm(epsilon=1e-6, name=name)


class ResBlock(nn.Module):
    """x [B, h, w, C] -> [B, h, w, channels]."""

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """See the class."""
        h = layers.conv(self.channels, dtype=self.dtype, name="conv1")(nn.silu(_norm("norm1")(x)))
        h = layers.conv(self.channels, dtype=self.dtype, name="conv2")(nn.silu(_norm("norm2")(h)))
        if x.shape[-1] != self.channels:
            x = layers.conv(self.channels, 1, dtype=self.dtype, name="skip")(x)
        return constrain(x + h)


class Attention(nn.Module):
    """Single-head self-attention over the positions of x [B, h, w, C], added to x."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """See the class."""
        batch, height, width, channels = x.shape
        h = _norm("norm")(x).reshape(batch, height * width, 1, channels).astype(self.dtype)
        q, k, v = (layers.Dense(channels, dtype=self.dtype, name=name)(h) for name in "qkv")
        h = layers.attention(q, k, v)  # [B, N, C]
        h = layers.Dense(channels, dtype=self.dtype, name="out")(h)
        return constrain(x + h.reshape(x.shape))


class Sizes(NamedTuple):
    """Of encoder and decoder.

    Attributes:
      channels, channel_mult: of the levels, finest first; the side is halved between them.
      num_res_blocks: of a level on the way down; one more on the way up.
      attention_resolutions: sides with attention, of a picture of side `image_size`.
      z_channels: of the encoder's output, before the 1 x 1 convolutions around the quantizer.
      unit_pixels: the encoder reads pixels in [0, 1] in the place of [-1, 1].
    """

    image_size: int
    channels: int
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    z_channels: int = 256
    unit_pixels: bool = False


class Encoder(nn.Module):
    """x [B, H, W, 3] -> [B, h, w, z_channels]."""

    sizes: Sizes
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """See the class."""
        sizes, dtype = self.sizes, self.dtype
        x = layers.conv(sizes.channels, dtype=dtype, name="conv_in")(x.astype(dtype))
        for level, mult in enumerate(sizes.channel_mult):
            for j in range(sizes.num_res_blocks):
                x = ResBlock(sizes.channels * mult, dtype, name=f"down_{level}_res_{j}")(x)
                if sizes.image_size // 2**level in sizes.attention_resolutions:
                    x = Attention(dtype, name=f"down_{level}_attn_{j}")(x)
            if level < len(sizes.channel_mult) - 1:
                how = dict(stride=2, padding=((0, 1), (0, 1)), dtype=dtype)
                x = layers.conv(x.shape[-1], **how, name=f"down_{level}_down")(x)
        x = _middle(x, dtype)
        return layers.conv(sizes.z_channels, dtype=dtype, name="conv_out")(nn.silu(_norm("norm_out")(x)))


class Decoder(nn.Module):
    """x [B, h, w, z_channels] -> what the last convolution reads, [B, H, W, channels]."""

    sizes: Sizes
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """See the class."""
        sizes, dtype, mults = self.sizes, self.dtype, self.sizes.channel_mult
        x = layers.conv(sizes.channels * mults[-1], dtype=dtype, name="conv_in")(x)
        x = _middle(x, dtype)
        for level, mult in reversed(list(enumerate(mults))):
            for j in range(sizes.num_res_blocks + 1):
                x = ResBlock(sizes.channels * mult, dtype, name=f"up_{level}_res_{j}")(x)
                if sizes.image_size // 2**level in sizes.attention_resolutions:
                    x = Attention(dtype, name=f"up_{level}_attn_{j}")(x)
            if level:
                x = layers.conv(x.shape[-1], dtype=dtype, name=f"up_{level}_up")(layers.upsample(x))
        return nn.silu(_norm("norm_out")(x))


def _middle(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Block, attention, block at the lowest side; inside a compact method."""
    x = ResBlock(x.shape[-1], dtype, name="mid_res_0")(x)
    x = Attention(dtype, name="mid_attn")(x)
    return ResBlock(x.shape[-1], dtype, name="mid_res_1")(x)


class VQGANNet(nn.Module):
    """The networks of one code map; in_width, out_width: channels that the quantizer reads and gives.

    Where they differ, the quantizer reads logits: a further convolution, `proj`, makes them.
    """

    sizes: Sizes
    in_width: int
    out_width: int
    out_channels: int = 3
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Encoder, decoder, and the convolutions between them and the quantizer."""
        self.encoder, self.decoder = (half(self.sizes, self.dtype) for half in (Encoder, Decoder))
        self.quant_conv = layers.conv(self.out_width, 1, dtype=self.dtype, name=None)
        if self.in_width != self.out_width:
            self.proj = layers.conv(self.in_width, 1, dtype=self.dtype, name=None)
        self.post_quant_conv = layers.conv(self.sizes.z_channels, 1, dtype=self.dtype, name=None)
        self.decoder_out = layers.conv(self.out_channels, dtype=self.dtype, name=None)

    def features(self, x: jax.Array) -> tuple[jax.Array]:
        """x [B, H, W, 3] in [-1, 1] -> ([B, h, w, z_channels],)."""
        # not a part of the first convolution, whose padding is 0 in either range
        return (self.encoder((x + 1) / 2 if self.sizes.unit_pixels else x),)

    def project(self, level: int, features: tuple, quantized: list) -> jax.Array:
        """What is quantized, [B, h, w, in_width] float32."""
        z = self.quant_conv(features[0])
        return (z if self.in_width == self.out_width else self.proj(z)).astype(jnp.float32)

    def last_features(self, quantized: list[jax.Array]) -> jax.Array:
        """What the last convolution reads, [B, H, W, channels]."""
        return self.decoder(self.post_quant_conv(quantized[0].astype(self.dtype)))

    def last(self, features: jax.Array) -> jax.Array:
        """The last convolution: maps [B, H, W, out_channels] float32."""
        return self.decoder_out(features.astype(self.dtype)).astype(jnp.float32)

    def decode(self, quantized: list[jax.Array]) -> jax.Array:
        """[q [B, h, w, out_width]] -> maps [B, H, W, out_channels] float32."""
        return self.last(self.last_features(quantized))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Makes the parameters."""
        z = self.project(0, self.features(x), [])
        return self.decode([jnp.zeros((*z.shape[:-1], self.out_width))])


class Discriminator(nn.Module):
    """Scores of overlapping patches (arXiv 1611.07004): 4 x 4 convolutions of these widths, then of 1.

    All have stride 2 but the last two. Batch norm, by the statistics of the batch, from the second on; leaky
    ReLU of 0.2. Weights are N(0, 0.02), gains N(1, 0.02).
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """x [B, H, W, 3] -> (scores [B, h, w], the activations of each layer but the last)."""
        found, normal = [], nn.initializers.normal(0.02)
        for i, width in enumerate((*self.widths, 1)):
            stride = 2 if i < len(self.widths) - 1 else 1
            normed = 0 < i < len(self.widths)
            conv = nn.Conv(
                width,
                (4, 4),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=not normed,
                kernel_init=normal,
                name=f"conv_{i}",
            )
            x = conv(x)
            if normed:
                mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))  # of the global batch on a mesh
                scale = self.param(f"scale_{i}", _near_one, (width,))
                bias = self.param(f"bias_{i}", nn.initializers.zeros, (width,))
                x = (x - mean) * jax.lax.rsqrt(var + layers.NORM_EPSILON) * scale + bias
            if i < len(self.widths):
                x = nn.leaky_relu(x, 0.2)
                found.append(x)
        return x[..., 0].astype(jnp.float32), found


def _near_one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 1 + 0.02 * jax.random.normal(key, shape)

"""The ADM U-Net (arXiv 2105.05233), with GLIDE's attention to context tokens (arXiv 2112.10741).

A level is `num_res_blocks` residual blocks (attention behind each where the level's side is in
`attention_resolutions`), then a residual block that halves the side. The way up has one block more a level,
each fed [h, skip]. The timestep embedding, to which a denoiser adds its conditions, sets scale and shift of
every block. Names of blocks are the interface of checkpoints, sharding rules and weight importers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.vision import AttentionPool
from dalle2_jax.runtime.partition import constrain


class Style(NamedTuple):
    """Where a U-Net differs from ADM's, whose values are the defaults.

    Attributes:
      resample: 'residual', a residual block halves and doubles the side (BigGAN); or 'conv', a convolution of
        stride 2 halves it, nearest-neighbour doubling and a convolution double it (DDPM, improved DDPM).
      resample_pad: zeros before and after the rows that the convolution of stride 2 reads: (1, 1), torch's;
        or (0, 1), TensorFlow's 'SAME' (DDPM). The two differ by half a pixel a level.
      sin_first: sines before cosines in the embedding of time (DDPM).
      freq_shift: the frequencies are 10000^(-k / (half - freq_shift)), k = 0 .. half - 1: 0, or 1 (DDPM).
      time_scale: factor of the time: 1000 / T in improved DDPM's networks with rescaled times.
      emb_dim: width of the embeddings of time and conditions; 0: four times `channels`.
      activation: 'silu', or 'gelu', the exact one (IF).
      norm_epsilon, norm_groups: of group norms; 0 groups: `layers.num_groups`. DDPM: 1e-6.
      context_norm: norm of the context before keys and values: '', 'group' (IF) or 'layer' (Imagen).
      context_only: attention reads the context alone, not the picture (Imagen's 1024 stage).
      skip_scale: factor of the skips where they join the way up: 2^-0.5 in Imagen's upsamplers.
      efficient: the levels of `efficient_unet.EfficientUNet` (Imagen's upsamplers), whose skips are scaled.
      residual_scale: factor of a residual block's sum: 0.7071 in IF's second stage.
    """

    resample: str = "residual"
    resample_pad: tuple[int, int] = (1, 1)
    sin_first: bool = False
    freq_shift: int = 0
    time_scale: float = 1.0
    emb_dim: int = 0
    activation: str = "silu"
    norm_epsilon: float = layers.NORM_EPSILON
    norm_groups: int = 0
    context_norm: str = ""
    context_only: bool = False
    skip_scale: float = 1.0
    efficient: bool = False
    residual_scale: float = 1.0

    def check(self) -> "Style":
        """Itself; raises ValueError for a value that is not there."""
        for name, values in (("resample", ("residual", "conv")), ("context_norm", ("", "group", "layer"))):
            if getattr(self, name) not in values:
                raise ValueError(f"net.{name} {getattr(self, name)!r} is unknown; choose one of {values}")
        if tuple(self.resample_pad) not in ((1, 1), (0, 1)):
            raise ValueError(f"net.resample_pad {self.resample_pad} must be (1, 1) or (0, 1)")
        layers.activation(self.activation)
        return self

    def norm(self, name: str) -> nn.Module:
        """A group norm."""
        return layers.GroupNorm(self.norm_groups, self.norm_epsilon, name=name)


class ResBlock(nn.Module):
    """ADM residual block; `resample` is '' or 'down' or 'up' and acts on both branches before the first
    convolution."""

    channels: int
    dropout: float = 0.0
    resample: str = ""
    scale_shift: bool = True
    style: Style = Style()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, H, W, C], emb [B, E] -> [B, H', W', channels]."""
        resample = {"": lambda y: y, "down": layers.downsample, "up": layers.upsample}[self.resample]
        act = layers.activation(self.style.activation)
        h = resample(act(self.style.norm("norm1")(x)).astype(self.dtype))
        x = resample(x)
        # Around convolutions too: the gradient by a kernel that is split over `fsdp` would else gather the
        # whole batch where it is recomputed.
        h = constrain(layers.conv(self.channels, dtype=self.dtype, name="conv1")(constrain(h)))
        width = 2 * self.channels if self.scale_shift else self.channels
        shift = layers.Dense(width, dtype=self.dtype, name="emb_proj")(act(emb))[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(shift.astype(jnp.float32), 2, axis=-1)
            h = self.style.norm("norm2")(h) * (1 + scale) + shift
        else:
            h = self.style.norm("norm2")(h + shift)
        h = nn.Dropout(self.dropout)(act(h).astype(self.dtype), deterministic=deterministic)
        h = layers.conv(self.channels, dtype=self.dtype, name="conv2", zero=True)(constrain(h))
        if x.shape[-1] != self.channels:
            x = layers.conv(self.channels, 1, dtype=self.dtype, name="skip")(x)
        return constrain(_scaled(x + h, self.style.residual_scale))


class AttentionBlock(nn.Module):
    """Self-attention over positions whose keys and values are preceded by those of the context tokens
    (GLIDE). Heads have `head_dim` entries, or there are `num_heads` of them."""

    head_dim: int
    num_heads: int = 0
    style: Style = Style()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None, context_mask: jax.Array | None) -> jax.Array:
        """x [B, H, W, C], context [B, K, D], context_mask [B, K] bool (True = attend) -> [B, H, W, C]."""
        batch, height, width, channels = x.shape
        h = self.style.norm("norm")(x).astype(self.dtype).reshape(batch, height * width, channels)
        keys, values, mask, pictures = [], [], None, 0
        if self.style.context_only:
            q = layers.Dense(channels, dtype=self.dtype, name="q")(h)
        else:
            q, k, v = jnp.split(layers.Dense(3 * channels, dtype=self.dtype, name="qkv")(h), 3, axis=-1)
            keys, values, pictures = [k], [v], height * width
        if context is not None:
            text_kv = layers.Dense(2 * channels, dtype=self.dtype, name="text_kv")
            text_k, text_v = jnp.split(text_kv(self._normed(context).astype(self.dtype)), 2, axis=-1)
            keys, values, mask = [text_k, *keys], [text_v, *values], context_mask
        if mask is not None:  # the picture's own keys are never masked
            mask = jnp.pad(mask, ((0, 0), (0, pictures)), constant_values=True)[:, None, None, :]
        k, v = (ys[0] if len(ys) == 1 else jnp.concatenate(ys, axis=1) for ys in (keys, values))
        head_dim = channels // self.num_heads if self.num_heads else min(self.head_dim, channels)
        q, k, v = (layers.split_heads(y, head_dim) for y in (q, k, v))
        h = layers.attention(q, k, v, mask, cudnn=True)
        h = layers.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(h)
        return constrain(x + h.reshape(x.shape))

    def _normed(self, context: jax.Array) -> jax.Array:
        """The context [B, K, D] behind the norm that `style` names."""
        if self.style.context_norm == "group":
            return layers.GroupNorm(self.style.norm_groups, name="norm_context")(context)
        return layers.LayerNorm(name="norm_context")(context) if self.style.context_norm else context


class UNet(nn.Module):
    """The ADM network, or a relative of it: see `Style`.

    `out_channels` counts the variance channels where the variance is learned. `num_res_blocks` may be one
    number for each level.

    With `num_pool_heads` it is the way down alone, whose features are pooled by attention: ADM's classifier
    of noised pictures.
    """

    out_channels: int
    channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: tuple[int, ...] = ()
    head_dim: int = 64
    num_heads: int = 0
    dropout: float = 0.0
    scale_shift: bool = True
    remat: bool | str = False
    num_pool_heads: int = 0
    style: Style = Style()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        emb: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        *,
        image_size: int,
        deterministic: bool = True,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, H, W, C_in], emb [B, E], context [B, K, D] -> [B, H, W, out_channels] float32.

        Where it is pooled, [B, out_channels]. known [B, H, W, 4] has further channels of input, whose weights
        begin as zeros: a network that was trained without them can be trained on with them.

        `image_size` is the side that `attention_resolutions` refer to (it fixes the levels that attend,
        whatever the size of x). Raises ValueError when H or W cannot be halved often enough.
        """
        levels, widths = len(self.channel_mult), [int(self.channels * mult) for mult in self.channel_mult]
        check_sides(x, levels, levels - 1)
        style, blocks = self.style, self.num_res_blocks
        blocks = (blocks,) * levels if isinstance(blocks, int) else blocks
        res_block = layers.remat(ResBlock, self.remat, static_argnums=(3,))
        attention_block = layers.remat(AttentionBlock, self.remat)

        def res(name, channels, resample=""):
            block = res_block(
                channels, self.dropout, resample, self.scale_shift, style, self.dtype, name=name
            )
            return lambda h: block(h, emb, deterministic)

        def resized(name, h, *how):
            return self._resampled(name, h, *how) if style.resample == "conv" else res(name, *how)(h)

        def attention(name):
            return attention_block(self.head_dim, self.num_heads, style, self.dtype, name=name)

        def attend(name, h, level):
            if image_size // 2**level not in self.attention_resolutions:
                return h
            return attention(name)(h, context, context_mask)

        act, emb = layers.activation(style.activation), emb.astype(self.dtype)
        h = layers.conv(widths[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        if known is not None:
            conv = layers.conv(h.shape[-1], dtype=self.dtype, name="conv_in_known", zero=True)
            h = h + conv(known.astype(self.dtype))
        skips = [h]
        for level, width in enumerate(widths):
            for j in range(blocks[level]):
                h = res(f"down_{level}_res_{j}", width)(h)
                h = attend(f"down_{level}_attn_{j}", h, level)
                skips.append(h)
            if level < levels - 1:
                h = resized(f"down_{level}_down", h, width, "down")
                skips.append(h)

        h = res("mid_res_0", h.shape[-1])(h)
        if self.attention_resolutions:
            h = attention("mid_attn")(h, context, context_mask)
        h = res("mid_res_1", h.shape[-1])(h)
        if self.num_pool_heads:
            pool = AttentionPool(self.num_pool_heads, self.out_channels, self.dtype, name="pool")
            return pool(act(style.norm("norm_out")(h)).astype(self.dtype)).astype(jnp.float32)

        for level, width in reversed(list(enumerate(widths))):
            for j in range(blocks[level] + 1):
                h = jnp.concatenate([h, _scaled(skips.pop(), style.skip_scale)], axis=-1)
                h = res(f"up_{level}_res_{j}", width)(h)
                h = attend(f"up_{level}_attn_{j}", h, level)
            if level > 0:
                h = resized(f"up_{level}_up", h, width, "up")

        h = act(style.norm("norm_out")(h)).astype(self.dtype)
        return layers.conv(self.out_channels, dtype=self.dtype, name="conv_out", zero=True)(h).astype(
            jnp.float32
        )

    def _resampled(self, name: str, h: jax.Array, channels: int, resample: str) -> jax.Array:
        """h [B, H, W, C] halved or doubled by a convolution."""
        if resample == "up":
            return layers.conv(channels, dtype=self.dtype, name=name)(layers.upsample(h))
        before, after = self.style.resample_pad
        pad = ((before, after), (before, after))
        return layers.conv(channels, stride=2, padding=pad, dtype=self.dtype, name=name)(h)


def check_sides(x: jax.Array, levels: int, halvings: int) -> None:
    """Raise ValueError unless the sides of x [B, H, W, C] can be halved so often."""
    if x.shape[1] % 2**halvings or x.shape[2] % 2**halvings:
        raise ValueError(
            f"a U-Net of {levels} levels needs sides that are multiples of {2**halvings}, got {x.shape[1:3]}"
        )


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """x times `scale`; the same program as without it where it is 1."""
    return x if scale == 1 else x * scale


class TimeEmbedding(nn.Module):
    """Sinusoids of width `channels`, then Dense, activation, Dense to `style.emb_dim` (ADM: 4 x channels)."""

    channels: int
    style: Style = Style()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """t [B], times or a number for each -> [B, E]."""
        style, width = self.style, self.style.emb_dim or 4 * self.channels
        t = _scaled(t, style.time_scale)
        h = layers.timestep_embedding(
            t, self.channels, sin_first=style.sin_first, freq_shift=style.freq_shift
        )
        h = layers.Dense(width, dtype=self.dtype, name="fc1")(h.astype(self.dtype))
        h = layers.activation(style.activation)(h)
        return layers.Dense(width, dtype=self.dtype, name="fc2")(h)


class ClassifierNet(nn.Module):
    """ADM's classifier of noised pictures: the U-Net's way down, pooled (arXiv 2105.05233, section 4)."""

    unet: dict
    image_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_t, t, deterministic=True):
        """x_t [B, H, W, 3], t [B] -> logits [B, classes] float32."""
        unet = dict(self.unet)
        time = TimeEmbedding(unet["channels"], unet.get("style", Style()), self.dtype, name="time")
        net = UNet(**unet, dtype=self.dtype, name="net")
        return net(x_t, time(t), image_size=self.image_size, deterministic=deterministic)

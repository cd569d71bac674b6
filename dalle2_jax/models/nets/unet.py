"""The ADM U-Net (arXiv 2105.05233), with GLIDE's attention to context tokens (arXiv 2112.10741).

A level is `num_res_blocks` residual blocks (attention behind each where the level's side is in
`attention_resolutions`), then a residual block that halves the side. The way up has one block more a level,
each fed [h, skip]. The timestep embedding, to which a denoiser adds its conditions, sets scale and shift of
every block. Names of blocks are the interface of checkpoints, sharding rules and weight importers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.vision import AttentionPool
from dalle2_jax.runtime.partition import constrain


class ResBlock(nn.Module):
    """ADM residual block; `resample` is '' or 'down' or 'up' and acts on both branches before the first
    convolution."""

    channels: int
    dropout: float = 0.0
    resample: str = ""
    scale_shift: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, H, W, C], emb [B, E] -> [B, H', W', channels]."""
        resample = {"": lambda y: y, "down": layers.downsample, "up": layers.upsample}[self.resample]
        h = resample(nn.silu(layers.GroupNorm(name="norm1")(x)).astype(self.dtype))
        x = resample(x)
        # Around convolutions too: the gradient by a kernel that is split over `fsdp` would else gather the
        # whole batch where it is recomputed.
        h = constrain(layers.conv(self.channels, dtype=self.dtype, name="conv1")(constrain(h)))
        width = 2 * self.channels if self.scale_shift else self.channels
        shift = layers.Dense(width, dtype=self.dtype, name="emb_proj")(nn.silu(emb))[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(shift.astype(jnp.float32), 2, axis=-1)
            h = layers.GroupNorm(name="norm2")(h) * (1 + scale) + shift
        else:
            h = layers.GroupNorm(name="norm2")(h + shift)
        h = nn.Dropout(self.dropout)(nn.silu(h).astype(self.dtype), deterministic=deterministic)
        h = layers.conv(self.channels, dtype=self.dtype, name="conv2", zero=True)(constrain(h))
        if x.shape[-1] != self.channels:
            x = layers.conv(self.channels, 1, dtype=self.dtype, name="skip")(x)
        return constrain(x + h)


class AttentionBlock(nn.Module):
    """Self-attention over positions whose keys and values are preceded by those of the context tokens
    (GLIDE). Heads have `head_dim` entries, or there are `num_heads` of them."""

    head_dim: int
    num_heads: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None, context_mask: jax.Array | None) -> jax.Array:
        """x [B, H, W, C], context [B, K, D], context_mask [B, K] bool (True = attend) -> [B, H, W, C]."""
        batch, height, width, channels = x.shape
        h = layers.GroupNorm(name="norm")(x).astype(self.dtype).reshape(batch, height * width, channels)
        q, k, v = jnp.split(layers.Dense(3 * channels, dtype=self.dtype, name="qkv")(h), 3, axis=-1)
        mask = None
        if context is not None:
            text_k, text_v = jnp.split(
                layers.Dense(2 * channels, dtype=self.dtype, name="text_kv")(context.astype(self.dtype)),
                2,
                axis=-1,
            )
            k, v = jnp.concatenate([text_k, k], axis=1), jnp.concatenate([text_v, v], axis=1)
            if context_mask is not None:
                mask = jnp.pad(context_mask, ((0, 0), (0, height * width)), constant_values=True)[
                    :, None, None, :
                ]
        head_dim = channels // self.num_heads if self.num_heads else min(self.head_dim, channels)
        q, k, v = (layers.split_heads(y, head_dim) for y in (q, k, v))
        h = layers.attention(q, k, v, mask, cudnn=True)
        h = layers.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(h)
        return constrain(x + h.reshape(x.shape))


class UNet(nn.Module):
    """The ADM network. `out_channels` counts the variance channels where the variance is learned.

    With `num_pool_heads` it is the way down alone, whose features are pooled by attention: ADM's classifier
    of noised pictures.
    """

    out_channels: int
    channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...] = ()
    head_dim: int = 64
    num_heads: int = 0
    dropout: float = 0.0
    scale_shift: bool = True
    remat: bool | str = False
    num_pool_heads: int = 0
    dtype: jnp.dtype = jnp.float32

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
        if x.shape[1] % 2 ** (levels - 1) or x.shape[2] % 2 ** (levels - 1):
            raise ValueError(
                f"a U-Net of {levels} levels needs sides that are multiples of {2 ** (levels - 1)}, "
                f"got {x.shape[1:3]}"
            )
        res_block = layers.remat(ResBlock, self.remat, static_argnums=(3,))
        attention_block = layers.remat(AttentionBlock, self.remat)

        def res(name, channels, resample=""):
            block = res_block(channels, self.dropout, resample, self.scale_shift, self.dtype, name=name)
            return lambda h: block(h, emb, deterministic)

        def attention(name):
            return attention_block(self.head_dim, self.num_heads, self.dtype, name=name)

        def attend(name, h, level):
            if image_size // 2**level not in self.attention_resolutions:
                return h
            return attention(name)(h, context, context_mask)

        emb = emb.astype(self.dtype)
        h = layers.conv(widths[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        if known is not None:
            conv = layers.conv(h.shape[-1], dtype=self.dtype, name="conv_in_known", zero=True)
            h = h + conv(known.astype(self.dtype))
        skips = [h]
        for level, width in enumerate(widths):
            for j in range(self.num_res_blocks):
                h = res(f"down_{level}_res_{j}", width)(h)
                h = attend(f"down_{level}_attn_{j}", h, level)
                skips.append(h)
            if level < levels - 1:
                h = res(f"down_{level}_down", width, "down")(h)
                skips.append(h)

        h = res("mid_res_0", h.shape[-1])(h)
        if self.attention_resolutions:
            h = attention("mid_attn")(h, context, context_mask)
        h = res("mid_res_1", h.shape[-1])(h)
        if self.num_pool_heads:
            h = nn.silu(layers.GroupNorm(name="norm_out")(h)).astype(self.dtype)
            pool = AttentionPool(self.num_pool_heads, self.out_channels, self.dtype, name="pool")
            return pool(h).astype(jnp.float32)

        for level, width in reversed(list(enumerate(widths))):
            for j in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = res(f"up_{level}_res_{j}", width)(h)
                h = attend(f"up_{level}_attn_{j}", h, level)
            if level > 0:
                h = res(f"up_{level}_up", width, "up")(h)

        h = nn.silu(layers.GroupNorm(name="norm_out")(h)).astype(self.dtype)
        return layers.conv(self.out_channels, dtype=self.dtype, name="conv_out", zero=True)(h).astype(
            jnp.float32
        )


class TimeEmbedding(nn.Module):
    """Sinusoids of width `channels`, then Dense-SiLU-Dense to 4 x channels (ADM)."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """t [B] -> [B, 4 * channels]."""
        h = layers.timestep_embedding(t, self.channels).astype(self.dtype)
        h = nn.silu(layers.Dense(4 * self.channels, dtype=self.dtype, name="fc1")(h))
        return layers.Dense(4 * self.channels, dtype=self.dtype, name="fc2")(h)


class ClassifierNet(nn.Module):
    """ADM's classifier of noised pictures: the U-Net's way down, pooled (arXiv 2105.05233, section 4)."""

    unet: dict
    image_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_t, t, deterministic=True):
        """x_t [B, H, W, 3], t [B] -> logits [B, classes] float32."""
        unet = dict(self.unet)
        emb = TimeEmbedding(unet["channels"], self.dtype, name="time")(t)
        net = UNet(**unet, dtype=self.dtype, name="net")
        return net(x_t, emb, image_size=self.image_size, deterministic=deterministic)

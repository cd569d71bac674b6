"""Imagen's Efficient U-Net, for its upsamplers (arXiv 2205.11487, appendix B.1 and figures A.27 to A.30).

    down: convolution of stride 2, + embeddings, residual blocks, attention
    up:   + embeddings, residual blocks (each reads [h, skip / sqrt(2)]), attention, doubling and convolution

A level halves the side before its blocks and doubles it behind them, so that all blocks of a level run on
few positions. The paper leaves three things open: skips are concatenated, one for each residual block;
embeddings enter once a level; an attention block is that of the U-Net. With these the 64 -> 256 network has
548 million parameters without its text pooling (the paper says 600 million with it).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.unet import AttentionBlock, Style, check_sides
from dalle2_jax.runtime.partition import constrain


class PlainResBlock(nn.Module):
    """Norm, activation, convolution, twice; the skip is always a 1x1 convolution. It reads no embedding."""

    channels: int
    dropout: float
    style: Style
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, channels]."""
        act = layers.activation(self.style.activation)
        h = act(self.style.norm("norm1")(x)).astype(self.dtype)
        h = constrain(layers.conv(self.channels, dtype=self.dtype, name="conv1")(constrain(h)))
        h = act(self.style.norm("norm2")(h)).astype(self.dtype)
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = layers.conv(self.channels, dtype=self.dtype, name="conv2", zero=True)(constrain(h))
        return constrain(h + constrain(layers.conv(self.channels, 1, dtype=self.dtype, name="skip")(x)))


class EfficientUNet(nn.Module):
    """Takes the place of `unet.UNet`: its arguments.

    `scale_shift` has no effect: embeddings are added, once a level.
    """

    out_channels: int
    channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: tuple[int, ...] = ()
    head_dim: int = 64
    num_heads: int = 8
    dropout: float = 0.0
    scale_shift: bool = False
    remat: bool | str = False
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

        A level attends where its blocks run at a side in `attention_resolutions`, for pictures of side
        `image_size`. Raises ValueError when H or W cannot be halved once a level.
        """
        levels, style = len(self.channel_mult), self.style
        widths = [int(self.channels * mult) for mult in self.channel_mult]
        check_sides(x, levels, levels)
        blocks = self.num_res_blocks
        blocks = (blocks,) * levels if isinstance(blocks, int) else blocks
        if len(blocks) != levels or known is not None:
            raise ValueError("num_res_blocks must have a number for each level; inpaint is not built")
        res_block = layers.remat(PlainResBlock, self.remat, static_argnums=(2,))
        attention_block = layers.remat(AttentionBlock, self.remat)
        act = layers.activation(style.activation)
        cond = act(emb.astype(self.dtype))

        def res(name, width, h):
            return res_block(width, self.dropout, style, self.dtype, name=name)(h, deterministic)

        def conditioned(name, h):
            return h + layers.Dense(h.shape[-1], dtype=self.dtype, name=name)(cond)[:, None, None]

        def attend(name, h, level):
            if image_size // 2 ** (level + 1) not in self.attention_resolutions:
                return h
            block = attention_block(self.head_dim, self.num_heads, style, self.dtype, name=name)
            return block(h, context, context_mask)

        h = layers.conv(widths[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        # Constrained, as in `vqvae`: XLA would compute wrong gradients on a mesh of fsdp and tensor.
        h = constrain(h)
        skips = []
        for level, width in enumerate(widths):
            h = constrain(layers.conv(width, stride=2, dtype=self.dtype, name=f"down_{level}_down")(h))
            h = conditioned(f"down_{level}_emb_proj", h)
            for j in range(blocks[level]):
                h = res(f"down_{level}_res_{j}", width, h)
                skips.append(h)
            h = attend(f"down_{level}_attn_0", h, level)
        for level, width in reversed(list(enumerate(widths))):
            h = conditioned(f"up_{level}_emb_proj", h)
            for j in range(blocks[level]):
                h = jnp.concatenate([h, skips.pop() * 2**-0.5], axis=-1)
                h = res(f"up_{level}_res_{j}", width, h)
            h = attend(f"up_{level}_attn_0", h, level)
            after = widths[max(level - 1, 0)]
            h = constrain(layers.conv(after, dtype=self.dtype, name=f"up_{level}_up")(layers.upsample(h)))

        h = act(style.norm("norm_out")(h)).astype(self.dtype)
        out = layers.conv(self.out_channels, dtype=self.dtype, name="conv_out", zero=True)
        return out(h).astype(jnp.float32)

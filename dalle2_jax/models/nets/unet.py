"""The ADM U-Net and the two denoisers made of it: the decoder's and the upsampler's.

Section 2 of the paper, with the architecture of ADM (arXiv 2105.05233) and the text pathway of GLIDE (arXiv
2112.10741).
A level is `num_res_blocks` residual blocks (attention behind each where the level's side is in
`attention_resolutions`), then a residual block that halves the side. The way up has one block more a level,
each fed [h, skip]. The timestep embedding, to which a stage adds its other conditions, sets scale and shift
of every block. Names of blocks are the interface of checkpoints, sharding rules and weight importers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.text import GlideTextTransformer
from dalle2_jax.models.nets.transformer import NullStates, TokenEmbedding, kept
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


class DecoderNet(nn.Module):
    """The decoder's denoiser: U-Net, GLIDE text transformer, and the two paths of the image embedding
    (section 2.1).

    `condition` runs once for a picture, `denoise` at every step. The null image embedding is a learned
    vector before the projections, so that the added and the token path are nulled together (trap 9); the
    null caption is the sequence without a real token, which the text transformer fills with its padding
    embedding. With an `embed_dim` of 0 there is no image embedding (GLIDE); with `num_classes` the network is
    told a class (ADM); without any of them it draws what it likes.

    With `text['states_width']` the caption is read from the states and the embedding of a frozen CLIP's text
    transformer instead (Karlo's way): the states are projected and attended to, the embedding, or a learned
    one in place of the null caption's, is added like the image's. `text['null_tokens']` is for NullStates.

    Embeddings are multiplied by `embed_scale`, which is to give their entries unit variance.
    """

    unet: dict
    text: dict | None
    embed_dim: int
    image_size: int
    num_image_tokens: int = 4
    inpaint: bool = False
    embed_scale: float = 1.0
    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        unet = dict(self.unet)
        channels = unet["channels"]
        self.net = UNet(**unet, dtype=self.dtype)
        self.time = TimeEmbedding(channels, self.dtype)
        self.token_width = self.text["width"] if self.text else 4 * channels
        if self.embed_dim:
            self.image_emb_proj = layers.Dense(4 * channels, dtype=self.dtype)
            self.image_token_proj = layers.Dense(self.num_image_tokens * self.token_width, dtype=self.dtype)
            self.null_image_embed = self.param(
                "null_image_embed", layers.normal(0.02), (self.embed_dim,), jnp.float32
            )
        if self.num_classes:
            self.label_embed = TokenEmbedding(self.num_classes, 4 * channels, self.dtype)
        if self.text:
            self.text_emb_proj = layers.Dense(4 * channels, dtype=self.dtype)
        if self.text and self.reads_states:
            self.text_states_proj = layers.Dense(self.token_width, dtype=self.dtype)
            self.text_states_norm = layers.LayerNorm()
            self.null_text_states = NullStates(self.text.get("null_tokens", 0), self.text["states_width"])
            self.null_text_embed = self.param(
                "null_text_embed", layers.normal(0.02), (self.embed_dim,), jnp.float32
            )
        elif self.text:
            self.text_net = GlideTextTransformer(**self.text, dtype=self.dtype)

    @property
    def reads_states(self) -> bool:
        """Whether captions are a frozen CLIP's states and not tokens."""
        return bool(self.text and self.text.get("states_width"))

    def condition(
        self,
        image_embed=None,
        drop_image=None,
        text=None,
        token_mask=None,
        drop_text=None,
        text_embed=None,
        label=None,
    ):
        """The condition of a batch: (added embedding [B, 4C], context [B, K, D], mask [B, K] bool), each None
        where there is none.

        image_embed [B, E], drop_image [B] bool, text: tokens [B, L], or states [B, L, W] with
        text_embed [B, E]; token_mask [B, L], drop_text [B] bool, label [B] int32, -1 for no class. What the
        network does not read is left out.
        """
        emb, context, mask = None, None, None
        if self.embed_dim:
            z = jnp.where(drop_image[:, None], self.null_image_embed, image_embed * self.embed_scale)
            emb = self.image_emb_proj(z)
            context = self.image_token_proj(z).reshape(z.shape[0], self.num_image_tokens, self.token_width)
        if self.num_classes:
            emb = _sum(emb, _of_labels(self.label_embed, label))
        if self.reads_states:
            null_embed = kept(self.null_text_embed, self.text.get("null_tokens", 0))
            y = jnp.where(drop_text[:, None], null_embed, text_embed * self.embed_scale)
            text, token_mask = self.null_text_states(text, token_mask, drop_text)
            states = self.text_states_norm(self.text_states_proj(text)).astype(self.dtype)
            mask = jnp.concatenate([jnp.ones(context.shape[:2], bool), token_mask], axis=1)
            emb, context = emb + self.text_emb_proj(y), jnp.concatenate([context, states], axis=1)
        elif self.text:
            states = self.text_net(text, token_mask & ~drop_text[:, None])
            emb = _sum(emb, self.text_emb_proj(states[:, -1]))
            context = states if context is None else jnp.concatenate([context, states], axis=1)
        return emb, context, mask

    def denoise(self, x_t, t, condition, known=None, *, deterministic=True):
        """x_t [B, H, W, C_in], t [B], condition from `condition` -> the network's output [B, H, W, C_out].

        known [B, H, W, 4], for a network with `inpaint`: the pixels that are kept, zero elsewhere, and 1
        where they are; None where nothing is.
        """
        emb, context, context_mask = condition
        return self.net(
            x_t,
            _sum(self.time(t), emb),
            context,
            context_mask,
            image_size=self.image_size,
            deterministic=deterministic,
            known=_known(self, x_t, known),
        )

    def __call__(
        self,
        x_t,
        t,
        image_embed=None,
        drop_image=None,
        text=None,
        token_mask=None,
        drop_text=None,
        text_embed=None,
        known=None,
        deterministic=True,
        label=None,
    ):
        """Both halves at once: what training uses."""
        condition = self.condition(image_embed, drop_image, text, token_mask, drop_text, text_embed, label)
        return self.denoise(x_t, t, condition, known, deterministic=deterministic)


class UpsamplerNet(nn.Module):
    """An upsampler's denoiser: an ADM U-Net that sees [x_t, upsampled low_res] in its channels.

    The paper's has neither attention nor conditions. GLIDE's attends to the caption, by a text transformer of
    its own, ADM's is told the class.
    """

    unet: dict
    image_size: int
    text: dict | None = None
    num_classes: int = 0
    inpaint: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        unet = dict(self.unet)
        channels = unet["channels"]
        self.net = UNet(**unet, dtype=self.dtype)
        self.time = TimeEmbedding(channels, self.dtype)
        self.low_res_time = TimeEmbedding(channels, self.dtype)
        if self.num_classes:
            self.label_embed = TokenEmbedding(self.num_classes, 4 * channels, self.dtype)
        if self.text:
            self.text_emb_proj = layers.Dense(4 * channels, dtype=self.dtype)
            self.text_net = GlideTextTransformer(**self.text, dtype=self.dtype)

    def condition(self, text=None, token_mask=None, label=None):
        """(added embedding [B, 4C], context [B, K, D]), each None where there is none.

        text, tokens [B, L], and token_mask [B, L]; label [B] int32, -1 for no class; for networks that read
        them.
        """
        emb, context = None, None
        if self.num_classes:
            emb = _of_labels(self.label_embed, label)
        if self.text:
            context = self.text_net(text, token_mask)
            emb = _sum(emb, self.text_emb_proj(context[:, -1]))
        return emb, context

    def denoise(
        self, x_t, t, low_res_up, low_res_t=None, condition=(None, None), known=None, *, deterministic=True
    ):
        """x_t and low_res_up [B, H, W, 3], t [B], condition from `condition` -> [B, H, W, C_out].

        low_res_t [B] is the time up to which the small picture is noised, for a network that is told. known:
        as in DecoderNet.
        """
        emb, context = condition
        emb = _sum(self.time(t), emb)
        if low_res_t is not None:
            emb = emb + self.low_res_time(low_res_t)
        return self.net(
            jnp.concatenate([x_t, low_res_up], axis=-1),
            emb,
            context,
            image_size=self.image_size,
            deterministic=deterministic,
            known=_known(self, x_t, known),
        )

    def __call__(
        self,
        x_t,
        t,
        low_res_up,
        low_res_t=None,
        text=None,
        token_mask=None,
        label=None,
        known=None,
        deterministic=True,
    ):
        """Both halves at once: what training uses."""
        condition = self.condition(text, token_mask, label)
        return self.denoise(x_t, t, low_res_up, low_res_t, condition, known, deterministic=deterministic)


def _of_labels(embedding: TokenEmbedding, label: jax.Array) -> jax.Array:
    """label [B] int32 -> its rows [B, 4C]; 0 for -1, which is no class."""
    return jnp.where(label[:, None] < 0, 0, embedding(jnp.maximum(label, 0)))


def _sum(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
    """The sum of two, either of which may be None."""
    return second if first is None else first if second is None else first + second


def _known(net: nn.Module, x_t: jax.Array, known: jax.Array | None) -> jax.Array | None:
    """What a denoiser is shown of a picture that is kept; zeros where it looks and nothing is."""
    if net.inpaint and known is None:
        return jnp.zeros((*x_t.shape[:3], 4))
    return known if net.inpaint else None


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

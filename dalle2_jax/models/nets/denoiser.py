"""The denoiser of every picture stage: a U-Net or a transformer, with the layers of its conditions.

Section 2 of the paper, with the text pathway of GLIDE (arXiv 2112.10741). `condition` embeds what stays the
same at every step (image embedding, class, caption) and runs once a picture; `denoise` runs at every step.
Names of layers are the interface of checkpoints, sharding rules and weight importers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.efficient_unet import EfficientUNet
from dalle2_jax.models.nets.text import GlideTextTransformer, TextPool
from dalle2_jax.models.nets.transformer import NullStates, TokenEmbedding, kept
from dalle2_jax.models.nets.unet import Style, TimeEmbedding, UNet
from dalle2_jax.models.nets.vit import TIME_WIDTH, PixelViT


class Conditioning(NamedTuple):
    """The embedded conditions of a batch, None where there is none.

    Attributes:
      emb: [B, E], the pooled conditions, added to the timestep embedding.
      context: [B, K, D], tokens whose keys and values every attention layer reads.
      mask: [B, K] bool, True = attend; None attends to all of the context.
    """

    emb: jax.Array | None = None
    context: jax.Array | None = None
    mask: jax.Array | None = None


class DenoiserNet(nn.Module):
    """A U-Net or a transformer with the layers of its conditions, all of which may be absent.

    body: keywords of `UNet` (of `EfficientUNet`, where the style is efficient); with kind='vit' those of
    `PixelViT`, and time_scale, the factor of the time.

    - embed_dim: a CLIP image embedding (section 2.1), projected twice: added to the timestep embedding, and
      to `num_image_tokens` context tokens. The null embedding is a learned vector before the projections, so
      that both paths are nulled together (trap 9). Embeddings are multiplied by `embed_scale`, which gives
      their entries unit variance.
    - num_classes: a class (ADM), a row added to the timestep embedding; no class adds nothing.
    - text: a caption, read by GLIDE's text transformer. The null caption has no real token, and the
      transformer fills it with its padding embedding. With text['states_width'] the caption is the states and
      the embedding of a frozen CLIP's text transformer (Karlo): the states are projected and attended to, the
      embedding, or a learned null one, is added like the image's. text['null_tokens'] is for NullStates.
      Without embed_dim the states are those of a frozen T5 (Imagen): they are projected and attended to, and
      pooled by text['pool_heads'] heads. The null caption is zeros, all of which are read.
    - inpaint: known pixels, in further channels of input.
    - The small picture of an upsampler, in further channels of input, and the level of its noise.
    """

    body: dict
    image_size: int
    text: dict | None = None
    embed_dim: int = 0
    num_image_tokens: int = 4
    embed_scale: float = 1.0
    num_classes: int = 0
    inpaint: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        body = dict(self.body)
        if self.is_vit:
            del body["kind"]
            net, channels = PixelViT, TIME_WIDTH
            style = Style(emb_dim=body["width"], time_scale=body.pop("time_scale", 1.0))
        else:
            channels, style = body["channels"], body.get("style", Style())
            net = EfficientUNet if style.efficient else UNet
        self.net = net(**body, dtype=self.dtype)
        self.time = TimeEmbedding(channels, style, self.dtype)
        self.low_res_time = TimeEmbedding(channels, style, self.dtype)  # without parameters unless it is used
        emb_dim = style.emb_dim or 4 * channels
        self.token_width = self.text["width"] if self.text else emb_dim
        if self.embed_dim:
            self.image_emb_proj = layers.Dense(emb_dim, dtype=self.dtype)
            self.image_token_proj = layers.Dense(self.num_image_tokens * self.token_width, dtype=self.dtype)
            self.null_image_embed = self.param(
                "null_image_embed", layers.normal(0.02), (self.embed_dim,), jnp.float32
            )
        if self.num_classes:
            self.label_embed = TokenEmbedding(self.num_classes, emb_dim, self.dtype)
        if self.reads_t5:
            self.text_states_proj = layers.Dense(self.token_width, dtype=self.dtype)
            self.text_pool = TextPool(self.text["pool_heads"], emb_dim, self.dtype)
            return
        if self.text:
            self.text_emb_proj = layers.Dense(emb_dim, dtype=self.dtype)
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
    def is_vit(self) -> bool:
        """Whether the body is a transformer."""
        return self.body.get("kind") == "vit"

    @property
    def reads_t5(self) -> bool:
        """Whether captions are the states of a text encoder without an embedding, such as T5."""
        return self.reads_states and not self.embed_dim

    @property
    def reads_states(self) -> bool:
        """Whether captions are a frozen encoder's states and not tokens."""
        return bool(self.text and self.text.get("states_width"))

    def condition(
        self,
        image_embed: jax.Array | None = None,
        drop_image: jax.Array | None = None,
        text: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        drop_text: jax.Array | None = None,
        text_embed: jax.Array | None = None,
        label: jax.Array | None = None,
    ) -> Conditioning:
        """The embedded conditions of a batch.

        image_embed [B, E], text: tokens [B, L], or states [B, L, W] with text_embed [B, E]; token_mask
        [B, L], label [B] int32, -1 for no class. drop_image, drop_text [B] bool: which are replaced by the
        null. Leave out what the network does not read.
        """
        emb, context, mask = None, None, None
        if self.embed_dim:
            assert image_embed is not None and drop_image is not None
            z = jnp.where(drop_image[:, None], self.null_image_embed, image_embed * self.embed_scale)
            emb = self.image_emb_proj(z)
            context = self.image_token_proj(z).reshape(z.shape[0], self.num_image_tokens, self.token_width)
        if self.num_classes:
            assert label is not None
            row = self.label_embed(jnp.maximum(label, 0))  # [B, 4C]
            emb = _sum(emb, jnp.where(label[:, None] < 0, 0, row))
        if self.reads_t5:
            assert text is not None and token_mask is not None and drop_text is not None
            drop = drop_text[:, None]  # [B, 1]
            states, mask = jnp.where(drop[..., None], 0, text), token_mask | drop
            emb, context = _sum(emb, self.text_pool(states, mask)), self.text_states_proj(states)
        elif self.text and self.reads_states:
            assert text is not None and token_mask is not None and drop_text is not None
            assert text_embed is not None and context is not None  # it reads image embeddings, too
            null_embed = kept(self.null_text_embed, self.text.get("null_tokens", 0))
            y = jnp.where(drop_text[:, None], null_embed, text_embed * self.embed_scale)
            text, token_mask = self.null_text_states(text, token_mask, drop_text)
            states = self.text_states_norm(self.text_states_proj(text)).astype(self.dtype)
            # The image's tokens are never masked with the caption's.
            mask = jnp.concatenate([jnp.ones(context.shape[:2], bool), token_mask], axis=1)
            emb, context = emb + self.text_emb_proj(y), jnp.concatenate([context, states], axis=1)
        elif self.text:
            assert text is not None and token_mask is not None and drop_text is not None
            states = self.text_net(text, token_mask & ~drop_text[:, None])
            emb = _sum(emb, self.text_emb_proj(states[:, -1]))
            context = states if context is None else jnp.concatenate([context, states], axis=1)
        return Conditioning(emb, context, mask)

    def denoise(
        self,
        x_t: jax.Array,
        t: jax.Array,
        conditioning: Conditioning,
        low_res_up: jax.Array | None = None,
        low_res_t: jax.Array | None = None,
        known: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """x_t [B, H, W, 3], t [B], conditioning from `condition` -> the network's output [B, H, W, C_out].

        low_res_up [B, H, W, 3]: an upsampler's small picture, enlarged. low_res_t [B]: the time up to which
        it is noised, for a network that was trained with this noise. known [B, H, W, 4], for a network with
        `inpaint`: the known pixels, 0 elsewhere, and 1 where they are; None: nothing is known.
        """
        emb = _sum(self.time(t), conditioning.emb)
        if low_res_t is not None:
            emb = emb + self.low_res_time(low_res_t)
        if self.inpaint and known is None:
            known = jnp.zeros((*x_t.shape[:3], 4))
        # the U-Net's levels with attention go by the side, the transformer's tokens take pooled conditions
        further = {"pooled": conditioning.emb} if self.is_vit else {"image_size": self.image_size}
        return self.net(
            x_t if low_res_up is None else jnp.concatenate([x_t, low_res_up], axis=-1),
            emb,
            conditioning.context,
            conditioning.mask,
            deterministic=deterministic,
            known=known if self.inpaint else None,
            **further,
        )

    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        conditions: dict[str, jax.Array] | None = None,
        low_res_up: jax.Array | None = None,
        low_res_t: jax.Array | None = None,
        known: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Both halves at once, for training; conditions: keywords of `condition`."""
        conditioning = self.condition(**conditions or {})
        return self.denoise(x_t, t, conditioning, low_res_up, low_res_t, known, deterministic=deterministic)


def _sum(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
    """The sum of two, either of which may be None."""
    return second if first is None else first if second is None else first + second

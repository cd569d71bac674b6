"""The decoder: CLIP image embedding and caption -> base picture (section 2.1 of the paper).

A GLIDE-shaped diffusion model. The image embedding is projected and added to the timestep embedding, and
projected to four tokens in front of the text transformer's outputs, which every attention layer reads. In
training the image embedding is dropped with probability 0.1 and the caption, independently, with 0.5;
classifier-free guidance drops both.

A transformer may take the U-Net's place (`net` with kind='vit').

The same stage is a generator without image embeddings: of captions alone (GLIDE), of classes (ADM), or of
nothing at all.
"""

import jax.numpy as jnp

from dalle2_jax.models.nets.denoiser import DenoiserNet
from dalle2_jax.models.stages import check_settings
from dalle2_jax.models.stages.building import body_and_process, check_side, checked_states
from dalle2_jax.models.stages.conditions import TOKEN_TEXT, TOKEN_TEXT_OPTIONAL, Caption, ClipImage, Label
from dalle2_jax.models.stages.diffusion import DiffusionStage
from dalle2_jax.models.stages.settings import ETA, GUIDANCE, METHOD, SPACING, STEPS, THRESHOLD

SETTINGS = (*GUIDANCE, STEPS, METHOD, ETA, SPACING, THRESHOLD)


def build(
    *,
    image_size: int = 64,
    embed_dim: int = 1024,
    channels: int = 512,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int | tuple[int, ...] = 3,
    attention_resolutions: tuple[int, ...] = (32, 16, 8),
    head_dim: int = 64,
    num_heads: int = 0,
    dropout: float = 0.1,
    scale_shift: bool = True,
    num_image_tokens: int = 4,
    embed_scale: float | None = None,
    text: dict | None = None,
    num_classes: int = 0,
    image_drop: float = 0.1,
    text_drop: float = 0.5,
    label_drop: float = 0.0,
    joint_drop: float = 0.0,
    schedule: str = "cosine",
    num_timesteps: int = 1000,
    objective: str = "eps",
    learned_variance: bool = True,
    weighting: str = "uniform",
    loss: str = "hybrid",
    num_steps: int = 250,
    spacing: str = "uniform",
    method: str = "ddpm",
    eta: float = 0.0,
    guidance_scale: float = 3.0,
    threshold: float | None = None,
    inpaint: bool = False,
    process: dict | None = None,
    net: dict | None = None,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> DiffusionStage:
    """The decoder of a config, Table 3's by default; ValueError for settings that cannot go together.

    text: keywords of GlideTextTransformer; None reads no captions; dict(states_width, context_length, width,
    null_tokens=0) reads the states of a frozen CLIP's text transformer (Karlo), and without embed_dim
    dict(states_width, context_length, width, pool_heads) those of a frozen T5 (Imagen). embed_dim: 0 reads no
    image embeddings. embed_scale: factor of embeddings; None is sqrt(embed_dim), for those of unit norm.
    num_classes: 0 reads no class. image_drop, text_drop, label_drop: how often each is dropped by itself;
    joint_drop: how often all of them are, the null of guidance. num_heads: of every attention, in the place
    of head_dim. guidance_scale: 1 where nothing is ever dropped. weighting ('uniform', 'p2', 'min_snr',
    'min_snr:G', 'snr:Y,F,G', 'p2:Y', 'v', 'flow'), loss ('hybrid', 'vlb'): see `diffusion.weights`,
    `.process`. threshold: percentile of dynamic thresholding, None to clip. inpaint: the network also gets
    unmasked pixels, with random masks in training (GLIDE; `init_from` a decoder without). process: `PROCESS`,
    see `diffusion.gaussian`. net: `unet.Style`, or kind='vit' with the fields of `vit.PixelViT`.
    """
    body, diffusion = body_and_process(build, locals())
    check_side(body, "image_size", image_size)
    text = _checked_text(text, embed_dim)
    conditions: tuple[ClipImage | Label | Caption, ...] = ()
    if embed_dim:
        conditions += (ClipImage(embed_dim, image_drop),)
    if num_classes:
        conditions += (Label(num_classes, label_drop),)
    conditions += (Caption.of(text, text_drop, embed_dim),) if text else ()
    return DiffusionStage(
        net=DenoiserNet(
            body=body,
            text=text if not text or text.get("states_width") else text | {"remat": remat},
            embed_dim=embed_dim,
            image_size=image_size,
            num_image_tokens=num_image_tokens,
            inpaint=inpaint,
            embed_scale=embed_dim**0.5 if embed_scale is None else embed_scale,
            num_classes=num_classes,
            dtype=jnp.dtype(dtype),
        ),
        diffusion=diffusion,
        image_size=image_size,
        conditions=conditions,
        joint_drop=joint_drop,
        guidance_scale=guidance_scale if embed_dim or text or label_drop or joint_drop else 1.0,
        inpaint=inpaint,
    )


def _checked_text(text: dict | None, embed_dim: int) -> dict | None:
    """The settings of `text`; ValueError for those that cannot work."""
    if not text:
        return None
    if text.get("states_width"):
        return checked_states(text, embed_dim)
    check_settings(text, TOKEN_TEXT, (*TOKEN_TEXT_OPTIONAL, "states_width"), "text")
    return {name: value for name, value in text.items() if name != "states_width"}

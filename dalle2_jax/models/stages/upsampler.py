"""The upsamplers: picture -> picture of four times the side (section 2.1 of the paper).

An ADM U-Net without attention and without text sees the noised picture beside the upsampled small one. It is
trained on crops of a quarter of the side. The small picture always arrives whole and is enlarged here, in
training as in sampling, and then cropped with the window of the target: enlarging a crop would differ at its
border (trap 17).

Options: noise-conditioning augmentation (Ho et al. 2021, section 4.2), for which the small picture is noised
up to a random time, which the network reads; and sampling in tiles, for pictures whose feature maps do not
fit at once: every step runs the network on overlapping windows of a training crop's size and blends its
outputs.

A transformer may take the U-Net's place (`net` with kind='vit').

The paper's upsamplers read no captions. GLIDE's has a text transformer of its own, and its network for
inpainting reads the unmasked pixels; ADM's reads a class; Imagen's read the states of a frozen T5. Captions
and classes that training drops can be guided.

With `last_step` a second network of the same shape takes the last step of sampling. Karlo's authors trained
theirs against a discriminator; training here leaves it as it is.
"""

import jax.numpy as jnp

from dalle2_jax.models.nets.denoiser import DenoiserNet
from dalle2_jax.models.stages import check_settings
from dalle2_jax.models.stages.building import body_and_process, check_side, checked_states
from dalle2_jax.models.stages.conditions import TOKEN_TEXT, TOKEN_TEXT_OPTIONAL, Caption, Label, LowRes
from dalle2_jax.models.stages.diffusion import DiffusionStage
from dalle2_jax.models.stages.settings import ETA, GUIDANCE, METHOD, STEPS, THRESHOLD, TILE

SETTINGS = (*GUIDANCE, STEPS, METHOD, ETA, THRESHOLD, TILE)


def build(
    *,
    image_size: int = 256,
    low_res_size: int = 64,
    crop_size: int | None = None,
    channels: int = 320,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int | tuple[int, ...] = 3,
    attention_resolutions: tuple[int, ...] = (),
    head_dim: int = 64,
    num_heads: int = 0,
    dropout: float = 0.1,
    scale_shift: bool = True,
    text: dict | None = None,
    num_classes: int = 0,
    text_drop: float = 0.0,
    label_drop: float = 0.0,
    joint_drop: float = 0.0,
    guidance_scale: float = 1.0,
    threshold: float | None = None,
    resize: str = "cubic",
    schedule: str = "cosine",
    num_timesteps: int = 1000,
    objective: str = "eps",
    learned_variance: bool = False,
    weighting: str = "uniform",
    num_steps: int = 27,
    spacing: str = "uniform",
    method: str = "ddim",
    eta: float = 0.0,
    low_res_noise: float = 0.0,
    low_res_level: float = 0.0,
    noise_enlarged: bool = False,
    tile: int | None = None,
    last_step: bool = False,
    inpaint: bool = False,
    process: dict | None = None,
    net: dict | None = None,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> DiffusionStage:
    """The upsampler of a config, by default Table 3's 64 -> 256; ValueError for sizes that do not fit.

    crop_size: None is a quarter of the side. low_res_noise: the share of the times up to which training
    noises the small picture (0: never); low_res_level: the share at which sampling does; noise_enlarged: see
    `LowRes`. tile: see `diffusion.in_tiles`. last_step: a second network, parameters 'last', takes the last
    step. text_drop, label_drop, joint_drop: how often training drops them; without it there is no guidance.
    attention_resolutions (sides of the full picture), head_dim, num_heads, text, num_classes, threshold,
    inpaint, process and net: see `decoder.build`.
    """
    body, diffusion = body_and_process(build, locals())
    crop_size = crop_size or image_size // 4
    _check_sizes(body, image_size, low_res_size, crop_size)
    noised = low_res_noise, low_res_level, noise_enlarged
    _check_level(low_res_level, low_res_noise)
    text = _checked_text(text, body, remat)
    conditions: tuple[Label | Caption, ...] = (Label(num_classes, label_drop),) if num_classes else ()
    conditions += (Caption.of(text, text_drop),) if text else ()
    _check_guidance(guidance_scale, (joint_drop, *(condition.drop for condition in conditions)))
    return DiffusionStage(
        net=DenoiserNet(
            body=body,
            image_size=image_size,
            text=text,
            num_classes=num_classes,
            inpaint=inpaint,
            dtype=jnp.dtype(dtype),
        ),
        diffusion=diffusion,
        image_size=image_size,
        conditions=conditions,
        joint_drop=joint_drop,
        low_res=LowRes(low_res_size, image_size // low_res_size, resize, *noised),
        crop_size=crop_size,
        guidance_scale=guidance_scale,
        inpaint=inpaint,
        tile=tile,
        last_step=last_step,
    )


def _checked_text(text: dict | None, body: dict, remat: bool | str) -> dict | None:
    """The settings of `text` as the network takes them; ValueError for those that cannot work."""
    if not text:
        return None
    if not text.get("states_width"):
        check_settings(text, TOKEN_TEXT, TOKEN_TEXT_OPTIONAL, "text")
    if body.get("kind") != "vit" and not body["attention_resolutions"]:
        raise ValueError("text is read by attention layers: set attention_resolutions, or leave text out")
    return checked_states(text) if text.get("states_width") else dict(text, remat=remat)


def _check_guidance(scale: float, drops: tuple[float, ...]) -> None:
    """Raise ValueError for guidance away from a null that training never sees."""
    if scale != 1 and not any(drops):
        raise ValueError(f"guidance_scale {scale} needs a null: set text_drop or label_drop, such as 0.1")


def _check_level(level: float, noise: float) -> None:
    """Raise ValueError for a level that training never noises the small picture to."""
    if not 0 <= level <= noise <= 1:
        raise ValueError(f"low_res_level {level} must be in 0 .. low_res_noise = {noise}, that at most 1")


def _check_sizes(body: dict, image_size: int, low_res_size: int, crop_size: int) -> None:
    """Raise ValueError for sides that do not fit together, or that the network cannot work on."""
    check_side(body, "crop_size", crop_size)
    if image_size % low_res_size:
        raise ValueError(f"image_size {image_size} must be a multiple of low_res_size {low_res_size}")
    if crop_size > image_size:
        raise ValueError(f"crop_size {crop_size} must be at most image_size {image_size}")

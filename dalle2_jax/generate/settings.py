"""What each stage samples with: the model's own settings, and what a caller asked for instead.

`SETTINGS` is the one list of what may be asked for: keywords of `UnCLIP.text_to_image`, flags of commands.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dalle2_jax.generate.cascade import GUIDES, Cascade
from dalle2_jax.models.diffusion.guidance import times_inside
from dalle2_jax.models.diffusion.sampling import METHODS
from dalle2_jax.models.diffusion.schedules import SPACINGS
from dalle2_jax.runtime.names import nearest


@dataclasses.dataclass(frozen=True)
class Setting:
    """One thing to ask for.

    Attributes:
      role: 'prior', 'decoder' or 'upsampler', for all of them.
      name: what the stage's `sample` calls it.
      kind: int, float, str, list (whole numbers, one an upsampler), tuple (two numbers), or the texts to
        choose from.
      help: one line.
    """

    role: str
    name: str
    kind: type | tuple[str, ...]
    help: str


_INTERVAL = "LO,HI, the noise levels sqrt((1 - abar)/abar) between which to guide, such as 0.2,3:"

SETTINGS = {
    "guidance_scale": Setting("decoder", "guidance_scale", float, "Guidance of the decoder; 1 is none."),
    "guidance_interval": Setting("decoder", "guidance_interval", tuple, f"{_INTERVAL} of the decoder."),
    "decoder_steps": Setting("decoder", "num_steps", int, "Steps of the decoder."),
    "method": Setting("decoder", "method", METHODS, "Sampler of the decoder."),
    "eta": Setting("decoder", "eta", float, "Noise of DDIM in the decoder, 0 (none) to 1."),
    "spacing": Setting("decoder", "spacing", str, f"The decoder's choice of times: {', '.join(SPACINGS)}."),
    "threshold": Setting("decoder", "threshold", float, "Percentile of dynamic thresholding, such as 99.5."),
    "noisy_clip": Setting("decoder", "noisy_clip", float, "How strongly a CLIP of noised pictures steers."),
    "classifier": Setting("decoder", "classifier", float, "How strongly the model's classifier steers."),
    "prior_guidance_scale": Setting("prior", "guidance_scale", float, "Guidance of the prior; 1 is none."),
    "prior_guidance_interval": Setting("prior", "guidance_interval", tuple, f"{_INTERVAL} of the prior."),
    "prior_steps": Setting("prior", "num_steps", int, "Steps of a diffusion prior."),
    "prior_method": Setting("prior", "method", METHODS, "Sampler of a diffusion prior."),
    "prior_eta": Setting("prior", "eta", float, "Noise of DDIM in a diffusion prior, 0 to 1."),
    "prior_candidates": Setting("prior", "num_candidates", int, "Embeddings drawn; the closest is kept."),
    "prior_temperature": Setting("prior", "temperature", float, "Temperature of an autoregressive prior."),
    "prior_dot_quantile": Setting(
        "prior", "dot_quantile", float, "An autoregressive prior draws the dot product from above this share."
    ),
    "upsampler_steps": Setting("upsampler", "num_steps", list, "Steps of the upsamplers, such as 27,15."),
    "upsampler_method": Setting("upsampler", "method", METHODS, "Sampler of the upsamplers."),
    "upsampler_eta": Setting("upsampler", "eta", float, "Noise of DDIM in the upsamplers, 0 to 1."),
    "tile": Setting("upsampler", "tile", int, "Upsamplers draw larger pictures in windows of this side."),
}


def split(asked: dict) -> dict[str, dict]:
    """role -> {name of the stage's own: value} of keywords in `SETTINGS`; what is None is left out."""
    roles = {"prior": {}, "decoder": {}, "upsampler": {}}
    for name, value in asked.items():
        if name not in SETTINGS:
            near = nearest(name, SETTINGS)
            hint = f"; did you mean {near}?" if near else f": choose from {', '.join(SETTINGS)}"
            raise ValueError(f"{name!r} is no setting of sampling{hint}")
        if value is not None:
            roles[SETTINGS[name].role][SETTINGS[name].name] = value
    return roles


def resolve(cascade: Cascade, **asked) -> dict[str, dict]:
    """stage -> what it samples with for these keywords, names of `SETTINGS`; None is the model's own.

    Raises ValueError for what there is no setting for, and for what the model cannot do.
    """
    roles = split(asked)
    names = ("prior", "decoder") if cascade.reads_embeds or roles["prior"] else ("decoder",)
    settings = {name: of_stage(cascade, name, **roles[name]) for name in names}
    return settings | of_upsamplers(cascade, **roles["upsampler"])


def of_upsamplers(cascade: Cascade, *, num_steps: Sequence[int] | None = None, **own) -> dict[str, dict]:
    """upsampler -> what it samples with; `num_steps` has one number an upsampler, `own` is for all."""
    names = cascade.upsamplers
    if num_steps is not None and len(num_steps) != len(names):
        raise ValueError(
            f"upsampler_steps has {len(num_steps)} numbers, model {cascade.name!r} has "
            f"{len(names)} upsampler(s): give one a stage"
        )
    steps = num_steps or [None] * len(names)
    return {name: of_stage(cascade, name, num_steps=n, **own) for name, n in zip(names, steps, strict=True)}


def of_stage(cascade: Cascade, name: str, **own) -> dict:
    """What stage `name` samples with for these keywords of its `sample` and guides' scales; None is its own.

    Raises ValueError for what the stage cannot do.
    """
    stage = cascade.stage(name)
    asked = {setting: value for setting, value in own.items() if value is not None}
    settings = dict(stage.sampling)
    guides = _guides(cascade, {guide: asked.pop(guide) for guide in GUIDES if guide in asked})
    for setting, value in asked.items():
        if setting not in settings:
            kind = cascade.configs[name]["stage"]
            raise ValueError(
                f"{name}: {setting} has no meaning for a stage {kind!r}, which has {', '.join(settings)}"
            )
        settings[setting] = value
    if "guidance_scale" in settings:
        settings["guidance_scale"] = float(settings["guidance_scale"])
    if settings.get("guidance_interval") is None:
        settings.pop("guidance_interval", None)  # reports and plans of drawing name it only where it is used
    else:
        settings["guidance_interval"] = tuple(float(level) for level in settings["guidance_interval"])
    if "method" in settings:
        _check_method(cascade, name, settings["method"], asked.get("eta"))
    _check_ranges(cascade, name, settings)
    try:
        if asked.keys() & {"spacing", "threshold"}:
            names = ("num_steps", "spacing", "threshold")
            stage.diffusion.with_settings(**{name: settings[name] for name in names}).timesteps()
        if "guidance_interval" in settings:
            times_inside(stage.diffusion.schedule, settings["guidance_interval"])
        if "tile" in asked:
            stage.check_tile(asked["tile"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return settings | guides


def _check_method(cascade: Cascade, name: str, method: str, eta: float | None) -> None:
    """Raise ValueError for a sampler that the stage cannot use, or an eta that it has no use for."""
    if method not in METHODS:
        raise ValueError(f"{name}: method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"{name}: eta {eta} must lie in 0 .. 1")
    if eta is not None and method != "ddim":
        raise ValueError(
            f"{name}: eta {eta} has no meaning for method {method!r}: use 'ddim', or leave eta out"
        )
    if method == "analytic":
        eps_sq = cascade.params(name).get("stats", {}).get("eps_sq")
        if eps_sq is None or not np.isfinite(eps_sq).all():
            raise ValueError(
                f"{name}: method 'analytic' needs statistics that a prior with model.method='analytic' gets "
                "at each checkpoint, and this stage has none: choose another, or train it on by a step"
            )


def _guides(cascade: Cascade, scales: dict[str, float]) -> dict[str, float]:
    """The guides that are asked for and how strongly; ValueError for one that the model lacks."""
    guides = {guide: float(scale) for guide, scale in scales.items() if scale}
    for guide, scale in guides.items():
        cascade.stage(guide)  # names what the model has, if not this
        if not 0 < scale <= 10_000:
            raise ValueError(f"decoder: {guide} {scale} must lie in 0 .. 10000; 0 is none")
    return guides


def _check_ranges(cascade: Cascade, name: str, values: dict) -> None:
    """Raise ValueError for a number that stage `name` cannot sample with."""
    stage = cascade.stage(name)
    if "num_steps" in values:
        most = stage.diffusion.schedule.num_timesteps
        if not 1 <= values["num_steps"] <= most:
            raise ValueError(f"{name}: {values['num_steps']} steps are not possible; give 1 .. {most}")
    if values.get("num_candidates", 1) < 1:
        raise ValueError(f"{name}: {values['num_candidates']} candidates are not possible; give 1 or more")
    scale = values.get("guidance_scale", 1)
    if not 0 <= scale <= 100:
        raise ValueError(f"{name}: guidance_scale {scale} must lie in 0 .. 100; 1 is none, 2 to 5 are usual")
    if scale != 1 and not getattr(stage, "guidable", True):
        raise ValueError(
            f"{name}: guidance_scale {scale} has no meaning for a stage that was never trained without its "
            "condition: leave it out, or steer with a classifier"
        )
    if scale == 1 and "guidance_interval" in values:
        raise ValueError(
            f"{name}: guidance_interval has no meaning without guidance: give a guidance_scale other than 1"
        )
    if values.get("temperature", 1) <= 0:
        raise ValueError(f"{name}: temperature {values['temperature']} must be above 0")
    if not 0 <= values.get("dot_quantile", 0) < 1:
        raise ValueError(f"{name}: dot_quantile {values['dot_quantile']} must lie in 0 .. 1, below 1")

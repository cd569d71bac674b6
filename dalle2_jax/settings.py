"""What each stage samples with: the model's own settings, and what a caller asked for instead."""

from collections.abc import Sequence

from dalle2_jax.cascade import Cascade
from dalle2_jax.diffusion.sampling import METHODS


def check_method(method: str, eta: float | None) -> None:
    """Raise ValueError for an unknown sampler, or an eta that it has no use for."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must lie in 0 .. 1")
    if eta is not None and method != "ddim":
        raise ValueError(
            f"eta {eta} has no meaning for method {method!r}: use method 'ddim', or leave eta out"
        )


def resolve(
    cascade: Cascade,
    *,
    guidance_scale: float | None = None,
    prior_guidance_scale: float | None = None,
    prior_steps: int | None = None,
    prior_method: str | None = None,
    prior_candidates: int | None = None,
    decoder_steps: int | None = None,
    upsampler_steps: Sequence[int] | None = None,
    method: str | None = None,
    eta: float | None = None,
    noisy_clip: float | None = None,
    classifier: float | None = None,
) -> dict[str, dict]:
    """stage -> what it samples with for these arguments of `UnCLIP.text_to_image`; None is the model's own.

    Raises ValueError for what the model cannot do.
    """
    upsamplers = cascade.upsamplers
    if upsampler_steps is not None and len(upsampler_steps) != len(upsamplers):
        raise ValueError(
            f"upsampler_steps has {len(upsampler_steps)} numbers, model {cascade.name!r} has "
            f"{len(upsamplers)} upsampler(s): give one a stage"
        )
    asked = {
        "prior": dict(
            num_steps=prior_steps,
            guidance_scale=prior_guidance_scale,
            method=prior_method,
            num_candidates=prior_candidates,
        ),
        "decoder": dict(num_steps=decoder_steps, guidance_scale=guidance_scale, method=method, eta=eta),
    }
    for name, steps in zip(upsamplers, upsampler_steps or [None] * len(upsamplers), strict=True):
        asked[name] = dict(num_steps=steps)
    settings = {}
    for name, values in asked.items():
        settings[name] = dict(cascade.stage(name).sampling)
        for setting, value in values.items():
            if value is None:
                continue
            if setting not in settings[name]:
                raise ValueError(
                    f"{name}: {setting} has no meaning for a stage {cascade.configs[name]['stage']!r}, "
                    f"which has {', '.join(settings[name])}"
                )
            settings[name][setting] = value
        if name == "decoder":
            settings[name] |= _guides(cascade, noisy_clip=noisy_clip, classifier=classifier)
        if "guidance_scale" in settings[name]:
            settings[name]["guidance_scale"] = float(settings[name]["guidance_scale"])
        if "method" in settings[name]:
            check_method(settings[name]["method"], values.get("eta"))
    for name, values in settings.items():
        _check_ranges(cascade, name, values)
    return settings


def _guides(cascade: Cascade, **scales: float | None) -> dict[str, float]:
    """The guides that are asked for and how strongly; ValueError for one that the model lacks."""
    guides = {guide: float(scale) for guide, scale in scales.items() if scale}
    for guide, scale in guides.items():
        cascade.stage(guide)  # names what the model has, if not this
        if not 0 < scale <= 10_000:
            raise ValueError(f"decoder: {guide} {scale} must lie in 0 .. 10000; 0 is none")
    return guides


def _check_ranges(cascade: Cascade, name: str, values: dict) -> None:
    """Raise ValueError for a number that stage `name` cannot sample with."""
    if "num_steps" in values:
        most = cascade.stage(name).diffusion.schedule.num_timesteps
        if not 1 <= values["num_steps"] <= most:
            raise ValueError(f"{name}: {values['num_steps']} steps are not possible; give 1 .. {most}")
    if values.get("num_candidates", 1) < 1:
        raise ValueError(f"{name}: {values['num_candidates']} candidates are not possible; give 1 or more")
    scale = values.get("guidance_scale", 1)
    if not 0 <= scale <= 100:
        raise ValueError(f"{name}: guidance_scale {scale} must lie in 0 .. 100; 1 is none, 2 to 5 are usual")

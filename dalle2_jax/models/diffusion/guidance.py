"""What is wrapped around a denoiser before it is sampled: guidance, guides, clipping, inpainting.

A wrapper takes a denoiser(x_t [B, ...], t [B] int32) -> Prediction and returns one. Their order is visible
where they are applied: guide first, then clip, then keep the known pixels.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion.process import Denoiser, Network, Prediction, signal_and_sigma
from dalle2_jax.models.diffusion.schedules import Schedule


def guide(cond: Prediction, uncond: Prediction, scale: float | jax.Array) -> Prediction:
    """Classifier-free guidance, uncond + scale (cond - uncond); scale is a number or [B].

    1 is cond to the bit, the Python number 0 uncond. Only x0 and eps are guided. The variance fraction is the
    conditional one: extrapolating it leaves [0, 1].
    """
    if isinstance(scale, int | float) and scale == 0:
        return Prediction(uncond.x0, uncond.eps, cond.var_frac)  # cond - (cond - uncond) is rounded
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim:
        scale = scale.reshape(-1, *[1] * (cond.x0.ndim - 1))
    x0 = cond.x0 + (scale - 1.0) * (cond.x0 - uncond.x0)
    eps = cond.eps + (scale - 1.0) * (cond.eps - uncond.eps)
    return Prediction(x0, eps, cond.var_frac)


class Guidance(NamedTuple):
    """Classifier-free guidance of a network, see `guided`.

    To add a rule, add a field with the default None, apply it in `denoiser`, and declare the setting
    guidance_FIELD in `stages.settings.GUIDANCE`.

    Attributes:
      network: its batch of 2 B is `interleave(conditional, unconditional)`.
      scale: a number or [B]; 1 is the conditional prediction.
      interval: the noise levels LO, HI between which guidance applies, see `times_inside`; None: all.
    """

    network: Network
    scale: float | jax.Array
    interval: tuple[float, float] | None = None

    def denoiser(self, conditional: Denoiser, paired: Denoiser, schedule: Schedule) -> Denoiser:
        """The guided denoiser; `conditional` and `paired` as `guided` has them."""
        inside = None if self.interval is None else times_inside(schedule, self.interval)
        return guided(conditional, paired, self.scale, inside)


# The settings of sampling that switch a rule on -> None, which leaves it off.
NO_RULES = {f"guidance_{name}": None for name in Guidance._fields[2:]}


def pop_rules(settings: dict) -> dict:
    """Takes the settings of rules out of `settings`; returns them as keywords of `Guidance`."""
    return {name.removeprefix("guidance_"): settings.pop(name, None) for name in NO_RULES}


def check_rules(settings: Mapping, schedule: Schedule) -> None:
    """Raise ValueError for a rule that is none, or that nothing would use."""
    for name in NO_RULES:
        if settings.get(name) is not None and settings["guidance_scale"] == 1:
            raise ValueError(f"{name} has no meaning without guidance: give a guidance_scale other than 1")
    if settings.get("guidance_interval") is not None:
        times_inside(schedule, settings["guidance_interval"])


def guided(
    conditional: Denoiser,
    paired: Denoiser,
    scale: float | jax.Array,
    inside: np.ndarray | None = None,
) -> Denoiser:
    """One guided denoiser of a conditional one [B, ...] and a paired one.

    The batch of 2 B of the paired one is `interleave(conditional, unconditional)`. inside: bool [T], the
    times that are guided. At others the conditional denoiser runs alone, which is half the work.
    """

    def denoise(x_t, t):
        both = paired(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2))
        return guide(jax.tree.map(lambda y: y[0::2], both), jax.tree.map(lambda y: y[1::2], both), scale)

    if inside is None:
        return denoise
    # A sampler has all examples at one time, so t[0] decides for the batch.
    return lambda x_t, t: jax.lax.cond(jnp.asarray(inside)[t[0]], denoise, conditional, x_t, t)


def times_inside(schedule: Schedule, interval: tuple[float, float]) -> np.ndarray:
    """Whether LO < noise level <= HI, bool [T], for interval = (LO, HI).

    The noise level is sqrt((1 - alpha_bar) / alpha_bar) (Kynkaanniemi et al. 2024, arXiv 2404.07724). Raises
    ValueError unless 0 <= LO < HI, both finite.
    """
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] < np.inf:
        given = ",".join(f"{level:g}" for level in interval)
        raise ValueError(f"guidance_interval {given} must be two noise levels LO,HI with 0 <= LO < HI")
    low, high = interval
    return (schedule.noise_level > low) & (schedule.noise_level <= high)


def interleave(conditional: Any, unconditional: Any) -> Any:
    """Two trees of arrays [B, ...] as one of [2 B, ...]: c0, u0, c1, u1, ...

    Sharding over the batch does not part a pair.
    """
    return jax.tree.map(
        lambda c, u: jnp.stack([c, u], 1).reshape(-1, *c.shape[1:]), conditional, unconditional
    )


def is_guided(guidance_scale: float | jax.Array) -> bool:
    """Whether a scale needs the unconditional half: all but the Python number 1 do; an array is traced."""
    return not (isinstance(guidance_scale, int | float) and guidance_scale == 1)


def steered(
    denoise: Denoiser,
    schedule: Schedule,
    log_p: Callable[[jax.Array, jax.Array], jax.Array],
    scale: float | jax.Array = 1.0,
    *,
    mean: bool = False,
) -> Denoiser:
    """The denoiser of data weighed by p(y | x)^scale: eps - scale sqrt(1 - alpha_bar) grad log p(y | x_t).

    log_p(x_t, t) -> [B] is that of a classifier of noised pictures, or how well they match a caption by a
    CLIP that was trained on noised pictures (Dhariwal & Nichol 2021, algorithm 2; Nichol et al. 2021, section
    2.4). `scale` is a number or [B]; 0 steers nowhere. mean: only the gradient is returned, by which an
    ancestral step shifts its mean (ibid., algorithm 1).
    """

    def steer(x_t, t):
        prediction = denoise(x_t, t)
        gradient = jax.grad(lambda x: log_p(x, t).sum())(x_t).astype(jnp.float32)
        gradient = gradient * jnp.asarray(scale, jnp.float32).reshape(-1, *[1] * (x_t.ndim - 1))
        if mean:
            return prediction._replace(gradient=gradient)
        signal, sigma = signal_and_sigma(schedule, t, x_t.ndim)
        if schedule.alpha_bar[-1] == 0:  # pure noise says nothing of y
            sigma = jnp.where(signal > 0, sigma, 0.0)
            signal = jnp.where(signal > 0, signal, 1.0)
        x0 = prediction.x0 + sigma**2 / signal * gradient
        return Prediction(x0, prediction.eps - sigma * gradient, prediction.var_frac)

    return steer


def clip_x0(denoise: Denoiser, schedule: Schedule, limit: float | jax.Array = 1.0) -> Denoiser:
    """The denoiser with x0 clipped to [-limit, limit] and eps re-derived, or DDIM would not see the clip."""

    def clipped(x_t, t):
        prediction = denoise(x_t, t)
        return _with_x0(schedule, prediction, jnp.clip(prediction.x0, -limit, limit), x_t, t)

    return clipped


def dynamic_threshold(
    denoise: Denoiser, schedule: Schedule, percentile: float = 99.5, most: float | None = None
) -> Denoiser:
    """The denoiser with x0 clipped to [-s, s] and divided by s, s = max(1, percentile of |x0|), per sample.

    For pixels in [-1, 1] under strong guidance (Saharia et al. 2022, section 2.3); percentile is in (0, 100].
    most: the largest s, None for any (IF: 1.5).
    """
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")

    def thresholded(x_t, t):
        prediction = denoise(x_t, t)
        axes = tuple(range(1, prediction.x0.ndim))
        s = jnp.maximum(1.0, jnp.percentile(jnp.abs(prediction.x0), percentile, axis=axes, keepdims=True))
        s = s if most is None else jnp.minimum(s, most)
        return _with_x0(schedule, prediction, jnp.clip(prediction.x0, -s, s) / s, x_t, t)

    return thresholded


def keep_known(denoise: Denoiser, schedule: Schedule, image: jax.Array, mask: jax.Array) -> Denoiser:
    """The denoiser with x0 replaced by `image` [B, ...] where `mask` [B, ..., 1], in 0 .. 1, is 0.

    The last step of every sampler returns x0, so known pixels come back exactly (Nichol et al. 2021).
    """

    def kept(x_t, t):
        drawn = denoise(x_t, t)
        there = _with_x0(schedule, drawn, image, x_t, t)
        x0 = mask * drawn.x0 + (1 - mask) * there.x0
        gradient = None if drawn.gradient is None else mask * drawn.gradient
        return Prediction(x0, mask * drawn.eps + (1 - mask) * there.eps, drawn.var_frac, gradient)

    return kept


def _with_x0(
    schedule: Schedule, prediction: Prediction, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> Prediction:
    signal, sigma = signal_and_sigma(schedule, t, x_t.ndim)
    return prediction._replace(x0=x0, eps=(x_t - signal * x0) / sigma)

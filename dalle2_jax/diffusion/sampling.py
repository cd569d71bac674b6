"""Samplers as functions, and what is wrapped around a denoiser before it is sampled.

A denoiser is denoise(x_t [B, ...], t [B] int32) -> Prediction; t is always an original time of the
schedule. A step goes from a kept time t to the next one s < t, the last step to the clean end, where
alpha_bar is 1. With the two-time posterior of `schedules` and z ~ N(0, I), none at the last step,

    ddpm   x_s = coef_x0 x0 + coef_x_t x_t + sqrt(var) z
           var = beta_tilde (fixed_small), beta (fixed_large), beta^f beta_tilde^(1-f) (learned)
    ddim   x_s = sqrt(alpha_bar[s]) x0 + sqrt(1 - alpha_bar[s] - sigma^2) eps + sigma z
           sigma = eta sqrt(beta_tilde)

(Ho et al. 2020; Nichol & Dhariwal 2021; Song et al. 2021, equation 12.) Guidance, clipping and thresholding
are wrappers around the denoiser, so their order is visible where they are applied: guide first, then clip.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.process import Prediction, signal_and_sigma
from dalle2_jax.diffusion.schedules import Schedule, two_time

Denoiser = Callable[[jax.Array, jax.Array], Prediction]

# Steps fold their time, 0..T-1, into a sample's key; its first noise folds in a number that no time reaches.
_INIT_FOLD = 2**31 - 1


def init_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_T ~ N(0, I), [B, *shape] float32, from per-sample keys [B]; independent of the noise in `sample`."""
    return _normal(keys, _INIT_FOLD, shape)


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    x_T: jax.Array,
    keys: jax.Array,
    *,
    timesteps: np.ndarray,
    method: str = "ddpm",
    eta: float = 0.0,
    variance: str = "learned",
    return_path: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Walk x_T [B, ...] down `timesteps` to data x0 [B, ...], float32, in one scan.

    keys: per-sample PRNG keys [B] (typed, or legacy [B, 2]); noise is drawn per sample from its key and the
    time, so a sample does not depend on the batch it is in. timesteps: host integers, descending
    (`schedules.space_timesteps`). method: 'ddpm' with `variance` 'learned', 'fixed_small' or 'fixed_large',
    or 'ddim' with `eta` in [0, 1] (0 is deterministic, 1 is ddpm with the small variance). return_path:
    also return x after every step, [n, B, ...]; its last entry is x0. Raises ValueError for unknown names
    and for a learned variance that the denoiser does not predict.
    """
    if method not in ("ddpm", "ddim"):
        raise ValueError(f"unknown method {method!r}: choose 'ddpm' or 'ddim'")
    if variance not in ("learned", "fixed_small", "fixed_large"):
        raise ValueError(f"unknown variance {variance!r}: choose 'learned', 'fixed_small' or 'fixed_large'")
    if method == "ddim" and not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if keys.shape[0] != x_T.shape[0]:
        raise ValueError(f"there must be one key a sample: {keys.shape[0]} keys for {x_T.shape[0]} samples")
    tables = two_time(schedule, timesteps)
    noisy = np.append(np.ones(len(tables.t) - 1), 0.0)
    if method == "ddpm":
        log_small, log_large = tables.log_beta_tilde, tables.log_beta
        steps = dict(
            coef_x0=tables.coef_x0, coef_x_t=tables.coef_x_t, small=log_small, large=log_large, noisy=noisy
        )
    else:
        sigma = eta * np.sqrt(tables.beta_tilde)
        to_eps = np.sqrt(np.maximum(1.0 - tables.alpha_bar_s - sigma**2, 0.0))
        steps = dict(coef_x0=np.sqrt(tables.alpha_bar_s), coef_eps=to_eps, sigma=sigma)
    steps = {name: jnp.asarray(table, jnp.float32) for name, table in steps.items()}
    stochastic = method == "ddpm" or eta > 0.0

    def step(x, at):
        t, c = at
        prediction = denoise(x, jnp.full(x.shape[:1], t, jnp.int32))
        if method == "ddim":
            mean = c["coef_x0"] * prediction.x0 + c["coef_eps"] * prediction.eps
            std = c["sigma"]
        else:
            mean = c["coef_x0"] * prediction.x0 + c["coef_x_t"] * x
            std = c["noisy"] * jnp.exp(
                0.5 * _log_variance(variance, prediction.var_frac, c["small"], c["large"])
            )
        x = mean + std * _normal(keys, t, x.shape[1:]) if stochastic else mean
        return x, (x if return_path else None)

    x0, path = jax.lax.scan(step, x_T.astype(jnp.float32), (jnp.asarray(tables.t), steps))
    return (x0, path) if return_path else x0


def invert(denoise: Denoiser, schedule: Schedule, x0: jax.Array, *, timesteps: np.ndarray) -> jax.Array:
    """The noise x_T [B, ...] from which deterministic DDIM over the same `timesteps` returns to x0 [B, ...].

    The DDIM equation run upwards: x_r = sqrt(alpha_bar[r]) x0 + sqrt(1 - alpha_bar[r]) eps for the next
    kept time r > t, evaluated at the current t, and alpha_bar = 0 after the last (Dhariwal & Nichol 2021;
    section 3.3 of DALL-E 2). First order: the error of the round trip about halves when the steps double.
    Use guidance 1, and in both directions the same wrappers.
    """
    tables = two_time(schedule, timesteps)
    alpha_bar = tables.alpha_bar_t[::-1]
    alpha_bar_next = np.append(alpha_bar[1:], 0.0)
    to_x0 = jnp.asarray(np.sqrt(alpha_bar_next), jnp.float32)
    to_eps = jnp.asarray(np.sqrt(1.0 - alpha_bar_next), jnp.float32)

    def step(x, at):
        t, signal, sigma = at
        prediction = denoise(x, jnp.full(x.shape[:1], t, jnp.int32))
        return signal * prediction.x0 + sigma * prediction.eps, None

    times = jnp.asarray(tables.t[::-1].copy())
    return jax.lax.scan(step, x0.astype(jnp.float32), (times, to_x0, to_eps))[0]


def guide(cond: Prediction, uncond: Prediction, scale: float | jax.Array) -> Prediction:
    """Classifier-free guidance, uncond + scale (cond - uncond); scale is a number or [B], 1 is cond exactly.

    Only x0 and eps are guided. The variance fraction is the conditional one: extrapolating it leaves [0, 1].
    """
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim:
        scale = scale.reshape(-1, *[1] * (cond.x0.ndim - 1))
    x0 = cond.x0 + (scale - 1.0) * (cond.x0 - uncond.x0)
    eps = cond.eps + (scale - 1.0) * (cond.eps - uncond.eps)
    return Prediction(x0, eps, cond.var_frac)


def guided(
    pair: Callable[[jax.Array, jax.Array], tuple[Prediction, Prediction]], scale: float | jax.Array
) -> Denoiser:
    """The guided denoiser of pair(x_t, t) -> (conditional, unconditional) predictions; see `guide`."""

    def denoise(x_t, t):
        cond, uncond = pair(x_t, t)
        return guide(cond, uncond, scale)

    return denoise


def clip_x0(denoise: Denoiser, schedule: Schedule, limit: float | jax.Array = 1.0) -> Denoiser:
    """The denoiser with x0 clipped to [-limit, limit] and eps re-derived, or DDIM would not see the clip."""

    def clipped(x_t, t):
        prediction = denoise(x_t, t)
        return _with_x0(schedule, prediction, jnp.clip(prediction.x0, -limit, limit), x_t, t)

    return clipped


def dynamic_threshold(denoise: Denoiser, schedule: Schedule, percentile: float = 99.5) -> Denoiser:
    """The denoiser with x0 clipped to [-s, s] and divided by s, s = max(1, percentile of |x0|), per sample.

    For pixels in [-1, 1] under strong guidance (Saharia et al. 2022, section 2.3); percentile is in (0, 100].
    """
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")

    def thresholded(x_t, t):
        prediction = denoise(x_t, t)
        axes = tuple(range(1, prediction.x0.ndim))
        s = jnp.maximum(1.0, jnp.percentile(jnp.abs(prediction.x0), percentile, axis=axes, keepdims=True))
        return _with_x0(schedule, prediction, jnp.clip(prediction.x0, -s, s) / s, x_t, t)

    return thresholded


def _with_x0(
    schedule: Schedule, prediction: Prediction, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> Prediction:
    signal, sigma = signal_and_sigma(schedule, t, x_t.ndim)
    return Prediction(x0, (x_t - signal * x0) / sigma, prediction.var_frac)


def _log_variance(
    variance: str, var_frac: jax.Array | None, log_small: jax.Array, log_large: jax.Array
) -> jax.Array:
    if variance == "fixed_small":
        return log_small
    if variance == "fixed_large":
        return log_large
    if var_frac is None:
        raise ValueError("variance='learned' needs a denoiser with a learned variance: use 'fixed_small'")
    return var_frac * log_large + (1.0 - var_frac) * log_small


def _normal(keys: jax.Array, fold: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, fold), shape, jnp.float32))(keys)

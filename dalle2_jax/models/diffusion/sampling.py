"""Samplers as functions, and what is wrapped around a denoiser before it is sampled.

A denoiser is denoise(x_t [B, ...], t [B] int32) -> Prediction; t is always an original time of the
schedule. A step goes from a kept time t to the next one s < t, the last step to the clean end, where
alpha_bar is 1. With the two-time posterior of `schedules` and z ~ N(0, I), none at the last step,

    ddpm   x_s = coef_x0 x0 + coef_x_t x_t + sqrt(var) z
           var = beta_tilde (fixed_small), beta (fixed_large), beta^f beta_tilde^(1-f) (learned)
    ddim   x_s = sqrt(alpha_bar[s]) x0 + sqrt(1 - alpha_bar[s] - sigma^2) eps + sigma z
           sigma = eta sqrt(beta_tilde)

(Ho et al. 2020; Nichol & Dhariwal 2021; Song et al. 2021, equation 12), and

    analytic  ddpm's mean
              var = beta_tilde + coef_x0^2 clip((1 - alpha_bar[t]) / alpha_bar[t] (1 - m_t), 0, v)
              m_t = E mean(eps^2) of the trained denoiser's eps at time t over the training data: `eps_sq`;
              v = the data's variance an entry. The fraction is the variance of x0 given x_t, so that steps of
              any length have the right variance (Bao et al. 2022, theorem 1 and section 3; the bound of
              their pixels is 1).
    dpm++     DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic, of second order:
              x_s = sigma_s / sigma_t x_t + sqrt(alpha_bar[s]) (1 - e^-h) (x0 + h / (2 h') (x0 - x0'))
              with log(signal / sigma) growing by h in this step, by h' in the one before, whose x0 is x0';
              h / h' is kept to 1 or less

Guidance, clipping and thresholding are wrappers around the denoiser, so their order is visible where they are
applied: guide first, then clip.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion.process import Prediction, signal_and_sigma
from dalle2_jax.models.diffusion.schedules import Schedule, TwoTime, two_time

METHODS = ("ddpm", "ddim", "analytic", "dpm++")

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
    eps_sq: jax.Array | None = None,
    data_variance: float = 1.0,
    resample: int = 1,
    return_path: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Walk x_T [B, ...] down `timesteps` to data x0 [B, ...], float32, in one scan.

    x_T is the state at timesteps[0], which need not be pure noise.

    keys: per-sample PRNG keys [B] (typed, or legacy [B, 2]); noise is drawn per sample from its key and the
    time, so a sample does not depend on the batch it is in. timesteps: host integers, descending
    (`schedules.space_timesteps`). method: 'ddpm' with `variance` 'learned', 'fixed_small' or 'fixed_large',
    'ddim' with `eta` in [0, 1] (0 is deterministic, 1 is ddpm with the small variance), 'dpm++', or
    'analytic' with `eps_sq` [T] and `data_variance`. resample: every step is taken so many times, with noise
    added back in between, so that what a denoiser is made to keep and what it draws come to fit (Lugmayr et
    al. 2022, with jumps of one step). return_path: also return x after every step, [n, B, ...]; its last
    entry is x0. Raises ValueError for unknown names, and for a learned variance or statistics that are not
    there.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if variance not in ("learned", "fixed_small", "fixed_large"):
        raise ValueError(f"unknown variance {variance!r}: choose 'learned', 'fixed_small' or 'fixed_large'")
    if method == "ddim" and not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if method == "analytic" and (eps_sq is None or eps_sq.shape != (schedule.num_timesteps,)):
        raise ValueError(
            f"method 'analytic' needs the measured eps_sq of all {schedule.num_timesteps} times: "
            "measure it (Prior.measure), or use 'ddpm'"
        )
    if resample < 1 or (resample > 1 and method == "dpm++"):
        raise ValueError(f"resample must be 1 or more, and 1 with 'dpm++', got {resample} with {method!r}")
    if keys.shape[0] != x_T.shape[0]:
        raise ValueError(f"there must be one key a sample: {keys.shape[0]} keys for {x_T.shape[0]} samples")
    tables = two_time(schedule, timesteps)
    noisy = np.append(np.ones(len(tables.t) - 1), 0.0)
    if method == "ddim":
        sigma = eta * np.sqrt(tables.beta_tilde)
        to_eps = np.sqrt(np.maximum(1.0 - tables.alpha_bar_s - sigma**2, 0.0))
        steps = dict(x0=np.sqrt(tables.alpha_bar_s), eps=to_eps, std=sigma)
    elif method == "dpm++":
        steps = _dpm_solver_tables(tables)
    else:
        steps = dict(x0=tables.coef_x0, x_t=tables.coef_x_t, noisy=noisy)
        if method == "ddpm":
            steps |= dict(small=tables.log_beta_tilde, large=tables.log_beta)
    steps = {name: jnp.asarray(table, jnp.float32) for name, table in steps.items()}
    if method == "analytic":
        steps["std"] = jnp.sqrt(_analytic_variance(tables, eps_sq, data_variance)) * steps["noisy"]
    if resample > 1:
        # Before a step is taken again, x_s is noised back to x_t.
        again = np.tile(np.arange(resample) < resample - 1, len(tables.t))
        ratio = np.repeat(tables.alpha_bar_t / tables.alpha_bar_s, resample)
        steps = {name: jnp.repeat(table, resample) for name, table in steps.items()} | {
            "back": jnp.asarray(np.where(again, np.sqrt(ratio), 1.0), jnp.float32),
            "back_std": jnp.asarray(np.where(again, np.sqrt(1.0 - ratio), 0.0), jnp.float32),
            "take": jnp.tile(jnp.arange(resample), len(tables.t)),
        }
    times = jnp.asarray(np.repeat(tables.t, resample))
    stochastic = method in ("ddpm", "analytic") or (method == "ddim" and eta > 0.0)

    def step(carry, at):
        x, x0_before = carry
        t, c = at
        prediction = denoise(x, jnp.full(x.shape[:1], t, jnp.int32))
        if method == "ddim":
            mean = c["x0"] * prediction.x0 + c["eps"] * prediction.eps
        elif method == "dpm++":
            mean = c["x0"] * prediction.x0 + c["x_t"] * x + c["change"] * (prediction.x0 - x0_before)
        else:
            mean = c["x0"] * prediction.x0 + c["x_t"] * x
        x, step_keys, fold = mean, keys, t
        if resample > 1:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, t), c["take"]))(keys)
            fold = 0
        if stochastic:
            if method == "ddpm":
                log_var = _log_variance(variance, prediction.var_frac, c["small"], c["large"])
                std = c["noisy"] * jnp.exp(0.5 * log_var)
            else:
                std = c["std"]
            x = mean + std * _normal(step_keys, fold, x.shape[1:])
        if resample > 1:
            x = c["back"] * x + c["back_std"] * _normal(step_keys, 1, x.shape[1:])
        return (x, prediction.x0 if method == "dpm++" else x0_before), (x if return_path else None)

    x_T = x_T.astype(jnp.float32)
    x0_before = jnp.zeros_like(x_T) if method == "dpm++" else ()
    (x0, _), path = jax.lax.scan(step, (x_T, x0_before), (times, steps))
    return (x0, path) if return_path else x0


def _dpm_solver_tables(tables: TwoTime) -> dict[str, np.ndarray]:
    """Coefficients of x_t, x0 and x0 - (x0 of the step before) of DPM-Solver++(2M), float64 [n].

    With lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) and h its growth over a step. The first step has
    no step before it, and at the last lambda is infinite: both are of first order. Where times are even,
    lambda leaps at the clean end, h / h' to 4: the change of x0 over the short step before says little of the
    long one to come, and is carried no farther than it was seen, h / h' <= 1.
    """
    signal_s, sigma_s = np.sqrt(tables.alpha_bar_s), np.sqrt(1.0 - tables.alpha_bar_s)
    sigma_t = np.sqrt(1.0 - tables.alpha_bar_t)
    lam_t = 0.5 * (np.log(tables.alpha_bar_t) - np.log1p(-tables.alpha_bar_t))
    h = np.diff(lam_t)
    x0 = signal_s * -np.expm1(-np.append(h, np.inf))
    change = np.zeros_like(x0)
    change[1:-1] = 0.5 * x0[1:-1] * np.minimum(h[1:] / h[:-1], 1.0)
    return dict(x0=x0, x_t=sigma_s / sigma_t, change=change)


def _analytic_variance(tables: TwoTime, eps_sq: jax.Array, data_variance: float) -> jax.Array:
    """The variance [n] of Analytic-DPM's steps, from eps_sq [T]; see the module's docstring."""
    to_data = jnp.asarray((1.0 - tables.alpha_bar_t) / tables.alpha_bar_t, jnp.float32)
    weight = jnp.asarray(tables.coef_x0**2, jnp.float32)
    posterior = jnp.clip(to_data * (1.0 - eps_sq[tables.t].astype(jnp.float32)), 0.0, data_variance)
    return jnp.asarray(tables.beta_tilde, jnp.float32) + weight * posterior


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


def steered(
    denoise: Denoiser,
    schedule: Schedule,
    log_p: Callable[[jax.Array, jax.Array], jax.Array],
    scale: float | jax.Array,
) -> Denoiser:
    """The denoiser of data weighed by p(y | x)^scale: eps - scale sqrt(1 - alpha_bar) grad log p(y | x_t).

    log_p(x_t, t) -> [B] is that of a classifier of noised pictures, or how well they match a caption by a
    CLIP that was trained on noised pictures (Dhariwal & Nichol 2021, algorithm 2; Nichol et al. 2021, section
    2.4). `scale` is a number or [B]; 0 steers nowhere.
    """

    def steer(x_t, t):
        prediction = denoise(x_t, t)
        gradient = jax.grad(lambda x: log_p(x, t).sum())(x_t).astype(jnp.float32)
        gradient = gradient * jnp.asarray(scale, jnp.float32).reshape(-1, *[1] * (x_t.ndim - 1))
        signal, sigma = signal_and_sigma(schedule, t, x_t.ndim)
        x0 = prediction.x0 + sigma**2 / signal * gradient
        return Prediction(x0, prediction.eps - sigma * gradient, prediction.var_frac)

    return steer


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


def keep_known(denoise: Denoiser, schedule: Schedule, known: jax.Array, repaint: jax.Array) -> Denoiser:
    """The denoiser with x0 replaced by `known` [B, ...] where `repaint` [B, ..., 1], in 0 .. 1, is 0.

    The last step of every sampler returns x0, so what is known comes back exactly (Nichol et al. 2021).
    """

    def kept(x_t, t):
        drawn = denoise(x_t, t)
        there = _with_x0(schedule, drawn, known, x_t, t)
        x0 = repaint * drawn.x0 + (1 - repaint) * there.x0
        return Prediction(x0, repaint * drawn.eps + (1 - repaint) * there.eps, drawn.var_frac)

    return kept


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

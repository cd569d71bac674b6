"""Samplers: functions that turn a walk's timesteps into coefficients and an update.

A denoiser is denoise(x_t [B, ...], t [B] int32) -> Prediction; t is always an original time of the schedule.
A step goes from a kept time t to the next one s < t. The last step goes to the clean end, where alpha_bar is
1. `walk` takes all steps in one scan:

    x = x_T
    for c in sampler.table:                     # one entry a step
        x = sampler.update(x, denoise(x, c["t"]), x0 of the step before, c, keys)

Every step's equation is in the docstring of its sampler, with z ~ N(0, I), drawn per sample from its key and
the time. The coefficients are those of the two-time posterior of `schedules`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion.process import Denoiser
from dalle2_jax.models.diffusion.schedules import Schedule, TwoTime, two_time

# Steps fold their time, 0..T-1, into a sample's key; its first noise folds in a number that no time reaches.
_INIT_FOLD = 2**31 - 1


class Sampler(NamedTuple):
    """A walk's coefficients and what one step does with them.

    Attributes:
      table: name -> coefficient of every step [n], float32; 't' has the times, int32.
      update: (x_t [B, ...], Prediction, x0 of the step before, the step's coefficients, keys [B]) -> x_s.
      multistep: whether `update` reads x0 of the step before; it gets () else.
      ends: entries of the table that end a step, where a step has several; None: all.
    """

    table: dict[str, jax.Array]
    update: Callable[..., jax.Array]
    multistep: bool = False
    ends: np.ndarray | None = None


def ddpm(steps: TwoTime, variance: str | float = "learned") -> Sampler:
    """Ancestral sampling: x_s = coef_x0 x0 + coef_x_t x_t + sqrt(var) z, no noise in the last step.

    var is beta_tilde ('fixed_small'), beta ('fixed_large') or beta^f beta_tilde^(1-f) ('learned'), with f the
    prediction's variance fraction (Ho et al. 2020; Nichol & Dhariwal 2021, equation 15). A number is f of
    all steps (classifier-free guidance's samplers: 0.2 or 0.3).
    """
    if isinstance(variance, str) and variance not in ("learned", "fixed_small", "fixed_large"):
        raise ValueError(f"unknown variance {variance!r}: choose 'learned', 'fixed_small' or 'fixed_large'")
    table = _table(
        steps.t,
        x0=steps.coef_x0,
        x_t=steps.coef_x_t,
        noisy=_noisy(steps),
        small=steps.log_beta_tilde,
        large=steps.log_beta,
    )

    def update(x_t, prediction, x0_before, c, keys):
        mean = c["x0"] * prediction.x0 + c["x_t"] * x_t
        log_var = _log_variance(variance, prediction.var_frac, c["small"], c["large"])
        if prediction.gradient is not None:  # in the last step, too (ADM, algorithm 1)
            mean = mean + jnp.exp(log_var) * prediction.gradient
        std = c["noisy"] * jnp.exp(0.5 * log_var)
        return mean + std * _normal(keys, c["t"], x_t.shape[1:])

    return Sampler(table, update)


def ddim(steps: TwoTime, eta: float = 0.0) -> Sampler:
    """DDIM: x_s = sqrt(alpha_bar[s]) x0 + sqrt(1 - alpha_bar[s] - sigma^2) eps + sigma z.

    sigma = eta sqrt(beta_tilde) with eta in [0, 1]: 0 is deterministic, 1 is `ddpm` with the small variance
    (Song et al. 2021, equation 12).
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    sigma = eta * np.sqrt(steps.beta_tilde)
    to_eps = np.sqrt(np.maximum(1.0 - steps.alpha_bar_s - sigma**2, 0.0))
    table = _table(steps.t, x0=np.sqrt(steps.alpha_bar_s), eps=to_eps, std=sigma)

    def update(x_t, prediction, x0_before, c, keys):
        mean = c["x0"] * prediction.x0 + c["eps"] * prediction.eps
        return mean + c["std"] * _normal(keys, c["t"], x_t.shape[1:]) if eta > 0.0 else mean

    return Sampler(table, update)


def analytic(steps: TwoTime, eps_sq: jax.Array, data_variance: float = 1.0) -> Sampler:
    """Analytic-DPM: `ddpm` with the variance that is right for steps of any length.

    var = beta_tilde + coef_x0^2 clip((1 - alpha_bar[t]) / alpha_bar[t] (1 - m_t), 0, v)

    The clipped term is the variance of x0 given x_t. m_t = E mean(eps^2), `eps_sq` [T], is measured: the mean
    over the training data of the trained denoiser's eps at time t. v, `data_variance`, is the data's variance
    an entry (Bao et al. 2022, theorem 1 and section 3; the bound of their pixels is 1).
    """
    table = _table(steps.t, x0=steps.coef_x0, x_t=steps.coef_x_t, noisy=_noisy(steps))
    table["std"] = jnp.sqrt(_analytic_variance(steps, eps_sq, data_variance)) * table["noisy"]

    def update(x_t, prediction, x0_before, c, keys):
        mean = c["x0"] * prediction.x0 + c["x_t"] * x_t
        return mean + c["std"] * _normal(keys, c["t"], x_t.shape[1:])

    return Sampler(table, update)


def dpmpp_2m(steps: TwoTime) -> Sampler:
    """DPM-Solver++(2M), deterministic, of second order (Lu et al. 2022, algorithm 2).

    x_s = sigma_s / sigma_t x_t + sqrt(alpha_bar[s]) (1 - e^-h) (x0 + h / (2 h') (x0 - x0'))

    lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) grows by h in this step and by h' in the one before,
    whose x0 is x0'. The first step has no step before it, and at the last lambda is infinite: both are of
    first order. Where times are even, lambda leaps near the clean end, h / h' to 4. The change of x0 over the
    short step before says little of the long one to come, so h / h' is at most 1.
    """
    signal_s, sigma_s = np.sqrt(steps.alpha_bar_s), np.sqrt(1.0 - steps.alpha_bar_s)
    sigma_t = np.sqrt(1.0 - steps.alpha_bar_t)
    with np.errstate(divide="ignore"):  # at pure noise, where a flow begins, lambda is -infinite
        h = np.diff(0.5 * (np.log(steps.alpha_bar_t) - np.log1p(-steps.alpha_bar_t)))
    x0 = signal_s * -np.expm1(-np.append(h, np.inf))
    change = np.zeros_like(x0)
    change[1:-1] = 0.5 * x0[1:-1] * np.minimum(h[1:] / h[:-1], 1.0)
    table = _table(steps.t, x0=x0, x_t=sigma_s / sigma_t, change=change)

    return Sampler(table, _update_by_change, multistep=True)


def _update_by_change(x_t, prediction, x0_before, c, keys):
    return c["x0"] * prediction.x0 + c["x_t"] * x_t + c["change"] * (prediction.x0 - x0_before)


def euler(steps: TwoTime) -> Sampler:
    """Euler's method along the straight path, z_s = z_t + (u_s - u_t) (k eps - x0): `ddim` without noise."""
    return ddim(steps)


def heun(steps: TwoTime) -> Sampler:
    """Heun's method along the straight path, deterministic, of second order, two evaluations a step.

    z'  = z_t + (u_s - u_t) velocity(z_t, t)
    z_s = z_t + (u_s - u_t) (velocity(z_t, t) + velocity(z', s)) / 2 = z' + (u_t - u_s) / (2 u_s) (x0' - x0)

    x0' is that of z' at s. Both forms are equal, as velocity(z', s) = (z' - x0') / u_s and velocity(z_t, t) =
    (z' - x0) / u_s. The last step, to u_s = 0, is Euler's (Karras et al. 2022, algorithm 1).
    """
    signal_s, sigma_s = np.sqrt(steps.alpha_bar_s), np.sqrt(1.0 - steps.alpha_bar_s)
    ratio = sigma_s / np.sqrt(1.0 - steps.alpha_bar_t)
    u_t, u_s = steps.u_t[:-1], steps.u_s[:-1]
    # x_s is z_s signal_s / (1 - u_s)
    change = signal_s[:-1] / (1.0 - u_s) * (u_t - u_s) / (2.0 * u_s)

    def both(predictor, corrector):
        return np.append(np.stack([predictor[:-1], corrector], axis=1), predictor[-1])

    zeros = np.zeros_like(u_s)
    table = _table(
        both(steps.t, steps.t[1:]),
        x0=both(signal_s - ratio * np.sqrt(steps.alpha_bar_t), zeros),
        x_t=both(ratio, np.ones_like(u_s)),
        change=both(np.zeros_like(ratio), change),
    )
    ends = np.append(2 * np.arange(len(u_s)) + 1, 2 * len(u_s))
    return Sampler(table, _update_by_change, multistep=True, ends=ends)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "analytic": analytic, "dpm++": dpmpp_2m, "euler": euler, "heun": heun}
METHODS = tuple(SAMPLERS)
MULTISTEP = ("dpm++", "heun")  # read the step before, so that no step can be repeated


def resampled(sampler: Sampler, steps: TwoTime, count: int) -> Sampler:
    """`sampler` that takes every step `count` times, noising x_s back to x_t in between.

    So what a denoiser is made to keep and what it draws come to fit (RePaint, Lugmayr et al. 2022, with jumps
    of one step): x_t = sqrt(alpha_bar[t] / alpha_bar[s]) x_s + sqrt(1 - alpha_bar[t] / alpha_bar[s]) z.
    """
    if count < 1 or sampler.multistep:
        raise ValueError(f"resample must be 1 or more, and 1 with 'dpm++' and 'heun', got {count}")
    again = np.tile(np.arange(count) < count - 1, len(steps.t))  # [n count], False at each step's last take
    ratio = np.repeat(steps.alpha_bar_t / steps.alpha_bar_s, count)
    table = {name: jnp.repeat(row, count) for name, row in sampler.table.items()} | {
        "back": jnp.asarray(np.where(again, np.sqrt(ratio), 1.0), jnp.float32),
        "back_std": jnp.asarray(np.where(again, np.sqrt(1.0 - ratio), 0.0), jnp.float32),
        "take": jnp.tile(jnp.arange(count), len(steps.t)),
    }

    def update(x_t, prediction, x0_before, c, keys):
        # These keys hold time and take; 0 in the time's place is for the step's noise, 1 for the way back.
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, c["t"]), c["take"]))(keys)
        x_s = sampler.update(x_t, prediction, x0_before, c | {"t": 0}, keys)
        return c["back"] * x_s + c["back_std"] * _normal(keys, 1, x_s.shape[1:])

    return Sampler(table, update)


def walk(
    denoise: Denoiser, sampler: Sampler, x_T: jax.Array, keys: jax.Array, *, return_path: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Walk x_T [B, ...], the state at the sampler's first time, to data x0 [B, ...] float32.

    keys: one PRNG key a sample [B] (typed, or legacy [B, 2]). A sample does not depend on the batch it is in.
    return_path: also return x after every step, [n, B, ...]; its last entry is x0.
    """
    if keys.shape[0] != x_T.shape[0]:
        raise ValueError(f"there must be one key a sample: {keys.shape[0]} keys for {x_T.shape[0]} samples")

    def step(carry, c):
        x, x0_before = carry
        prediction = denoise(x, jnp.full(x.shape[:1], c["t"], jnp.int32))
        x = sampler.update(x, prediction, x0_before, c, keys)
        return (x, prediction.x0 if sampler.multistep else ()), (x if return_path else None)

    x_T = x_T.astype(jnp.float32)
    x0_before = jnp.zeros_like(x_T) if sampler.multistep else ()
    (x0, _), path = jax.lax.scan(step, (x_T, x0_before), sampler.table)
    if not return_path:
        return x0
    return x0, path if sampler.ends is None else path[sampler.ends]


def init_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_T ~ N(0, I), [B, *shape] float32, from per-sample keys [B]; independent of the noise in `walk`."""
    return _normal(keys, _INIT_FOLD, shape)


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


def _table(times: np.ndarray, **coefficients: np.ndarray) -> dict[str, jax.Array]:
    """The times, and float64 coefficients [n] as float32."""
    floats = {name: jnp.asarray(row, jnp.float32) for name, row in coefficients.items()}
    return {"t": jnp.asarray(times)} | floats


def _noisy(steps: TwoTime) -> np.ndarray:
    """1 for every step but the last, which returns the mean."""
    return np.append(np.ones(len(steps.t) - 1), 0.0)


def _log_variance(
    variance: str | float, var_frac: jax.Array | None, log_small: jax.Array, log_large: jax.Array
) -> jax.Array:
    if variance == "fixed_small":
        return log_small
    if variance == "fixed_large":
        return log_large
    if not isinstance(variance, str):
        return variance * log_large + (1.0 - variance) * log_small
    if var_frac is None:
        raise ValueError("variance='learned' needs a denoiser with a learned variance: use 'fixed_small'")
    return var_frac * log_large + (1.0 - var_frac) * log_small


def _analytic_variance(steps: TwoTime, eps_sq: jax.Array, data_variance: float) -> jax.Array:
    """The variance [n] of `analytic`'s steps, from eps_sq [T]."""
    to_data = jnp.asarray((1.0 - steps.alpha_bar_t) / steps.alpha_bar_t, jnp.float32)
    weight = jnp.asarray(steps.coef_x0**2, jnp.float32)
    posterior = jnp.clip(to_data * (1.0 - eps_sq[steps.t].astype(jnp.float32)), 0.0, data_variance)
    return jnp.asarray(steps.beta_tilde, jnp.float32) + weight * posterior


def _normal(keys: jax.Array, fold: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """z ~ N(0, I) [B, *shape] float32, from per-sample keys with a number folded in."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, fold), shape, jnp.float32))(keys)

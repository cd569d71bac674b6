"""The noise process: how data are noised, what a network's output means, and what it is trained on.

    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps,      v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0

A network predicts one of eps, x0, v, and flow matching's velocity dz / du = k eps - x0 ('flow'); given x_t,
each of them determines the others:

    x0  = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)  = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v
    eps = (x_t - sqrt(alpha_bar) x0) / sqrt(1 - alpha_bar)   = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v
    x0  = z - u velocity,  k eps = z + (1 - u) velocity      with z = (1 - u) x0 + u k eps (see `schedules`)

A network with a learned variance has twice the channels: the first half is the prediction, the second half
is raw, and f = (raw + 1) / 2 is the variance fraction, log var = f log beta + (1 - f) log beta_tilde
(Nichol & Dhariwal 2021, equation 15). f is nominally in [0, 1] and not constrained to it; beta and
beta_tilde are those of the sampler's actual step, which is why a Prediction carries f and not a variance.

The loss of one example at time t is

    w_t mean((target - prediction)^2)  +  vlb_weight T vb_t      (the second with a learned variance only)

where vb_t, in bits per dimension, is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0, and at t = 0 the
bits that a discretised p(x0 | x_t) needs for 8-bit pixels. T vb_t at a uniform t estimates the variational
bound, so vlb_weight is lambda = 0.001 of L_hybrid. The mean of p is behind a stop-gradient there: the bound
trains the variance alone (ibid., section 3.1).

The bound by itself, L_vlb, trains the mean too. Its terms differ by orders of magnitude, so times are drawn
by importance (ibid., section 3.3): p_t is proportional to the root mean square of the last ten values of the
term at t, uniform until every time has ten of them and for a thousandth after that; the loss at t is divided
by T p_t.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion.schedules import Schedule, shifted, two_time
from dalle2_jax.models.diffusion.weights import OBJECTIVES, loss_weights, unknown

TIMES = ("uniform", "logit_normal")


class Prediction(NamedTuple):
    """What a denoiser returns, whatever its network predicts: arrays [B, ...] float32 of the shape of x_t.

    var_frac, the variance fraction f of the module's docstring, is None without a learned variance. gradient,
    that of a guide's log p(y | x_t), shifts the mean of an ancestral step by its variance; None: no guide.
    """

    x0: jax.Array
    eps: jax.Array
    var_frac: jax.Array | None = None
    gradient: jax.Array | None = None


# network(x_t [B, ...], t [B] int32) -> output, of twice as many channels where the variance is learned
Network = Callable[[jax.Array, jax.Array], jax.Array]
# denoise(x_t [B, ...], t [B] int32) -> Prediction
Denoiser = Callable[[jax.Array, jax.Array], Prediction]


def draw_timesteps(key: jax.Array, size: int, num_timesteps: int, *, train: bool) -> jax.Array:
    """Times [size] int32 for a loss: uniform at random in training, else spread evenly over 0..T-1.

    With the same times for every evaluation a validation loss differs between two models, not between two
    draws.
    """
    if train:
        return jax.random.randint(key, (size,), 0, num_timesteps)
    return (jnp.arange(size) * 2 + 1) * num_timesteps // (2 * size)


class Times(NamedTuple):
    """How training draws times: settings of `process` in a config, see `draw_path_times`."""

    times: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0

    def check(self) -> "Times":
        """Itself; ValueError for values that cannot be, or that nothing would read."""
        if self.times not in TIMES:
            raise ValueError(unknown("process.times", self.times, TIMES))
        if self.times == "uniform" and (self.time_mean, self.time_std) != (0.0, 1.0):
            raise ValueError("process.time_mean and process.time_std need process.times='logit_normal'")
        if not (self.time_std > 0 and 0 < self.time_shift < math.inf):
            raise ValueError(
                f"process.time_std {self.time_std} and process.time_shift {self.time_shift} must be positive"
            )
        return self


UNIFORM = Times()


def draw_path_times(key: jax.Array, size: int, num_timesteps: int, law: Times) -> jax.Array:
    """Times [size] int32, the nearest to random times u of the straight path.

    logit(u) ~ N(time_mean, time_std^2) for 'logit_normal', or u is uniform in (0, 1); then u is `shifted` by
    time_shift (Esser et al. 2024, sections 3.1 and 5.3.2). A positive mean is for more noise; JiT's time is
    1 - u, and its mean of -0.8 is 0.8 here.
    """
    if law.times == "uniform":
        u = jax.random.uniform(key, (size,))
    else:
        u = jax.nn.sigmoid(law.time_mean + law.time_std * jax.random.normal(key, (size,)))
    t = jnp.rint(num_timesteps * shifted(u, law.time_shift)).astype(jnp.int32) - 1
    return jnp.clip(t, 0, num_timesteps - 1)


HISTORY = 10  # values of a term that its probability rests on
_UNIFORM = 1e-3


def init_history(num_timesteps: int) -> dict[str, jax.Array]:
    """The empty history of L_vlb's terms: values [T, HISTORY], and how many [T] there were; float32."""
    return {"vb_history": jnp.zeros((num_timesteps, HISTORY)), "vb_count": jnp.zeros(num_timesteps)}


def importance(history: dict[str, jax.Array]) -> jax.Array:
    """p_t [T] of the module's docstring."""
    rms = jnp.sqrt(jnp.square(history["vb_history"]).mean(axis=1))
    size = len(rms)
    p = (1 - _UNIFORM) * rms / jnp.maximum(rms.sum(), 1e-30) + _UNIFORM / size
    return jnp.where((history["vb_count"] >= HISTORY).all(), p, 1.0 / size)


def draw_by_importance(
    key: jax.Array, size: int, history: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Times [size] int32 drawn from `importance`, and what their losses are multiplied by, 1 / (T p_t)."""
    p = importance(jax.lax.stop_gradient(history))
    t = jax.random.categorical(key, jnp.log(p), shape=(size,))
    return t.astype(jnp.int32), 1.0 / (len(p) * p[t])


def observe(history: dict[str, jax.Array], t: jax.Array, values: jax.Array) -> dict[str, jax.Array]:
    """The history after `values` [B] of the terms at t [B]; a time's newest value replaces its oldest."""

    def add(history, one):
        table, count = history["vb_history"], history["vb_count"]
        slot = count[one[0]].astype(jnp.int32) % HISTORY
        table = table.at[one[0], slot].set(one[1])
        return {"vb_history": table, "vb_count": count.at[one[0]].add(1.0)}, None

    return jax.lax.scan(add, history, (t, jax.lax.stop_gradient(values)))[0]


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t [B, ...] float32 for data x0 [B, ...], times t [B] int and standard normal noise [B, ...]."""
    dtype = _float_type(x0, noise)
    signal, sigma = signal_and_sigma(schedule, t, x0.ndim, dtype)
    return signal * x0.astype(dtype) + sigma * noise.astype(dtype)


def network_input(schedule: Schedule, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """What a network reads of x_t [B, ...] at times t [B]: z of a flow's straight path, else x_t itself."""
    if schedule.path_noise is None:
        return x_t
    return _at(schedule.path_scale, t, x_t.ndim, x_t.dtype) * x_t


def to_prediction(
    schedule: Schedule,
    output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    objective: str,
    learned_variance: bool,
) -> Prediction:
    """The Prediction in a network's output for x_t [B, ..., C] at times t [B].

    output: [B, ..., C], or [B, ..., 2C] with a learned variance; any float type, float32 from here on.
    Raises ValueError for another shape or an unknown objective.
    """
    prediction, var_frac = split_output(output, x_t.shape, learned_variance)
    x_t = x_t.astype(_float_type(x_t))
    signal, sigma = signal_and_sigma(schedule, t, x_t.ndim, x_t.dtype)
    if objective == "eps":
        return Prediction((x_t - sigma * prediction) / signal, prediction, var_frac)
    if objective == "x0":
        return Prediction(prediction, (x_t - signal * prediction) / sigma, var_frac)
    if objective == "v":
        return Prediction(signal * x_t - sigma * prediction, sigma * x_t + signal * prediction, var_frac)
    if objective == "flow":  # (1 - u, u k) = (signal, sigma) path_scale
        k = schedule.path_noise or 1.0
        total = k * signal + sigma
        x0, eps = k * x_t - sigma * prediction, x_t + signal * prediction
        return Prediction(x0 / total, eps / total, var_frac)
    raise ValueError(unknown("objective", objective, OBJECTIVES))


class Noised(NamedTuple):
    """Data x0 [B, ...], and x_t = q_sample(schedule, x0, t, noise) at times t [B]."""

    x0: jax.Array
    x_t: jax.Array
    t: jax.Array
    noise: jax.Array


def training_loss(
    schedule: Schedule,
    output: jax.Array,
    noised: Noised,
    *,
    objective: str,
    learned_variance: bool,
    weighting: str = "uniform",
    vlb_weight: float = 1e-3,
    data: str = "pixels",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss [B] float32 of every example, and its parts [B]: 'mse' and, with a learned variance, 'vb'.

    output is the network's for x_t and t; shapes as in `to_prediction`. weighting: see `loss_weights`.
    vlb_weight: lambda of L_hybrid (1e-3, that is T / 1000 of one term); math.inf: L_vlb = T vb_t alone.
    data is 'pixels' (8-bit values in [-1, 1]) or 'latents' (anything else, such as embeddings): a learned
    variance needs pixels, as its term at t = 0 is the likelihood of 8-bit values. Raises ValueError for
    settings that cannot go together.
    """
    x0, x_t, t, noise = noised
    if data not in ("pixels", "latents"):
        raise ValueError(unknown("data", data, ("pixels", "latents")))
    if learned_variance and (data != "pixels" or x0.ndim != 4):
        raise ValueError(
            "a learned variance is trained on the likelihood of 8-bit pixels [B, H, W, C], which is not "
            f"defined for {data} of shape {x0.shape}: set learned_variance=False"
        )
    dtype = _float_type(x0, x_t, noise)
    x0, x_t, noise = (y.astype(dtype) for y in (x0, x_t, noise))
    prediction, var_frac = split_output(output, x_t.shape, learned_variance)
    if objective == "eps":
        target = noise
    elif objective == "x0":
        target = x0
    elif objective == "v":
        signal, sigma = signal_and_sigma(schedule, t, x0.ndim, dtype)
        target = signal * noise - sigma * x0
    elif objective == "flow":
        target = (schedule.path_noise or 1.0) * noise - x0
    else:
        raise ValueError(unknown("objective", objective, OBJECTIVES))
    mse = _mean(jnp.square(target - prediction))
    metrics = {"mse": mse}
    loss = _at(loss_weights(schedule, objective, weighting), t, dtype=dtype) * mse
    if vlb_weight == math.inf:
        if not learned_variance:
            raise ValueError("L_vlb is the bound of a learned variance: set learned_variance=True")
        whole = to_prediction(schedule, output, x_t, t, objective, True)
        metrics["vb"] = vb_bits_per_dim(schedule, whole, x0, x_t, t)
        return schedule.num_timesteps * metrics["vb"], metrics
    if learned_variance:
        frozen = to_prediction(schedule, jax.lax.stop_gradient(prediction), x_t, t, objective, False)
        metrics["vb"] = vb_bits_per_dim(schedule, frozen._replace(var_frac=var_frac), x0, x_t, t)
        loss = loss + vlb_weight * schedule.num_timesteps * metrics["vb"]
    return loss, metrics


def vb_bits_per_dim(
    schedule: Schedule, prediction: Prediction, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """The term of the variational bound at t [B], in bits per dimension: [B] float32.

    x0: 8-bit pixels in [-1, 1], [B, H, W, C]; prediction has a var_frac. Nothing is clipped, as in training.
    """
    tables = two_time(schedule, np.arange(schedule.num_timesteps)[::-1])
    dtype = _float_type(x0, prediction.x0)
    log_beta = _at(tables.log_beta[::-1], t, x0.ndim, dtype)
    log_beta_tilde = _at(tables.log_beta_tilde[::-1], t, x0.ndim, dtype)
    coef_x0 = _at(tables.coef_x0[::-1], t, x0.ndim, dtype)
    first = (t == 0).reshape(-1, *[1] * (x0.ndim - 1))
    return vb_of_step(prediction, x0, log_beta, log_beta_tilde, coef_x0, first)


def vb_of_step(
    prediction: Prediction,
    x0: jax.Array,
    log_beta: jax.Array,
    log_beta_tilde: jax.Array,
    coef_x0: jax.Array,
    last: jax.Array,
) -> jax.Array:
    """The term of one step from t to s, in bits per dimension: [B] float32.

    The KL of the module's docstring, or the negative log likelihood of x0 where `last` (s is the clean end).
    The tables' entries of the step, see `schedules.TwoTime`, and `last` are broadcastable to x0 [B, H, W, C].
    """
    assert prediction.var_frac is not None
    log_var = prediction.var_frac * log_beta + (1.0 - prediction.var_frac) * log_beta_tilde
    # Both means have the same term in x_t, so their difference is that of x0 and free of cancellation.
    gap = coef_x0 * (prediction.x0 - x0)
    ratio = log_beta_tilde - log_var
    kl = 0.5 * (jnp.expm1(ratio) - ratio + jnp.square(gap) * jnp.exp(-log_var))
    # At the last step the mean is the predicted x0 itself: coef_x0 is 1 and the coefficient of x_t is 0.
    nll = -discretized_log_likelihood(x0, prediction.x0, 0.5 * log_var)
    return _mean(jnp.where(last, nll, kl)) / math.log(2.0)


def discretized_log_likelihood(x0: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """log of the mass, in nats, that N(mean, exp(log_std)^2) puts on the 8-bit bin of x0.

    x0 is in [-1, 1] and bins are 2/255 wide; the outermost bins reach to infinity (Ho et al. 2020, equation
    13). The normal distribution function is (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2, and masses are
    held above 1e-12, where gradients end.
    """
    inv_std = jnp.exp(-log_std)
    upper = _normal_cdf((x0 - mean + 1.0 / 255.0) * inv_std)
    lower = _normal_cdf((x0 - mean - 1.0 / 255.0) * inv_std)
    mass = jnp.where(x0 < -0.999, upper, jnp.where(x0 > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def split_output(
    output: jax.Array, shape: tuple[int, ...], learned_variance: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The prediction and the variance fraction (or None), float32, in an output for x_t of `shape`."""
    expected = (*shape[:-1], shape[-1] * (2 if learned_variance else 1))
    if output.shape != expected:
        raise ValueError(
            f"the network's output has shape {output.shape}, but with learned_variance={learned_variance} "
            f"and x_t of shape {shape} it must be {expected}"
        )
    output = output.astype(_float_type(output))
    if not learned_variance:
        return output, None
    prediction, raw = jnp.split(output, 2, axis=-1)
    return prediction, (raw + 1.0) / 2.0


def signal_and_sigma(
    schedule: Schedule, t: jax.Array, ndim: int, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t [B], of shape [B, 1, ...] with `ndim` axes."""
    tables = np.sqrt(schedule.alpha_bar), np.sqrt(1.0 - schedule.alpha_bar)
    signal, sigma = (_at(table, t, ndim, dtype) for table in tables)
    return signal, sigma


def _float_type(*arrays: jax.Array):
    """float32, or float64 where an array has it: networks may compute in less, none of this does."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def _at(table: np.ndarray, t: jax.Array, ndim: int = 1, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(table, dtype)[t].reshape(-1, *[1] * (ndim - 1))


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def _normal_cdf(z: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

"""Likelihood of a diffusion model: the variational bound on -log2 p(x0), in bits per dimension.

    bpd = KL(q(x_T | x0) || N(0, I))  +  sum over steps t -> s of KL(q(x_s | x_t, x0) || p(x_s | x_t))
          -  log p(x0 | x_t) of the last step

all divided by the number of dimensions and log 2 (Ho et al. 2020, equation 5; the last step is their
discretised decoder, equation 13). A walk of fewer steps has a bound of its own, which is looser (Nichol &
Dhariwal 2021, section 4).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion.process import Denoiser, q_sample, vb_of_step
from dalle2_jax.models.diffusion.schedules import Schedule, two_time


def prior_bits(schedule: Schedule, x0: jax.Array, t: int) -> jax.Array:
    """KL(q(x_t | x0) || N(0, I)) in bits per dimension [B], of x0 [B, ...], t the walk's first time."""
    alpha_bar = float(schedule.alpha_bar[t])
    # 0.5 (mean^2 + var - 1 - log var) with mean = sqrt(alpha_bar) x0 and var = 1 - alpha_bar
    kl = 0.5 * (alpha_bar * (jnp.square(x0) - 1.0) - math.log1p(-alpha_bar))
    return kl.mean(axis=tuple(range(1, x0.ndim))) / math.log(2.0)


def bits_per_dim(
    denoise: Denoiser,
    schedule: Schedule,
    keys: jax.Array,
    x0: jax.Array,
    timesteps: np.ndarray,
    var_frac: float | None = None,
) -> dict[str, jax.Array]:
    """The bound of 8-bit pictures x0 [B, H, W, C] in [-1, 1], for the walk down `timesteps` [n].

    The noise of a picture at each time is drawn from its key, of `keys` [B], and the time. var_frac: of the
    reverse variance, where the denoiser has none. Returns 'bpd' [B], 'prior' [B], 'terms' [n, B] in the order
    of `timesteps`, and 'mse' [n, B], that of eps; float32.
    """
    steps = two_time(schedule, timesteps)
    rows = dict(log_beta=steps.log_beta, log_beta_tilde=steps.log_beta_tilde, coef_x0=steps.coef_x0)
    table = {name: jnp.asarray(row, x0.dtype) for name, row in rows.items()}
    table |= {"t": jnp.asarray(steps.t), "last": jnp.arange(len(steps.t)) == len(steps.t) - 1}

    def term(c):
        t = jnp.full(len(x0), c["t"], jnp.int32)
        draw = functools.partial(jax.random.normal, shape=x0.shape[1:], dtype=x0.dtype)
        noise = jax.vmap(lambda key: draw(jax.random.fold_in(key, c["t"])))(keys)
        prediction = denoise(q_sample(schedule, x0, t, noise), t)
        if var_frac is not None:
            prediction = prediction._replace(var_frac=var_frac)
        of_step = (c[name] for name in ("log_beta", "log_beta_tilde", "coef_x0", "last"))
        mse = jnp.square(prediction.eps - noise).mean(axis=tuple(range(1, x0.ndim)))
        return vb_of_step(prediction, x0, *of_step), mse

    terms, mse = jax.lax.map(term, table)
    prior = prior_bits(schedule, x0, int(steps.t[0]))
    return {"bpd": terms.sum(axis=0) + prior, "prior": prior, "terms": terms, "mse": mse}

"""Bits per dimension against an independent recurrence, closed forms, and numerical integrals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from dalle2_jax.models.diffusion import gaussian, likelihood, process, sampling, schedules

T = 60
LINEAR = schedules.make_schedule("linear", T)
KEY = jax.random.key(0)


def best_denoiser(schedule, scale):
    """The exact denoiser of data N(0, scale^2): E[x0 | x_t] is linear in x_t."""
    alpha_bar = jnp.asarray(schedule.alpha_bar)

    def denoise(x_t, t):
        a = alpha_bar[t].reshape(-1, *[1] * (x_t.ndim - 1)).astype(x_t.dtype)
        x0 = jnp.sqrt(a) * scale**2 / (a * scale**2 + 1 - a) * x_t
        return process.Prediction(x0, (x_t - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a))

    return denoise


@pytest.mark.parametrize("var_frac", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [T, 7])
def test_the_bound_is_that_of_an_independent_recurrence(var_frac, steps):
    """In float64: betas of the kept times, posteriors by Bayes' rule, KL between textbook Gaussians."""
    with jax.enable_x64(True):
        levels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3))
        x0 = jnp.asarray(levels / 127.5 - 1.0, jnp.float64)
        times = schedules.space_timesteps(steps, T)
        denoise = best_denoiser(LINEAR, 0.5)
        keys = jax.random.split(KEY, 2)
        found = likelihood.bits_per_dim(denoise, LINEAR, keys, x0, times, var_frac)
        x0, total = np.asarray(x0), 0.0
        bars = np.append(LINEAR.alpha_bar[times[::-1]][::-1], 1.0)
        var_tilde = [None] * steps
        for i in range(steps):  # q(x_s | x_t, x0) from q(x_s | x0) and q(x_t | x_s): precisions add
            alpha = bars[i] / bars[i + 1]
            if i < steps - 1:
                var_tilde[i] = 1 / (1 / (1 - bars[i + 1]) + alpha / (1 - alpha))
        var_tilde[-1] = var_tilde[-2]
        for i, t in enumerate(times):
            folded = [jax.random.fold_in(key, t) for key in keys]
            noise = np.stack([jax.random.normal(key, x0.shape[1:], jnp.float64) for key in folded])
            x_t = np.sqrt(bars[i]) * x0 + np.sqrt(1 - bars[i]) * noise
            guess = np.asarray(denoise(jnp.asarray(x_t), jnp.full(2, t)).x0)
            alpha = bars[i] / bars[i + 1]
            beta = 1 - alpha
            var = np.exp(var_frac * np.log(beta) + (1 - var_frac) * np.log(var_tilde[i]))
            if i == steps - 1:
                cdf = lambda z: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # noqa: E731
                low, high = (cdf((x0 - guess + side / 255) / np.sqrt(var)) for side in (-1, 1))
                mass = np.where(x0 < -0.999, high, np.where(x0 > 0.999, 1 - low, high - low))
                term = -np.log(np.maximum(mass, 1e-12))
            else:
                precise = var_tilde[i] / (1 - bars[i + 1])
                mean, model = (
                    precise * np.sqrt(bars[i + 1]) * clean + var_tilde[i] * np.sqrt(alpha) / beta * x_t
                    for clean in (x0, guess)
                )
                term = 0.5 * (np.log(var / var_tilde[i]) - 1 + (var_tilde[i] + (mean - model) ** 2) / var)
            term = term.mean(axis=(1, 2, 3)) / math.log(2)
            np.testing.assert_allclose(found["terms"][i], term, rtol=1e-10, atol=1e-12)
            total = total + term
        prior = 0.5 * (bars[0] * x0**2 + 1 - bars[0] - 1 - np.log(1 - bars[0]))
        prior = prior.mean(axis=(1, 2, 3)) / math.log(2)
        np.testing.assert_allclose(found["prior"], prior, rtol=1e-10)
        np.testing.assert_allclose(found["bpd"], total + prior, rtol=1e-10)


def test_the_bound_lies_above_the_entropy_of_gaussian_data_and_falls_with_the_steps():
    """Data N(0, 0.25^2) on 256 levels; its entropy by a numerical integral of the bins."""
    edges = np.append(np.append(-np.inf, (np.arange(255) + 0.5) / 127.5 - 1), np.inf)
    mass = np.diff(stats.norm.cdf(edges / 0.25))
    assert mass.sum() == pytest.approx(integrate.quad(stats.norm(0, 0.25).pdf, -5, 5)[0], abs=1e-9)
    entropy = -(mass * np.log2(np.maximum(mass, 1e-300))).sum()
    levels = np.random.default_rng(1).choice(256, (64, 8, 8, 3), p=mass)
    x0 = jnp.asarray(levels / 127.5 - 1.0, jnp.float32)
    schedule, keys = schedules.make_schedule("linear", 1000), jax.random.split(KEY, 64)
    bits = [
        likelihood.bits_per_dim(best_denoiser(schedule, 0.25), schedule, keys, x0, times, 1.0)["bpd"]
        for times in (schedules.space_timesteps(n, 1000) for n in (20, 100, 1000))
    ]
    bounds = [float(one.mean()) for one in bits]  # beta is nearly the right variance of wide data
    assert bounds[0] > bounds[1] > bounds[2] > entropy - 0.02
    assert bounds[2] < entropy + 0.1


def test_the_bound_of_a_stages_diffusion_uses_its_variance():
    """A fixed variance is the fraction f; a learned one comes from the network."""
    common = dict(schedule=LINEAR, objective="x0", weighting="uniform", num_steps=5, spacing="uniform")
    common |= dict(method="ddpm", eta=0.0)
    x0 = jnp.asarray(np.random.default_rng(2).integers(0, 256, (2, 4, 4, 3)) / 127.5 - 1, jnp.float32)

    def bits(fraction, learned):
        made = gaussian.GaussianDiffusion(
            **common, learned_variance=learned, fixed_variance=0.0 if learned else fraction
        )

        def network(x_t, t):
            mean = best_denoiser(LINEAR, 0.6)(x_t, t).x0
            raw = jnp.full_like(mean, 2 * fraction - 1)  # f = (raw + 1) / 2
            return jnp.concatenate([mean, raw], axis=-1) if learned else mean

        return made.bits_per_dim(network, jax.random.split(KEY, 2), x0, 9)["bpd"]

    for fraction in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(bits(fraction, False), bits(fraction, True), rtol=1e-5)
    assert np.abs(bits(0.0, False) - bits(1.0, False)).min() > 1e-3
    with pytest.raises(ValueError, match="fixed_variance 0.5 must be"):
        gaussian.GaussianDiffusion(**common, learned_variance=True, fixed_variance=0.5)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_ddpm_with_a_fixed_variance_draws_gaussian_data_with_the_right_spread(fraction):
    """The variance of x follows the recurrence of its coefficients."""
    schedule, scale = schedules.make_schedule("linear", 100), 0.5
    steps = schedules.two_time(schedule, schedules.space_timesteps(100, 100))
    sampler = sampling.ddpm(steps, fraction)
    keys = jax.random.split(KEY, 64)
    x_T = sampling.init_noise(keys, (16, 16, 1))
    drawn = sampling.walk(best_denoiser(schedule, scale), sampler, x_T, keys)
    variance = 1.0
    for i in range(100):
        a = steps.alpha_bar_t[i]
        gain = steps.coef_x0[i] * np.sqrt(a) * scale**2 / (a * scale**2 + 1 - a) + steps.coef_x_t[i]
        log_var = fraction * steps.log_beta[i] + (1 - fraction) * steps.log_beta_tilde[i]
        variance = gain**2 * variance + (np.exp(log_var) if i < 99 else 0.0)
    assert float(jnp.var(drawn)) == pytest.approx(variance, rel=5 * math.sqrt(2 / drawn.size))
    assert math.sqrt(variance) == pytest.approx(scale, rel=0.1)


def test_the_log_snr_schedule_is_that_of_its_paper():
    """lambda(u) = -2 log tan(a u + b), from 20 down to -20; doubling T keeps every second time."""
    schedule = schedules.make_schedule("logsnr", 4096)
    u = np.arange(1, 4097) / 4096
    b = np.arctan(np.exp(-10))
    a = np.arctan(np.exp(10)) - b
    assert [-2 * np.log(np.tan(a * end + b)) for end in (0, 1)] == pytest.approx([20, -20])
    np.testing.assert_allclose(np.log(schedule.snr)[:-1], (-2 * np.log(np.tan(a * u + b)))[:-1], rtol=1e-9)
    assert np.log(schedule.snr[-1]) == pytest.approx(-20, abs=1e-3)
    finer = schedules.make_schedule("logsnr", 8192)
    np.testing.assert_allclose(finer.alpha_bar[1::2], schedule.alpha_bar, rtol=1e-12)
    assert np.log(schedules.make_schedule("logsnr", 1 << 16).snr[0]) > 17

"""Samplers with denoisers whose answers are known: oracles, Gaussian data, a mixture; and the wrappers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import guidance, process, sampling, schedules
from dalle2_jax.models.diffusion.process import Prediction

COSINE = schedules.make_schedule("cosine")
SHAPE = (4, 4, 3)


def keys_of(seed, n):
    return jax.random.split(jax.random.key(seed), n)


init_noise = jax.jit(sampling.init_noise, static_argnums=1)


def walk(denoise, keys, num_steps, shape=SHAPE, spacing="uniform", **options):
    return walk_from(denoise, init_noise(keys, shape), keys, num_steps, spacing, **options)


def walk_from(denoise, x_T, keys, num_steps, spacing="uniform", **options):
    """The walk from x_T as one program."""
    times = schedules.space_timesteps(num_steps, 1000, spacing)
    sample = jax.jit(lambda x_T, keys: sampled(denoise, x_T, keys, times, **options))
    return jax.device_get(sample(x_T, keys))


def sampled(denoise, x_T, keys, times, method="ddpm", resample=1, return_path=False, **options):
    """The walk of a sampler with its options; to be traced."""
    steps = schedules.two_time(COSINE, times)
    sampler = sampling.SAMPLERS[method](steps, **options)
    if resample != 1:
        sampler = sampling.resampled(sampler, steps, resample)
    return sampling.walk(denoise, sampler, x_T, keys, return_path=return_path)


def slow(*values):
    """A case that others differ from in the number of steps alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def inverted(denoise, x0, num_steps):
    times = schedules.space_timesteps(num_steps)
    return jax.device_get(jax.jit(lambda x0: sampling.invert(denoise, COSINE, x0, timesteps=times))(x0))


def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def from_x0(x0, x_t, t, var_frac=None):
    """The Prediction of a denoiser that answers x0."""
    signal, sigma = process.signal_and_sigma(COSINE, t, x_t.ndim)
    x0 = jnp.broadcast_to(x0, x_t.shape)
    return Prediction(x0, (x_t - signal * x0) / sigma, var_frac)


def smooth_denoiser(x_t, t):
    """A denoiser that depends on x_t and t, with a variance fraction: a stand-in for a network."""
    wave = jnp.sin(3 * x_t + 0.01 * t.reshape(-1, *[1] * (x_t.ndim - 1)))
    return from_x0(0.9 * wave, x_t, t, 0.5 + 0.4 * jnp.cos(5 * x_t))


# Walks


@pytest.mark.parametrize(
    "options",
    [
        dict(variance="learned"),
        dict(method="ddim"),
        dict(method="ddim", eta=1.0),
        dict(method="analytic", eps_sq=np.ones(1000, np.float32)),
        dict(method="dpm++"),
    ],
)
@pytest.mark.parametrize("num_steps", [1, slow(4), 27, slow(250)])
def test_an_oracle_gives_back_the_data_exactly(num_steps, options):
    x0 = uniform(9, 3, *SHAPE)

    def oracle(x_t, t):
        return from_x0(x0, x_t, t, jnp.full(x_t.shape, 0.3))

    np.testing.assert_array_equal(walk(oracle, keys_of(0, 3), num_steps, **options), x0)


@pytest.mark.parametrize("options", [dict(variance="fixed_small"), dict(method="ddim")])
def test_the_denoiser_sees_original_times(options):
    """Trap: a respaced index in the place of the time."""

    seen = []

    def record(x_t, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return from_x0(0.0, x_t, t)

    walk(record, keys_of(0, 2), 25, (1,), **options)
    jax.effects_barrier()
    expected = [round(i * 999 / 24) for i in range(25)][::-1]
    assert expected[:3] == [999, 957, 916] and expected[-2:] == [42, 0]
    assert [t.tolist() for t in seen] == [[t, t] for t in expected]
    assert seen[0].dtype == np.int32


@pytest.mark.parametrize(
    "options",
    [
        dict(variance="fixed_small"),
        dict(variance="fixed_small", resample=2),
        dict(method="ddim"),
        dict(method="ddim", eta=1.0),
        dict(method="analytic", eps_sq=np.ones(1000, np.float32)),
        dict(method="dpm++"),
    ],
)
def test_sampling_shows_the_network_what_training_showed_it(options):
    """Trap 16: what training gives the network and what sampling does have other statistics. With a perfect
    predictor every x_t on the walk is sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) N(0, 1)."""
    n, num_steps = 20_000, 9
    x0 = uniform(4, n, 1)
    tables = schedules.two_time(COSINE, schedules.space_timesteps(num_steps))
    _, path = walk(
        lambda x_t, t: from_x0(x0, x_t, t), keys_of(1, n), num_steps, (1,), return_path=True, **options
    )
    resample = options.get("resample", 1)
    for k, x in enumerate(path[: (num_steps - 1) * resample]):
        again = k % resample < resample - 1  # back at the time that the step began from
        alpha_bar = (tables.alpha_bar_t if again else tables.alpha_bar_s)[k // resample]
        noise = (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
        assert_moments(noise, 0.0, 1.0)


GAUSSIAN_MEAN, GAUSSIAN_STD = 0.3, 0.5


def gaussian_denoiser(num_steps, spacing="uniform", mean=GAUSSIAN_MEAN, std=GAUSSIAN_STD):
    """The exact posterior mean for data N(mean, std^2), and the variance fraction that makes each reverse
    step exact.

    x0 given x_t is Gaussian with gain sqrt(a) std^2 / (a std^2 + 1 - a), a = alpha_bar[t], and variance
    std^2 (1 - a) / (a std^2 + 1 - a); x_s given x_t then has variance beta_tilde + coef_x0^2 times that.
    """
    tables = schedules.two_time(COSINE, schedules.space_timesteps(num_steps, 1000, spacing))
    a = tables.alpha_bar_t
    spread = a * std**2 + 1 - a
    exact = tables.beta_tilde + tables.coef_x0**2 * std**2 * (1 - a) / spread
    gap = tables.log_beta - tables.log_beta_tilde
    frac = (np.log(exact) - tables.log_beta_tilde) / np.where(gap == 0, 1.0, gap)
    gain, fraction, signal = (np.zeros(1000, np.float32) for _ in range(3))
    gain[tables.t], fraction[tables.t], signal[tables.t] = np.sqrt(a) * std**2 / spread, frac, np.sqrt(a)

    def denoise(x_t, t):
        at = [jnp.asarray(table)[t][:, None] for table in (gain, fraction, signal)]
        x0 = mean + at[0] * (x_t - at[2] * mean)
        return from_x0(x0, x_t, t, jnp.broadcast_to(at[1], x_t.shape))

    return denoise


def assert_moments(x, mean, std):
    n = x.size
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(n))
    assert float(x.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n))


@pytest.mark.parametrize("num_steps", [15, slow(27), slow(64), 250])
def test_ddpm_with_the_exact_variance_samples_gaussian_data_exactly(num_steps):
    """Up to the noise of the last step, which is left out: the last step returns the mean of x0 given x_0."""
    x = walk(gaussian_denoiser(num_steps), keys_of(num_steps, 4), num_steps, (40_000,))
    a = COSINE.alpha_bar[0]
    lost = 1 - (1 - a) / (
        a * GAUSSIAN_STD**2 + 1 - a
    )  # share of the variance in the mean of x0 given x at t = 0
    assert lost > 0.999
    assert_moments(x, GAUSSIAN_MEAN, GAUSSIAN_STD * math.sqrt(lost))


@pytest.mark.parametrize("num_steps", [15, 250])
def test_fixed_large_is_exact_for_unit_gaussians(num_steps):
    """For N(0, 1) x_t is N(0, 1) too, and the reverse step has variance beta (Ho et al. 2020, section
    3.2)."""
    denoise = gaussian_denoiser(num_steps, mean=0.0, std=1.0)
    assert_moments(walk(denoise, keys_of(1, 4), num_steps, (40_000,), variance="fixed_large"), 0.0, 1.0)
    small = walk(denoise, keys_of(1, 4), num_steps, (40_000,), variance="fixed_small")
    assert float(small.std()) < 1.0 - 0.3 / num_steps


@pytest.mark.parametrize(
    "num_steps, spacing", [(15, "uniform"), (27, "fast27"), slow(64, "uniform"), (250, "uniform")]
)
def test_ddim_of_gaussian_data_is_the_product_of_its_linear_steps(num_steps, spacing):
    """Trap: a walk that does not start at the noisiest time or does not end at alpha_bar = 1.

    With z = (x - sqrt(a) mean), a step multiplies z by sqrt(a_s) gain + sqrt(1 - a_s) (1 - sqrt(a) gain) /
    sqrt(1 - a), in float64 below; the data's own deviation is reached as the steps grow, first order in 1 /
    n.
    """
    times = schedules.space_timesteps(num_steps, 1000, spacing)
    a = COSINE.alpha_bar[times]
    a_s = np.append(a[1:], 1.0)
    gain = np.sqrt(a) * GAUSSIAN_STD**2 / (a * GAUSSIAN_STD**2 + 1 - a)
    factors = np.sqrt(a_s) * gain + np.sqrt(1 - a_s) * (1 - np.sqrt(a) * gain) / np.sqrt(1 - a)
    expected = float(np.prod(factors))
    x = walk(
        gaussian_denoiser(num_steps, spacing), keys_of(5, 4), num_steps, (40_000,), spacing, method="ddim"
    )
    # x_T is drawn without the mean sqrt(a[0]) mean of x at T-1, and that much times the product is missing.
    mean = GAUSSIAN_MEAN * (1 - math.sqrt(a[0]) * expected)
    assert_moments(x, mean, expected)
    assert expected == pytest.approx(GAUSSIAN_STD, rel=2.0 / num_steps)


@pytest.mark.parametrize("num_steps", [4, slow(15), slow(27), slow(64), 250])
def test_analytic_variance_samples_gaussian_data_exactly(num_steps):
    """E eps^2 of the exact denoiser is known, and the variance that follows is right for steps of any length,
    where ddpm's small one is too small."""
    denoise = gaussian_denoiser(num_steps)
    ab = COSINE.alpha_bar
    variance = GAUSSIAN_STD**2
    eps_sq = ((1 - ab) / (ab * variance + 1 - ab)).astype(np.float32)
    options = dict(method="analytic", eps_sq=eps_sq, data_variance=variance)
    x = walk(denoise, keys_of(3, 20_000), num_steps, (1,), **options)
    # the last step has no noise: what x0 still could be at the last time is missing
    last = variance * (1 - ab[0]) / (ab[0] * variance + 1 - ab[0])
    assert_moments(x, GAUSSIAN_MEAN, math.sqrt(variance - last))
    if num_steps == 4:
        small = walk(denoise, keys_of(3, 20_000), num_steps, (1,), variance="fixed_small")
        assert small.std() < 0.9 * x.std()


def test_the_analytic_variance_is_bounded_by_the_datas():
    ab = COSINE.alpha_bar[500]
    tables = schedules.two_time(COSINE, np.array([500, 400]))
    for m, expected in ((1.0, 0.0), (0.0, 0.25), (1 - 0.1 * ab / (1 - ab), 0.1), (2.0, 0.0)):
        found = sampling._analytic_variance(tables, np.full(1000, m, np.float32), 0.25)
        right = tables.beta_tilde + tables.coef_x0**2 * expected
        np.testing.assert_allclose(found[0], right[0], rtol=1e-4)


def test_dpm_solver_is_of_second_order():
    """The flow of Gaussian data is known: (x_t - sqrt(ab) m) / sqrt(ab s^2 + 1 - ab) never changes. The error
    of 2M falls at least with the square of the steps, that of ddim with the steps."""
    keys, end = keys_of(0, 64), COSINE.alpha_bar[-1]
    spread = math.sqrt(end * GAUSSIAN_STD**2 + 1 - end)
    z = (np.asarray(init_noise(keys, (1,))) - math.sqrt(end) * GAUSSIAN_MEAN) / spread
    error = {
        (method, n): float(
            np.abs(
                walk(gaussian_denoiser(n), keys, n, (1,), method=method) - (GAUSSIAN_MEAN + GAUSSIAN_STD * z)
            ).mean()
        )
        for method in ("ddim", "dpm++")
        for n in (40, 80)
    }
    assert error["ddim", 80] / error["ddim", 40] == pytest.approx(0.5, abs=0.1)
    assert error["dpm++", 80] / error["dpm++", 40] < 0.31
    assert all(error["dpm++", n] < error["ddim", n] / 10 for n in (40, 80))


@pytest.mark.parametrize("num_steps, within", [(15, 0.02), (27, 0.005), (64, 0.002), (250, 0.0005)])
def test_dpm_solver_keeps_the_spread_of_gaussian_data(num_steps, within):
    """Deterministic and linear here, so two points say what becomes of mean and standard deviation."""
    end = COSINE.alpha_bar[-1]
    mean, spread = math.sqrt(end) * GAUSSIAN_MEAN, math.sqrt(end * GAUSSIAN_STD**2 + 1 - end)
    x_T = np.array([[mean], [mean + spread]], np.float32)
    low, high = walk_from(gaussian_denoiser(num_steps), x_T, keys_of(0, 2), num_steps, method="dpm++")[:, 0]
    assert float(high - low) == pytest.approx(GAUSSIAN_STD, rel=within)
    assert float(low) == pytest.approx(GAUSSIAN_MEAN, abs=within)


@pytest.mark.parametrize("num_steps", [15, slow(64)])
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(num_steps):
    keys = keys_of(4, 2)
    ddim = walk(smooth_denoiser, keys, num_steps, method="ddim", eta=1.0, return_path=True)[1]
    ddpm = walk(smooth_denoiser, keys, num_steps, method="ddpm", variance="fixed_small", return_path=True)[1]
    # One step from a common state: rounding is chaotic over a whole walk of this denoiser.
    np.testing.assert_allclose(ddim[0], ddpm[0], atol=2e-5)
    linear_ddim = walk(gaussian_denoiser(num_steps), keys, num_steps, (50,), method="ddim", eta=1.0)
    linear_ddpm = walk(gaussian_denoiser(num_steps), keys, num_steps, (50,), variance="fixed_small")
    np.testing.assert_allclose(linear_ddim, linear_ddpm, atol=2e-4)


def test_a_learned_fraction_of_0_and_1_are_the_fixed_variances():
    def with_fraction(fraction):
        return lambda x_t, t: smooth_denoiser(x_t, t)._replace(var_frac=jnp.full(x_t.shape, fraction))

    keys = keys_of(6, 2)
    for fraction, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):
        learned = walk(with_fraction(fraction), keys, 8)
        np.testing.assert_allclose(learned, walk(smooth_denoiser, keys, 8, variance=variance), atol=1e-6)


def test_ddim_is_deterministic_given_the_first_noise():
    x_T, times = normal(0, 2, *SHAPE), schedules.space_timesteps(10)
    sample = jax.jit(lambda keys: sampled(smooth_denoiser, x_T, keys, times, method="ddim"))
    np.testing.assert_array_equal(*(sample(keys_of(seed, 2)) for seed in (0, 1)))


def test_the_path_ends_at_the_sample():
    keys = keys_of(2, 3)
    x0, path = walk(smooth_denoiser, keys, 7, return_path=True)
    assert path.shape == (7, 3, *SHAPE)
    np.testing.assert_array_equal(path[-1], x0)
    np.testing.assert_array_equal(walk(smooth_denoiser, keys, 7), x0)


# Keys


@pytest.mark.parametrize("options", [dict(), dict(method="ddim", eta=0.5)])
def test_a_sample_does_not_depend_on_its_batch(options):
    keys = keys_of(11, 5)
    together = walk(smooth_denoiser, keys, 6, **options)
    chosen = np.array([3, 1])
    np.testing.assert_array_equal(walk(smooth_denoiser, keys[chosen], 6, **options), together[chosen])
    assert len({float(x) for x in together[:, 0, 0, 0]}) == 5


def test_legacy_and_typed_keys_give_the_same_samples():
    typed = keys_of(11, 2)
    np.testing.assert_array_equal(
        walk(smooth_denoiser, jax.random.key_data(typed), 3), walk(smooth_denoiser, typed, 3)
    )


def test_noises_of_different_steps_and_the_first_are_independent():
    """With x0 = 0 and the large variance each step adds sqrt(beta) z to a multiple of x: solve the path for
    z."""
    keys, n = keys_of(3, 1), 20_000
    x_T = init_noise(keys, (n,))
    _, path = walk(lambda x, t: from_x0(0.0, x, t), keys, 5, (n,), variance="fixed_large", return_path=True)
    tables = schedules.two_time(COSINE, schedules.space_timesteps(5))
    states = np.concatenate([np.asarray(x_T)[None], np.asarray(path)], 0)[:, 0]
    z = [(states[i + 1] - tables.coef_x_t[i] * states[i]) / math.sqrt(tables.beta[i]) for i in range(4)]
    correlation = np.corrcoef(np.stack([states[0], *z]))
    assert np.abs(correlation - np.eye(5)).max() < 5 / math.sqrt(n)
    assert np.std(z, axis=1) == pytest.approx(np.ones(4), rel=5 / math.sqrt(2 * n))
    np.testing.assert_array_equal(states[-1], 0.0)  # no noise at the end


# Guidance, clipping, thresholding


def random_predictions(seed):
    x0, eps, frac = normal(seed, 3, 2, *SHAPE)
    return Prediction(x0, eps, frac)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 8.0])
def test_guidance_takes_the_variance_from_the_condition_bit_for_bit(scale):
    """Trap: a guided variance fraction leaves [0, 1]."""
    cond, uncond = random_predictions(0), random_predictions(1)
    guided = guidance.guide(cond, uncond, scale)
    np.testing.assert_array_equal(guided.var_frac, cond.var_frac)
    for name in ("x0", "eps"):
        c, u = getattr(cond, name), getattr(uncond, name)
        np.testing.assert_allclose(getattr(guided, name), u + scale * (c - u), atol=1e-5)


def test_scale_1_is_the_condition_exactly():
    cond, uncond = random_predictions(0), random_predictions(1)
    for one in (1.0, jnp.ones(2)):
        for got, expected in zip(guidance.guide(cond, uncond, one), cond, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_scales_are_per_sample_and_guided_wraps_a_pair():
    cond, uncond = random_predictions(0), random_predictions(1)

    def paired(x_t, t):
        np.testing.assert_array_equal(x_t, np.repeat(cond.x0, 2, axis=0))
        assert t.tolist() == [3, 3, 4, 4]
        return guidance.interleave(cond, uncond)

    denoise = guidance.guided(None, paired, jnp.array([2.0, 5.0]))
    got = denoise(cond.x0, jnp.array([3, 4]))
    for i, scale in enumerate((2.0, 5.0)):
        alone = guidance.guide(*jax.tree.map(lambda y, i=i: y[i : i + 1], (cond, uncond)), scale)
        np.testing.assert_array_equal(got.eps[i], alone.eps[0])
    without = guidance.guide(cond._replace(var_frac=None), uncond._replace(var_frac=None), 2.0)
    assert without.var_frac is None


def test_an_interval_guides_between_its_noise_levels_alone():
    """Kynkaanniemi et al. 2024: LO < noise level <= HI."""
    levels = COSINE.noise_level
    np.testing.assert_allclose(levels, np.sqrt(1 / COSINE.snr), rtol=1e-12)
    inside = guidance.times_inside(COSINE, (levels[300], levels[600]))
    np.testing.assert_array_equal(np.flatnonzero(inside), np.arange(301, 601))
    assert guidance.times_inside(COSINE, (0.0, 1e9)).all()
    cond, uncond = random_predictions(0), random_predictions(1)
    denoise = guidance.guided(lambda *_: cond, lambda *_: guidance.interleave(cond, uncond), 3.0, inside)
    expected = {300: cond, 301: guidance.guide(cond, uncond, 3.0), 600: guidance.guide(cond, uncond, 3.0)}
    for t, prediction in (expected | {601: cond}).items():
        got = jax.jit(denoise)(cond.x0, jnp.full(2, t))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, prediction)


@pytest.mark.parametrize(
    "interval", [(2.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (0.0, math.inf), (math.nan, 1.0), (1.0,)]
)
def test_an_interval_that_cannot_be_is_refused(interval):
    with pytest.raises(ValueError, match="must be two noise levels LO,HI with 0 <= LO < HI"):
        guidance.times_inside(COSINE, interval)


@pytest.mark.parametrize("options", [dict(method="ddim"), dict(method="dpm++")])
def test_steering_by_the_exact_classifier_samples_the_posterior(options):
    """Data N(m, s^2) seen through y = x + N(0, r^2): log p(y | x_t) is known, and so is p(x | y)."""
    y, r, m, s = 1.0, 0.4, GAUSSIAN_MEAN, GAUSSIAN_STD

    def log_p(x_t, t):
        signal, sigma = process.signal_and_sigma(COSINE, t, x_t.ndim)
        total = signal**2 * s**2 + sigma**2
        mean = m + s**2 * signal / total * (x_t - signal * m)
        variance = s**2 * sigma**2 / total + r**2
        return (-0.5 * (y - mean) ** 2 / variance).sum(axis=-1)

    denoise = gaussian_denoiser(200)
    variance = 1 / (1 / s**2 + 1 / r**2)
    mean = variance * (m / s**2 + y / r**2)
    x = walk(guidance.steered(denoise, COSINE, log_p, 1.0), keys_of(7, 4), 200, (5_000,), **options)
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(math.sqrt(variance), rel=0.05)
    off = walk(guidance.steered(denoise, COSINE, log_p, 0.0), keys_of(7, 4), 20, (50,), **options)
    np.testing.assert_allclose(off, walk(denoise, keys_of(7, 4), 20, (50,), **options), atol=1e-6)


def test_steering_keeps_x0_and_eps_consistent_and_scales_by_sample():
    x_t, t = normal(0, 2, *SHAPE), np.array([300, 700])
    steer = guidance.steered(
        smooth_denoiser, COSINE, lambda x, t: -jnp.square(x).sum((1, 2, 3)), np.array([0.0, 2.0], np.float32)
    )
    plain, got = jax.device_get((jax.jit(smooth_denoiser)(x_t, t), jax.jit(steer)(x_t, t)))
    np.testing.assert_array_equal(got.x0[0], plain.x0[0])
    assert np.abs(got.x0[1] - plain.x0[1]).min() > 0
    np.testing.assert_allclose(process.q_sample(COSINE, got.x0, t, got.eps), x_t, atol=1e-4)
    np.testing.assert_array_equal(got.var_frac, plain.var_frac)


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_clipping_re_derives_eps(limit):
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps must hold of the clipped x0; DDIM walks by that
    eps."""
    x_t, t = normal(2, 3, *SHAPE), np.array([0, 400, 999])

    def denoise(x_t, t):
        return process.to_prediction(COSINE, jnp.zeros((3, 4, 4, 6)), x_t, t, "eps", True)

    raw, clipped = jax.device_get(
        [jax.jit(f)(x_t, t) for f in (denoise, guidance.clip_x0(denoise, COSINE, limit))]
    )
    assert float(np.abs(raw.x0).max()) > 1000  # eps-prediction at t = 999 divides by sqrt(alpha_bar) = 5e-5
    np.testing.assert_array_equal(clipped.x0, np.clip(raw.x0, -limit, limit))
    np.testing.assert_allclose(process.q_sample(COSINE, clipped.x0, t, clipped.eps), x_t, atol=1e-5)
    np.testing.assert_array_equal(clipped.var_frac, raw.var_frac)


def test_dynamic_threshold_is_imagens_rule_per_sample():
    x0 = np.array([[0.5, -0.2, 0.1, 0.9], [4.0, -2.0, 1.0, 0.0]], np.float32)
    x_t, t = np.ones((2, 4), np.float32), np.array([10, 10])
    denoise = guidance.dynamic_threshold(lambda x_t, t: from_x0(x0, x_t, t), COSINE, 50.0)
    # |x0| of the second sample has median 1.5; that of the first is below 1, which leaves it alone.
    got = jax.jit(denoise)(x_t, t)
    np.testing.assert_allclose(got.x0, [x0[0], [1.0, -1.0, 1 / 1.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(process.q_sample(COSINE, got.x0, t, got.eps), x_t, atol=1e-6)


# Inversion


def mixture_denoiser(x_t, t):
    """The exact posterior mean for the mixture of N(-0.6, 0.15^2) and N(0.6, 0.15^2), per dimension."""
    signal, sigma = process.signal_and_sigma(COSINE, t, x_t.ndim)
    variance = 0.15**2 * signal**2 + sigma**2
    right = jax.nn.sigmoid(2 * 0.6 * signal * x_t / variance)
    x0 = sum(
        share * (m + 0.15**2 * signal / variance * (x_t - signal * m))
        for share, m in ((right, 0.6), (1 - right, -0.6))
    )
    return Prediction(x0, (x_t - signal * x0) / sigma)


def test_inversion_returns_ever_closer_as_steps_grow():
    """The round trip of an analytic mixture: first order, so half the error with twice the steps; x_T is
    N(0, 1).

    The size of the error is the mixture's: wider modes than these have up to twice as much at 100 steps.
    """
    x0 = np.float32(0.6) * np.sign(uniform(0, 4, 500)) + np.float32(0.15) * normal(0, 4, 500)
    errors = {}
    for n in (25, 50, 100, 200):
        x_T = inverted(mixture_denoiser, x0, n)
        back = walk_from(mixture_denoiser, x_T, keys_of(0, 4), n, method="ddim")
        errors[n] = float(np.abs(back - x0).mean())
        assert float(x_T.std()) == pytest.approx(1.0, abs=0.15)
    assert errors[100] < 0.01
    for n in (25, 50, 100):
        assert errors[2 * n] / errors[n] == pytest.approx(0.5, abs=0.1)


def test_inversion_of_known_noise_finds_it():
    """For unit Gaussian data the flow is a rotation: x_T of x0 is x0 itself, up to the first-order error."""

    def denoise(x_t, t):
        signal, sigma = process.signal_and_sigma(COSINE, t, x_t.ndim)
        return Prediction(signal * x_t, sigma * x_t)

    x0 = normal(0, 2, 50)
    np.testing.assert_allclose(inverted(denoise, x0, 250), x0, rtol=0.01)


# Borders


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variance="small"), "unknown variance"),
        (dict(method="ddim", eta=1.5), r"eta must be in \[0, 1\]"),
        (dict(variance="learned"), "use 'fixed_small'"),
    ],
)
def test_mistakes_are_answered_with_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        walk(lambda x_t, t: from_x0(0.0, x_t, t), keys_of(0, 2), 3, **options)


def test_one_key_a_sample():
    with pytest.raises(ValueError, match="2 keys for 3 samples"):
        sampled(smooth_denoiser, jnp.zeros((3, *SHAPE)), keys_of(0, 2), schedules.space_timesteps(3))


def test_sampling_is_jittable_with_a_traced_guidance_scale():
    keys = keys_of(0, 2)

    @jax.jit
    def run(x_T, keys, scale):
        def paired(x_t, t):
            both = smooth_denoiser(x_t, t)
            is_cond = (jnp.arange(len(t)) % 2 == 0).reshape(-1, 1, 1, 1)
            return from_x0(jnp.where(is_cond, both.x0, 0.0), x_t, t, both.var_frac)

        denoise = guidance.clip_x0(guidance.guided(smooth_denoiser, paired, scale), COSINE)
        return sampled(denoise, x_T, keys, schedules.space_timesteps(5))

    one, two = (np.asarray(run(init_noise(keys, SHAPE), keys, scale)) for scale in (1.0, 2.0))
    np.testing.assert_allclose(one, walk(guidance.clip_x0(smooth_denoiser, COSINE), keys, 5), atol=1e-3)
    assert np.abs(two - one).max() > 0.01


# Keeping what is known


@pytest.mark.parametrize(
    "options", [dict(variance="learned"), dict(method="ddim"), dict(method="dpm++"), dict(resample=3)]
)
def test_what_is_known_comes_back_and_the_rest_is_drawn(options):
    keys, known = keys_of(5, 3), uniform(8, 3, *SHAPE)
    free = walk(smooth_denoiser, keys, 6, **options)

    @jax.jit
    def of(x_T, repaint):
        denoise = guidance.keep_known(smooth_denoiser, COSINE, known, repaint)
        return sampled(denoise, x_T, keys, schedules.space_timesteps(6), **options)

    def drawn(repaint):
        return np.asarray(of(init_noise(keys, SHAPE), repaint))

    whole = np.ones((3, *SHAPE[:2], 1), np.float32)
    np.testing.assert_array_equal(drawn(0 * whole), known)
    np.testing.assert_allclose(drawn(whole), free, atol=2e-4)  # XLA rounds another program otherwise
    half = whole.copy()
    half[:, :2] = 0
    np.testing.assert_array_equal(drawn(half)[:, :2], known[:, :2])
    assert np.abs(drawn(half)[:, 2:] - known[:, 2:]).mean() > 0.1


def test_resampling_makes_the_drawn_part_fit_the_known():
    """Two correlated Gaussian numbers, of which one is known: E[second | first] = rho first (section 3 of
    RePaint's case, here with the exact denoiser). Once through, the drawn one hears of the known one late."""
    rho, count = 0.9, 4096
    cov, ab = np.array([[1.0, rho], [rho, 1.0]]), COSINE.alpha_bar[:, None, None]
    gains = (np.sqrt(ab) * cov @ np.linalg.inv(ab * cov + (1 - ab) * np.eye(2))).astype(np.float32)

    def denoise(x_t, t):
        x0 = jnp.einsum("ij,bjc->bic", jnp.asarray(gains)[t[0]], x_t)
        s, sg = process.signal_and_sigma(COSINE, t, x_t.ndim)
        return Prediction(x0, (x_t - s * x0) / sg, None)

    known, repaint = (np.tile(np.float32(x)[:, None], (count, 1, 1)) for x in ([1.5, 0.0], [0.0, 1.0]))
    kept = guidance.keep_known(denoise, COSINE, known, repaint)
    errors = {}
    for resample in (1, 4, 16):
        x = walk(kept, keys_of(1, count), 25, (2, 1), variance="fixed_small", resample=resample)
        np.testing.assert_array_equal(x[:, 0], known[:, 0])
        errors[resample] = float(np.abs(x[:, 1].mean() - rho * 1.5))
    assert errors[16] < 0.05 and errors[16] < errors[4] < errors[1], errors


def test_resampling_keeps_the_distribution():
    """Without anything known, more takes of a step sample the same Gaussian data."""
    keys = keys_of(2, 2000)
    x = walk(gaussian_denoiser(27), keys, 27, (8,), variance="learned", resample=3)
    assert_moments(x, GAUSSIAN_MEAN, GAUSSIAN_STD)


def test_resampling_is_refused_where_it_has_no_meaning():
    for options in (dict(resample=0), dict(resample=2, method="dpm++")):
        with pytest.raises(ValueError, match="resample must be 1 or more"):
            walk(smooth_denoiser, keys_of(0, 1), 4, **options)


def test_multistep_names_the_samplers_that_read_the_step_before():
    steps = schedules.two_time(schedules.make_schedule("cosine", 8), np.array([7, 3, 0]))
    more = {"analytic": dict(eps_sq=jnp.ones(8))}
    made = {name: sampler(steps, **more.get(name, {})) for name, sampler in sampling.SAMPLERS.items()}
    assert {name for name, one in made.items() if one.multistep} == set(sampling.MULTISTEP)

"""Flow matching: its straight path, velocity, times and samplers, against closed forms and loops in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import gaussian, guidance, process, sampling, schedules
from dalle2_jax.models.stages import decoder, prior, upsampler

FLOW = schedules.make_schedule("flow")
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
SHAPE = (2, 2, 1)


def diffusion(schedule=FLOW, **changes):
    settings = dict(objective="flow", learned_variance=False, weighting="uniform", limit=None)
    settings |= dict(num_steps=6, spacing="trailing", method="euler", eta=0.0)
    return gaussian.GaussianDiffusion(schedule=schedule, **settings | changes)


def sample(own, network, x_T, **wrappers):
    """What a diffusion draws from x_T [2, ...] and its path, as one program."""

    def draw(x_T):
        denoise = own.denoiser(network, **wrappers)
        start = gaussian.Start(x_T=x_T)
        return own.sample(denoise, KEYS, x_T.shape[1:], start=start, return_path=True)

    return jax.device_get(jax.jit(draw)(x_T))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def at(t, ndim):
    """u of integer times t of T = 1000, to be broadcast."""
    return ((t + 1) / 1000).reshape(-1, *[1] * (ndim - 1))


# The path and what a network predicts


@pytest.mark.parametrize("name, k", [("flow", 1.0), ("flow:2", 2.0)])
def test_the_network_reads_the_straight_path(name, k):
    schedule, u = schedules.make_schedule(name, 8), np.arange(1, 9) / 8
    np.testing.assert_allclose(schedule.snr, ((1 - u) / (k * u)) ** 2, rtol=1e-12)
    np.testing.assert_allclose(schedule.path_time, u, rtol=1e-12)
    assert schedule.alpha_bar[-1] == 0 and schedule.noise_level[-1] == math.inf
    x0, eps, t = normal(0, 8, 3), normal(1, 8, 3), np.arange(8)
    z = process.network_input(schedule, process.q_sample(schedule, x0, t, eps), t)
    np.testing.assert_allclose(z, (1 - u[:, None]) * x0 + u[:, None] * k * eps, atol=1e-6)


def test_other_networks_read_x_t_itself():
    x_t = normal(0, 2, 3)
    assert process.network_input(schedules.make_schedule("cosine"), x_t, np.array([3, 4])) is x_t
    same_noise = schedules.Schedule("mine", FLOW.alpha_bar)
    assert same_noise != FLOW and schedules.make_schedule("flow") == FLOW


@pytest.mark.parametrize("name", ["flow", "flow:2", "cosine"])
@pytest.mark.parametrize("objective", ["flow", "x0", "v"])
def test_a_prediction_determines_x0_and_eps(name, objective):
    schedule, t = schedules.make_schedule(name), np.array([50, 400, 998, 999])
    x0, eps = normal(0, 4, 3), normal(1, 4, 3)
    signal, sigma = process.signal_and_sigma(schedule, t, 2)
    k = 2.0 if name == "flow:2" else 1.0
    output = {"flow": k * eps - x0, "x0": x0, "v": signal * eps - sigma * x0}[objective]
    x_t = process.q_sample(schedule, x0, t, eps)
    found = process.to_prediction(schedule, jnp.asarray(output), x_t, t, objective, False)
    np.testing.assert_allclose(found.x0, x0, atol=2e-5)
    np.testing.assert_allclose(found.eps, eps, atol=2e-5)


@pytest.mark.parametrize("name", ["flow", "flow:2"])
def test_x0_is_trained_on_the_error_of_its_velocity(name):
    """JiT: (z - x0) / max(u, 0.05) is the velocity of data and of prediction alike."""
    schedule, t = schedules.make_schedule(name), np.array([9, 48, 49, 300, 999])
    x0, eps, guess = normal(0, 5, 6), normal(1, 5, 6), normal(2, 5, 6)
    x_t = process.q_sample(schedule, x0, t, eps)
    noised, options = process.Noised(x0, x_t, t, eps), dict(learned_variance=False)
    loss, _ = process.training_loss(
        schedule, jnp.asarray(guess), noised, objective="x0", weighting="flow", **options
    )
    u = (t + 1) / 1000
    np.testing.assert_allclose(loss, np.mean((x0 - guess) ** 2, 1) / np.maximum(u, 0.05) ** 2, rtol=1e-5)
    z = process.network_input(schedule, x_t, t)
    velocity, options = (z - guess) / u[:, None], options | dict(objective="flow")
    same, _ = process.training_loss(schedule, velocity, noised, **options)
    np.testing.assert_allclose(same[2:], loss[2:], rtol=1e-4)
    weighed, _ = process.training_loss(schedule, velocity, noised, weighting="flow", **options)
    np.testing.assert_allclose(weighed, loss, rtol=1e-3)


def test_the_loss_of_the_exact_velocity_is_zero_and_its_x0_the_data():
    x0 = normal(0, 4, *SHAPE)
    own = diffusion(times=process.Times("logit_normal", 0.8, 0.8))
    loss = jax.jit(lambda x0: own.loss(KEY, lambda z, t: (z - x0) / at(t, z.ndim), x0, train=True))
    losses, _, predicted = loss(x0)
    np.testing.assert_allclose(losses, 0.0, atol=1e-6)
    np.testing.assert_allclose(predicted, x0, atol=1e-5)


# Times


def test_the_shift_multiplies_the_odds_of_noise():
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(schedules.shifted(u, 1.0), u)
    np.testing.assert_allclose(schedules.shifted(schedules.shifted(u, 2.0), 1.5), schedules.shifted(u, 3.0))
    np.testing.assert_allclose(schedules.shifted(schedules.shifted(u, 3.0), 1 / 3), u, atol=1e-12)
    inner, moved = u[1:-1], schedules.shifted(u[1:-1], 3.0)
    np.testing.assert_allclose(moved / (1 - moved), 3 * inner / (1 - inner))
    # Noise times 3 and times shifted by 3 have the same signal-to-noise ratio.
    np.testing.assert_allclose(((1 - moved) / moved) ** 2, ((1 - inner) / inner) ** 2 / 9)


def test_a_shifted_spacing_takes_its_steps_where_noise_is():
    assert schedules.space_timesteps(4, 1000, "shift:3").tolist() == [999, 899, 749, 499]
    for count in (1, 7, 50):
        trailing = schedules.space_timesteps(count, 1000, "trailing")
        np.testing.assert_array_equal(schedules.space_timesteps(count, 1000, "shift:1"), trailing)
    own = diffusion(spacing="shift:3").with_settings(4)
    assert own.spacing == "shift:3" and own.timesteps().tolist() == [999, 899, 749, 499]


@pytest.mark.parametrize(
    "law",
    [
        process.Times("logit_normal", 0.8, 0.8),
        process.Times("logit_normal", -0.5, 1.2, 3.0),
        process.Times(time_shift=3.0),
    ],
)
def test_drawn_times_have_their_law(law):
    """The share of times up to u: that of a normal logit, or u / (s - (s - 1) u) for uniform times shifted by
    s."""
    n, shift = 40_000, law.time_shift
    t = np.asarray(process.draw_path_times(KEY, n, 1000, law))
    assert t.dtype == np.int32 and 0 <= t.min() and t.max() <= 999
    for u in (0.1, 0.3, 0.5, 0.7, 0.9):
        if law.times == "uniform":
            expected = u / (shift - (shift - 1) * u)
        else:
            logit = math.log(u / (1 - u)) - math.log(shift)
            expected = 0.5 * (1 + math.erf((logit - law.time_mean) / law.time_std / math.sqrt(2)))
        found = np.mean((t + 1) / 1000 <= u + 0.0005)  # times are rounded to the nearest
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n)), u


def test_only_training_draws_times_by_their_law():
    own = diffusion(times=process.Times("logit_normal", 0.8, 0.8))

    @jax.jit
    def times(key):
        seen = []
        for train in (False, True):
            own.loss(key, lambda z, t: seen.append(t) or z, jnp.zeros((6, *SHAPE)), train=train)
        t_key, _ = jax.random.split(key)
        even = process.draw_timesteps(t_key, 6, 1000, train=False)
        return seen, [even, process.draw_path_times(t_key, 6, 1000, own.times)]

    jax.tree.map(np.testing.assert_array_equal, *times(KEY))


# Samplers


def velocity_of_gaussian_data(std):
    """The best velocity for data N(0, std^2), E[eps - x0 | z]: z times a number."""
    return lambda z, t: (
        z * (at(t, z.ndim) - (1 - at(t, z.ndim)) * std**2)
        / ((1 - at(t, z.ndim)) ** 2 * std**2 + at(t, z.ndim) ** 2)
    )  # fmt: skip


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_the_spread_of_gaussian_data_is_reached_with_the_samplers_order(method, order):
    """z_u / sqrt((1 - u)^2 s^2 + u^2) never changes on the exact flow, so x_T = 1 leads to s."""
    std, errors = 1.5, {}
    for num_steps in (25, 50, 100):
        own = diffusion(num_steps=num_steps, method=method)
        x0, _ = sample(own, velocity_of_gaussian_data(std), np.ones((2, 1), np.float32))
        errors[num_steps] = abs(float(x0[0, 0]) - std)
    ratios = [errors[25] / errors[50], errors[50] / errors[100]]
    assert all(0.8 * 2**order < ratio < 1.6 * 2**order for ratio in ratios), (errors, ratios)
    assert errors[100] < (0.03 if order == 1 else 0.001)


def euler(velocity, z, u, k):
    for now, after in zip(u, np.append(u[1:], 0.0), strict=True):
        z = z + (after - now) * velocity(z, now)
    return z


def heun(velocity, z, u, k):
    for now, after in zip(u, np.append(u[1:], 0.0), strict=True):
        slope = velocity(z, now)
        ahead = z + (after - now) * slope
        z = ahead if after == 0 else z + (after - now) * (slope + velocity(ahead, after)) / 2
    return z


def dpmpp(velocity, z, u, k):
    """DPM-Solver++(2M) of alpha = 1 - u and sigma = k u; h / h' is at most 1."""
    before, h_before = None, None
    for now, after in zip(u, np.append(u[1:], 0.0), strict=True):
        x0 = z - now * velocity(z, now)
        if after == 0:
            return x0
        if now == 1:
            z, h = (1 - after) * x0 + after * z, math.inf
        else:
            h = math.log((1 - after) / (k * after)) - math.log((1 - now) / (k * now))
            guess = x0 + min(h / h_before, 1) / 2 * (x0 - before)
            z = after / now * z + (1 - after) * (1 - math.exp(-h)) * guess
        before, h_before = x0, h


@pytest.mark.parametrize("name, k", [("flow", 1.0), ("flow:2", 2.0)])
@pytest.mark.parametrize("method, loop", [("euler", euler), ("heun", heun), ("dpm++", dpmpp)])
def test_a_walk_is_the_loop_along_the_path(method, loop, name, k):
    """In numpy and float64, on z, which is k eps at first."""

    def velocity(xp, z, u):
        return 1.2 * xp.sin(2 * z) + z * u - 0.3

    own = diffusion(schedules.make_schedule(name), method=method, spacing="shift:2")
    x_T, u = normal(3, 2, *SHAPE), (own.timesteps() + 1) / 1000
    expected = loop(lambda z, u: velocity(np, z, u), k * x_T.astype(np.float64), u, k)
    x0, path = sample(own, lambda z, t: velocity(jnp, z, at(t, z.ndim)), x_T)
    np.testing.assert_allclose(x0, expected, atol=1e-5)
    np.testing.assert_array_equal(path[-1], x0)


@pytest.mark.parametrize("name", ["flow:2", "cosine"])
@pytest.mark.parametrize("method", ["euler", "heun", "dpm++"])
def test_an_oracle_is_followed_along_every_schedule(method, name):
    """Each step ends at its x_s, and the last one exactly at the data."""
    own = diffusion(schedules.make_schedule(name), method=method, objective="x0", num_steps=4)
    x0, x_T = normal(1, 2, *SHAPE), normal(2, 2, *SHAPE)
    steps = schedules.two_time(own.schedule, own.timesteps())
    first = schedules.make_schedule(name).alpha_bar[-1]
    eps = (x_T - np.sqrt(first) * x0) / np.sqrt(1 - first)
    found, path = sample(own, lambda z, t: x0, x_T)
    assert path.shape == (4, 2, *SHAPE)
    for x_s, a in zip(path, steps.alpha_bar_s, strict=True):
        np.testing.assert_allclose(x_s, np.sqrt(a) * x0 + np.sqrt(1 - a) * eps, atol=1e-5)
    np.testing.assert_array_equal(found, x0)


def test_euler_is_ddim():
    def network(z, t):
        return jnp.sin(3 * z)

    x_T = normal(0, 2, *SHAPE)
    drawn = [sample(diffusion(method=method), network, x_T)[0] for method in ("euler", "ddim")]
    np.testing.assert_array_equal(*drawn)


# Guidance, bounds, known pixels, inversion


def two_minds(z, t):
    return jnp.where(jnp.arange(len(z)).reshape(-1, 1, 1, 1) % 2 == 0, 0.6 * jnp.tanh(z), 0.2 * z)


def conditional(z, t):
    return 0.6 * jnp.tanh(z)


def test_a_scale_of_1_is_no_guidance_and_3_goes_beyond():
    x_T = normal(0, 2, *SHAPE)
    alone, _ = sample(diffusion(), conditional, x_T)
    for scale, interval in ((1.0, None), (3.0, (1e4, 1e5))):
        guide = guidance.Guidance(two_minds, jnp.float32(scale), interval)
        np.testing.assert_allclose(sample(diffusion(), conditional, x_T, guidance=guide)[0], alone, atol=1e-6)
    guided, _ = sample(diffusion(), conditional, x_T, guidance=guidance.Guidance(two_minds, 3.0))
    u = (diffusion().timesteps() + 1) / 1000

    def velocity(z, u):
        return 0.2 * z + 3 * (0.6 * np.tanh(z) - 0.2 * z)

    np.testing.assert_allclose(guided, euler(velocity, x_T.astype(np.float64), u, 1), atol=1e-5)


def test_an_interval_is_one_of_noise_levels():
    """The noise level is u / (1 - u), infinite where the walk begins."""
    inside = guidance.times_inside(FLOW, (0.2505, 1.001))
    np.testing.assert_array_equal(np.flatnonzero(inside)[[0, -1]], [200, 499])
    assert not guidance.times_inside(FLOW, (0.0, 1e9))[-1]


@pytest.mark.parametrize("method", ["euler", "heun", "dpm++"])
def test_known_pixels_come_back_and_x0_is_bounded(method):
    own = diffusion(method=method, limit=1.0, threshold=90.0, num_steps=3)
    image, x_T = np.full((2, *SHAPE), 0.3, np.float32), normal(0, 2, *SHAPE)
    mask = np.zeros((2, *SHAPE), np.float32)
    mask[:, 0] = 1
    found, _ = sample(own, lambda z, t: -4.0 * jnp.ones_like(z), x_T, inpaint=(image, mask))
    np.testing.assert_array_equal(found[:, 1], image[:, 1])
    assert np.abs(found[:, 0]).max() <= 1 and np.abs(found[:, 0] - 0.3).min() > 0.01


def test_inverted_noise_leads_back():
    x0, errors = np.random.default_rng(6).uniform(-0.6, 0.6, (2, *SHAPE)).astype(np.float32), {}
    network = velocity_of_gaussian_data(0.3)
    for steps in (20, 80):
        own = diffusion(num_steps=steps, limit=1.0)
        x_T = jax.jit(lambda x0, own=own: own.invert(network, x0))(x0)
        errors[steps] = np.abs(sample(own, network, x_T)[0] - x0).mean()
    assert errors[80] < 0.4 * errors[20] and errors[80] < 0.02, errors


def test_a_guide_steers_nowhere_at_pure_noise():
    prediction = process.Prediction(normal(0, 2, *SHAPE), normal(1, 2, *SHAPE))
    steer = guidance.steered(lambda *_: prediction, FLOW, lambda x, t: x.sum(axis=(1, 2, 3)))
    found = jax.jit(steer)(normal(2, 2, *SHAPE), jnp.array([999, 499]))
    np.testing.assert_array_equal(found.x0[0], prediction.x0[0])
    np.testing.assert_array_equal(found.eps[0], prediction.eps[0])
    half = math.sqrt(0.5)  # sqrt(alpha_bar) and sqrt(1 - alpha_bar) at u = 1/2
    np.testing.assert_allclose(found.x0[1], prediction.x0[1] + half, atol=1e-5)
    np.testing.assert_allclose(found.eps[1], prediction.eps[1] - half, atol=1e-5)


def test_the_bound_is_that_of_the_same_noise():
    """Bits per dimension depend on the signal-to-noise ratios alone, and the prior's term is zero."""
    flow, x0 = schedules.make_schedule("flow:2", 12), normal(0, 2, *SHAPE) / 3

    def on_path(z, t):
        return jnp.tanh(z) * 0.5

    def on_x_t(x_t, t):
        return on_path(x_t * jnp.asarray(flow.path_scale, jnp.float32)[t].reshape(-1, 1, 1, 1), t)

    plain = schedules.Schedule("plain", flow.alpha_bar)
    bounds = [
        jax.jit(diffusion(schedule, objective="x0").bits_per_dim, static_argnums=0)(network, KEYS, x0)
        for schedule, network in ((flow, on_path), (plain, on_x_t))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *bounds)
    assert np.isfinite(bounds[0]["bpd"]).all() and (bounds[0]["prior"] == 0).all()


# Settings


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(objective="eps"), "objective 'eps' divides by alpha_bar.*choose 'flow'"),
        (dict(method="analytic"), "method 'analytic' divides by alpha_bar.*choose 'euler'"),
        (dict(times=process.Times("lognormal")), "unknown process.times 'lognormal'"),
        (dict(times=process.Times(time_mean=0.8)), "need process.times='logit_normal'"),
        (dict(times=process.Times("logit_normal", time_std=0.0)), "must be positive"),
        (dict(times=process.Times(time_shift=-1.0)), "must be positive"),
        (dict(times=process.Times("logit_normal"), learned_variance=True), "trained at uniform times"),
        (dict(schedule=schedules.make_schedule("cosine"), method="rk4"), "choose one of ddpm.*euler, heun"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        diffusion(**changes)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedules.make_schedule("flow:0"), "'flow:2', with a positive ratio"),
        (lambda: schedules.space_timesteps(4, 1000, "shift:x"), "must look like 'shift:3'"),
        (lambda: schedules.space_timesteps(900, 1000, "shift:3"), "no 900 distinct times of 1000"),
        (lambda: diffusion(method="heun").with_settings(method="analytic"), "divides by alpha_bar"),
        (lambda: sampling.resampled(sampling.heun(schedules.two_time(FLOW, np.array([9]))), None, 2), "heun"),
    ],
)
def test_mistakes_are_answered_with_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call()


FLOW_SETTINGS = dict(
    schedule="flow",
    objective="flow",
    spacing="shift:3",
    method="heun",
    process=dict(times="logit_normal", time_mean=0.8, time_std=0.8, time_shift=2.0),
)
UNET = dict(channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), head_dim=8)
TEXT = dict(width=8, depth=1, num_heads=1, vocab_size=11, context_length=3)
BUILDS = {
    "decoder": lambda **own: decoder.build(image_size=4, embed_dim=0, learned_variance=False, **UNET, **own),
    "upsampler": lambda **own: upsampler.build(image_size=8, low_res_size=4, crop_size=4, **UNET, **own),
    "prior": lambda **own: prior.build(embed_dim=4, text=TEXT, **own),
}


@pytest.mark.parametrize("name", BUILDS)
def test_every_stage_has_flow_matching(name):
    stage = BUILDS[name](**FLOW_SETTINGS, num_steps=2)
    assert stage.diffusion.times == process.Times("logit_normal", 0.8, 0.8, 2.0)
    assert stage.diffusion.schedule == FLOW and stage.sampling["method"] == "heun"
    stage.check(stage.sampling)
    with pytest.raises(ValueError, match="divides by alpha_bar"):
        stage.check(stage.sampling | dict(method="analytic"))
    with pytest.raises(ValueError, match="time_men.*time_mean"):
        BUILDS[name](**FLOW_SETTINGS | dict(process=dict(time_men=1.0)))
    batch = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in stage.batch_spec(2).items()}
    params = jax.eval_shape(stage.init, KEY, batch)
    loss = jax.eval_shape(stage.loss, params, KEY, batch)
    drawn = jax.eval_shape(stage.sample, params, KEYS, batch)
    assert loss.value.shape == () and drawn.shape[0] == 2

"""The diffusion of a stage: guidance by interleaved halves, the clip, and what the loss measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import gaussian, guidance, sampling, schedules
from dalle2_jax.models.diffusion.guidance import Guidance

SHAPE = (4, 4, 3)


def diffusion(**changes):
    settings = dict(
        schedule=schedules.make_schedule("cosine", 50),
        objective="x0",
        learned_variance=False,
        weighting="uniform",
        num_steps=5,
        spacing="uniform",
        method="ddim",
        eta=0.0,
    )
    return gaussian.GaussianDiffusion(**settings | changes)


def sample(stage, network, keys, shape=SHAPE, guidance_scale=None, **start):
    """What a diffusion draws, as one program."""
    guidance = None if guidance_scale is None else Guidance(network, guidance_scale)

    def draw(keys):
        denoise = stage.denoiser(network, guidance=guidance)
        return stage.sample(denoise, keys, shape, start=gaussian.Start(**start))

    return jax.device_get(jax.jit(draw)(keys))


def two_minds(conditional, unconditional, seen=None):
    """A network that predicts x0 as one constant in even rows and another in odd ones."""

    def network(x_t, t):
        if seen is not None:
            seen.append(x_t.shape[0])
        value = jnp.where(jnp.arange(x_t.shape[0]) % 2 == 0, conditional, unconditional)
        return jnp.broadcast_to(value[:, None, None, None], x_t.shape)

    return network


def keys(n):
    return jax.random.split(jax.random.key(0), n)


@pytest.mark.parametrize("scale, expected", [(1.0, 0.2), (3.0, 0.4), (20.0, 1.0)])
def test_guidance_goes_from_odd_rows_beyond_even_rows_and_is_clipped(scale, expected):
    seen = []
    x0 = sample(diffusion(), two_minds(0.2, 0.1, seen), keys(3), guidance_scale=scale)
    assert x0.shape == (3, *SHAPE) and set(seen) == {6}
    np.testing.assert_allclose(x0, expected, atol=1e-5)


def test_scale_may_differ_by_example_and_limits_may_be_absent():
    scale = np.array([1.0, 20.0], np.float32)
    x0 = sample(diffusion(limit=None), two_minds(0.2, 0.1), keys(2), guidance_scale=scale)
    np.testing.assert_allclose(x0[:, 0, 0, 0], [0.2, 2.1], atol=1e-5)


def test_without_guidance_the_network_sees_each_example_once():
    seen = []
    x0 = sample(diffusion(), two_minds(0.2, 0.1, seen), keys(2))
    assert set(seen) == {2}
    np.testing.assert_allclose(x0[:, 0, 0, 0], [0.2, 0.1], atol=1e-5)


def test_halves_are_neighbours():
    both = guidance.interleave((jnp.arange(3), jnp.ones((3, 2))), (jnp.arange(3) + 10, jnp.zeros((3, 2))))
    np.testing.assert_array_equal(both[0], [0, 10, 1, 11, 2, 12])
    np.testing.assert_array_equal(both[1][:, 0], [1, 0, 1, 0, 1, 0])


def test_only_the_number_one_needs_no_unconditional_half():
    assert not guidance.is_guided(1) and not guidance.is_guided(1.0)
    assert guidance.is_guided(0.5) and guidance.is_guided(jnp.float32(1.0))


def test_the_loss_is_the_error_of_the_objective():
    x0 = np.full((4, *SHAPE), 0.5, np.float32)
    loss = jax.jit(lambda key, x0: diffusion().loss(key, two_minds(0.2, 0.4), x0, train=False))
    losses, metrics, output = loss(jax.random.key(0), x0)
    np.testing.assert_allclose(losses, [0.09, 0.01, 0.09, 0.01], atol=1e-6)
    np.testing.assert_array_equal(metrics["mse"], losses)
    assert output.shape == x0.shape


def test_a_list_of_steps_gives_way_to_another_number():
    steps = diffusion(schedule=schedules.make_schedule("cosine", 1000), spacing="fast27", num_steps=27)
    for num_steps in (None, 4):
        x0 = sample(steps.with_settings(num_steps), two_minds(0.2, 0.1), keys(1))
        np.testing.assert_allclose(x0, 0.2, atol=1e-5)


def smooth(x_t, t):
    """A network for 'x0' that listens to x_t, gently."""
    return 0.8 * jnp.tanh(x_t) + 0.001 * t[:, None, None, None]


def test_sampling_starts_from_the_noise_it_is_given():
    x_T = np.random.default_rng(5).standard_normal((2, *SHAPE)).astype(np.float32)
    given = sample(diffusion(), smooth, keys(2), x_T=x_T)
    np.testing.assert_array_equal(given, sample(diffusion(), smooth, keys(2)[::-1], x_T=x_T))
    assert np.abs(given - sample(diffusion(), smooth, keys(2))).mean() > 0.01


def test_strength_is_the_share_of_the_steps_that_are_taken():
    init, seen = np.full((2, *SHAPE), 0.4, np.float32), []

    def watched(x_t, t):
        jax.debug.callback(lambda x, t: seen.append((int(t[0]), np.asarray(x))), x_t, t, ordered=True)
        return smooth(x_t, t)

    own = diffusion(num_steps=10)
    sample(own, watched, keys(2), init=init, strength=0.3)
    jax.effects_barrier()
    times, states = zip(*seen, strict=True)
    assert list(times) == list(own.timesteps()[-3:])
    a = own.schedule.alpha_bar[times[0]]
    noise = sampling.init_noise(keys(2), SHAPE)
    np.testing.assert_allclose(states[0], np.sqrt(a) * init + np.sqrt(1 - a) * noise, atol=1e-6)
    whole = sample(own, smooth, keys(2), init=init, strength=1.0)
    np.testing.assert_array_equal(whole, sample(own, smooth, keys(2)))
    with pytest.raises(ValueError, match="needs what to start from"):
        sample(own, smooth, keys(2), strength=0.5)


def test_an_unknown_method_is_answered_with_what_to_choose():
    for make in (lambda: diffusion(method="dpm"), lambda: diffusion().with_settings(method="dpm")):
        with pytest.raises(ValueError, match="method 'dpm' is unknown: choose one of ddpm, ddim"):
            make()


def test_inverted_noise_leads_back():
    x0, errors = np.random.default_rng(6).uniform(-0.6, 0.6, (2, *SHAPE)).astype(np.float32), {}
    own = diffusion(schedule=schedules.make_schedule("cosine", 1000), objective="eps")

    def network(x_t, t):  # the exact eps of data N(0, 0.3^2)
        a = jnp.asarray(own.schedule.alpha_bar, jnp.float32)[t][:, None, None, None]
        return x_t * jnp.sqrt(1 - a) / (a * 0.09 + 1 - a)

    for steps in (10, 40, 160):

        @jax.jit
        def there_and_back(x0, steps=steps):
            diffusion = own.with_settings(steps)
            start = gaussian.Start(x_T=diffusion.invert(network, x0))
            return diffusion.sample(diffusion.denoiser(network), keys(2), SHAPE, start=start)

        errors[steps] = float(np.abs(there_and_back(x0) - x0).mean())
    assert errors[160] < 0.5 * errors[40] < 0.25 * errors[10] and errors[160] < 0.01, errors


@pytest.mark.parametrize("objective", ["x0", "eps"])
def test_the_measured_eps_sq_of_the_exact_denoiser_is_known(objective):
    """Data N(0, s^2): E[x0 | x_t] is sqrt(ab) s^2 x_t / v, v = ab s^2 + 1 - ab, and E eps^2 (1 - ab) / v."""
    own = diffusion(
        schedule=schedules.make_schedule("cosine", 200), objective=objective, num_steps=8, method="analytic"
    )
    ab, variance = own.schedule.alpha_bar, 0.3

    def network(x_t, t):
        at = jnp.asarray(ab, jnp.float32)[t][:, None]
        total = at * variance + 1 - at
        return jnp.sqrt(at) * variance * x_t / total if objective == "x0" else jnp.sqrt(1 - at) * x_t / total

    x0 = (variance**0.5 * np.random.default_rng(0).standard_normal((4000, 16))).astype(np.float32)
    found = jax.jit(lambda key, x0: own.measure_eps_sq(network, key, x0))(jax.random.key(1), x0)
    found = np.asarray(found)
    times = own.timesteps()
    assert found.shape == (200,) and found.dtype == jnp.float32
    expected = (1 - ab) / (ab * variance + 1 - ab)
    np.testing.assert_allclose(found[times], expected[times], rtol=0.02)
    between = np.interp(np.arange(200), times[::-1], found[times[::-1]])
    np.testing.assert_allclose(found, between, rtol=1e-5)

"""What ADM's and GLIDE's own code does where this project does otherwise by default, each by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import gaussian, process, schedules

LINEAR = schedules.make_schedule("linear", 1000)
KEYS = jax.random.split(jax.random.key(0), 2)
SHAPE = (4, 4, 3)
SLOPE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def diffusion(**changes):
    settings = dict(
        schedule=LINEAR, objective="eps", learned_variance=False, weighting="uniform", num_steps=5
    )
    return gaussian.GaussianDiffusion(**settings | dict(spacing="uniform", method="ddpm", eta=0.0) | changes)


def network(x_t, t):
    return 0.9 * x_t  # eps, which leads x0 out of [-1, 1]


def drawn(log_p=None, **changes):
    made = diffusion(**changes)
    return np.asarray(made.sample(made.denoiser(network, log_p=log_p), KEYS, SHAPE))


def test_adms_times_are_those_of_its_float_sum():
    """Of the 999 counts of T = 1000 those of 283 differ from evenly spaced times, by one."""
    differ = 0
    for count in range(2, 1001):
        at, stride, times = 0.0, 999 / (count - 1), []
        for _ in range(count):
            times.append(round(at))
            at += stride
        found = schedules.space_timesteps(count, 1000, "adm")
        assert found[::-1].tolist() == times
        apart = np.abs(found - schedules.space_timesteps(count, 1000))
        differ += apart.any()
        assert apart.max() <= 1
    assert differ == 283


def test_ddims_times_have_a_whole_stride():
    assert schedules.space_timesteps(25, 1000, "ddim").tolist() == list(range(960, -1, -40))
    assert schedules.space_timesteps(4, 10, "ddim").tolist() == [9, 6, 3, 0]
    with pytest.raises(ValueError, match="no whole stride for 300 of 1000"):
        schedules.space_timesteps(300, 1000, "ddim")


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_adms_guide_shifts_the_mean_by_the_variance(scale):
    """x0 is clipped, then mean += variance * gradient, step by step in numpy (ADM, algorithm 1)."""
    found = drawn(lambda x, t: scale * (SLOPE * x).sum(axis=(1, 2, 3)), guide_rule="adm")
    steps = schedules.two_time(LINEAR, schedules.space_timesteps(5, 1000))
    x = np.asarray(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2**31 - 1), SHAPE))(KEYS))
    for i, t in enumerate(steps.t):
        bar = steps.alpha_bar_t[i]
        x0 = np.clip((x - np.sqrt(1 - bar) * 0.9 * x) / np.sqrt(bar), -1, 1)
        variance = np.exp(steps.log_beta_tilde[i])
        x = steps.coef_x0[i] * x0 + steps.coef_x_t[i] * x + variance * scale * SLOPE
        if i < 4:
            noise = jax.vmap(lambda key, t=t: jax.random.normal(jax.random.fold_in(key, t), SHAPE))(KEYS)
            x = x + np.sqrt(variance) * np.asarray(noise)
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_adms_guide_shifts_eps_behind_the_clip_where_sampling_is_not_ancestral():
    """ADM, algorithm 2: eps of the clipped x0, less sigma times the gradient; nothing is clipped after it."""
    log_p = lambda x, t: 0.1 * (SLOPE * x).sum(axis=(1, 2, 3))  # noqa: E731
    found = drawn(log_p, guide_rule="adm", method="ddim", num_steps=2)
    steps = schedules.two_time(LINEAR, schedules.space_timesteps(2, 1000))
    x = np.asarray(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2**31 - 1), SHAPE))(KEYS))
    for bar, after in zip(steps.alpha_bar_t, steps.alpha_bar_s, strict=True):
        x0 = np.clip((x - np.sqrt(1 - bar) * 0.9 * x) / np.sqrt(bar), -1, 1)
        eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar) - np.sqrt(1 - bar) * 0.1 * SLOPE
        x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * eps
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-3 * np.abs(x).max())
    assert np.abs(found).max() > 1  # the last step's shift is not clipped


def test_the_score_rule_shifts_further_at_the_last_steps():
    """In units of the gradient: coef_x0 sigma^2 / signal against the variance, 250 linear steps."""
    steps = schedules.two_time(LINEAR, schedules.space_timesteps(250, 1000))
    score = steps.coef_x0 * (1 - steps.alpha_bar_t) / np.sqrt(steps.alpha_bar_t)
    ratio = (score / steps.beta_tilde.clip(1e-30))[:-1]
    assert ratio[:100].max() < 1.2 and 5 < ratio.max() < 8 and ratio.argmax() == len(ratio) - 1


def test_the_gradient_survives_inpainting_where_it_draws():
    mask = np.zeros((2, 4, 4, 1), np.float32)
    mask[:, :2] = 1
    image = np.full((2, *SHAPE), 0.25, np.float32)
    log_p = lambda x, t: 0.3 * (SLOPE * x).sum(axis=(1, 2, 3))  # noqa: E731
    made = diffusion(guide_rule="adm")
    both = [
        np.asarray(made.sample(made.denoiser(network, log_p=p, inpaint=(image, mask)), KEYS, SHAPE))
        for p in (log_p, None)
    ]
    np.testing.assert_array_equal(both[0][:, 2:], image[:, 2:])
    assert np.abs(both[0] - both[1])[:, :2].max() > 1e-3


def test_glides_upsampler_scales_its_first_noise():
    """The first noise alone, and not a latent that is handed in."""
    started = [diffusion(noise_scale=s)._begin(KEYS, SHAPE, gaussian.FROM_NOISE)[0] for s in (1.0, 0.997)]
    np.testing.assert_allclose(started[1], 0.997 * started[0], rtol=1e-6)
    handed = gaussian.Start(x_T=jnp.ones((2, *SHAPE)))
    np.testing.assert_array_equal(diffusion(noise_scale=0.997)._begin(KEYS, SHAPE, handed)[0], 1.0)
    with pytest.raises(ValueError, match="guide_rule 'x'"):
        diffusion(guide_rule="x")


def test_a_prediction_keeps_its_gradient_through_the_wrappers():
    prediction = process.Prediction(jnp.ones((1, 2)), jnp.zeros((1, 2)), gradient=jnp.ones((1, 2)))
    from dalle2_jax.models.diffusion.guidance import clip_x0

    kept = clip_x0(lambda x, t: prediction, LINEAR)(jnp.ones((1, 2)), jnp.zeros(1, jnp.int32))
    assert kept.gradient is prediction.gradient

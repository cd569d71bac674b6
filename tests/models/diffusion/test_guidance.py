"""Guidance, guides and bounds in closed form: linear networks, a linear classifier, one step each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import gaussian, guidance, process, sampling, schedules
from dalle2_jax.models.diffusion.guidance import Guidance
from dalle2_jax.models.stages import classifier

SCHEDULE = schedules.make_schedule("cosine", 100)
RNG = np.random.default_rng(0)
SHAPE, TIMES = (2, 2, 3), np.array([10, 60, 90])
X_T, CONDITION, WEIGHTS = (
    RNG.standard_normal(shape).astype(np.float32) for shape in ((3, *SHAPE), (3, *SHAPE), (4, *SHAPE))
)


def diffusion(**changes):
    settings = dict(
        schedule=SCHEDULE, objective="x0", learned_variance=False, weighting="uniform", num_steps=4
    )
    return gaussian.GaussianDiffusion(**settings | dict(spacing="uniform", method="ddpm", eta=0.0) | changes)


def predicted(made, condition, scale=None, none=0.0, slope=0.7):
    """The Prediction at X_T of a network slope x_t + condition; `none` is the condition of its other half."""

    def network(x_t, t):
        return slope * x_t + condition

    def paired(x_t, t):
        return slope * x_t + guidance.interleave(condition, jnp.full_like(condition, none))

    guide = None if scale is None else Guidance(paired, scale)
    return made.denoiser(network, guidance=guide)(X_T, TIMES)


@pytest.mark.parametrize("objective", process.OBJECTIVES)
def test_a_scale_of_1_is_the_condition_and_of_0_is_none_to_the_bit(objective):
    made = diffusion(objective=objective, limit=None)
    for scale in (1.0, 0.0, np.ones(3, np.float32)):
        expected = predicted(made, CONDITION * np.float32(np.max(scale)))
        found = predicted(made, CONDITION, scale)
        np.testing.assert_array_equal(found.x0, expected.x0)
        np.testing.assert_array_equal(found.eps, expected.eps)


@pytest.mark.parametrize("objective", process.OBJECTIVES)
def test_guidance_of_a_linear_network_is_that_of_the_condition(objective):
    """Its scale s is 1 + w of the paper: none + s (condition - none)."""
    made, scale = diffusion(objective=objective, limit=None), np.float32([0.5, 3.0, -1.0])
    found, expected = (
        predicted(made, CONDITION, scale),
        predicted(made, scale[:, None, None, None] * CONDITION),
    )
    np.testing.assert_allclose(found.x0, expected.x0, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.eps, expected.eps, rtol=1e-4, atol=1e-4)


def test_x0_is_bounded_behind_guidance():
    """0.5 + (2 - 1) (0.5 - 1.5) = -0.5; bounded before guidance it would be 0."""
    made = diffusion()
    found = predicted(made, np.full_like(X_T, 0.5), 2.0, none=1.5, slope=0.0)
    np.testing.assert_allclose(found.x0, -0.5, rtol=1e-6)


def test_a_dynamic_threshold_divides_unless_its_most_is_1():
    """Of each picture by itself; with a most of 1 it is a clip."""
    gain = np.float32([1, 2, 0.2])[:, None, None, None]
    x0 = gain * np.broadcast_to(np.float32([4.0, -2.0, 1.0]), (3, *SHAPE))
    middle = np.float32([2, 4, 1])[:, None, None, None]  # the median of |x0|, at least 1
    for most, expected in ((None, np.clip(x0, -middle, middle) / middle), (1.0, np.clip(x0, -1, 1))):
        made = diffusion(threshold=50.0, threshold_max=most)
        np.testing.assert_allclose(predicted(made, x0, slope=0.0).x0, expected, rtol=1e-6)
    made = diffusion(threshold=50.0)  # no most by default
    np.testing.assert_allclose(predicted(made, x0, slope=0.0).x0[1, 0, 0], [1, -1, 0.5], rtol=1e-6)


@pytest.mark.parametrize("fraction, variance", [(0.0, "beta_tilde"), (1.0, "beta")])
def test_ddpm_draws_with_the_fixed_variance_of_its_settings(fraction, variance):
    """DDPM's 'fixed large' is beta; the last step draws nothing."""
    made = diffusion(fixed_variance=fraction)
    steps = schedules.two_time(SCHEDULE, made.timesteps())
    sampler, keys = made._sampler(steps, None), jax.random.split(jax.random.key(0), 2)
    zero = jnp.zeros((2, 5))
    for i, t in enumerate(steps.t):
        c = {name: row[i] for name, row in sampler.table.items()}
        found = sampler.update(zero, process.Prediction(zero, zero), (), c, keys)
        std = np.sqrt(getattr(steps, variance)[i]) * (i < len(steps.t) - 1)
        np.testing.assert_allclose(found, std * sampling._normal(keys, int(t), (5,)), rtol=1e-5)


@dataclasses.dataclass
class LinearNet:
    """Logits (1 + t / 100) W x of a classifier."""

    def apply(self, variables, x_t, t, **_):
        return jnp.einsum("khwc,bhwc->bk", WEIGHTS, x_t) * (1 + t[:, None] / 100)


def test_a_linear_classifier_shifts_eps_by_its_weights():
    """grad log p(y | x_t) = g (w_y - sum_k p_k w_k) with g = 1 + t / 100; of each example by itself."""
    stage = dataclasses.replace(classifier.build(num_classes=4, image_size=8), net=LinearNet())
    label = np.array([2, 0, 3])
    made, log_p = diffusion(limit=None), functools.partial(stage.log_p, {}, label=label)
    found = jax.jit(lambda x_t: made.denoiser(lambda x_t, t: 0.7 * x_t, log_p=log_p)(x_t, TIMES).eps)(X_T)
    gain = 1 + TIMES / 100
    logits = np.einsum("khwc,bhwc->bk", WEIGHTS, X_T.astype(np.float64)) * gain[:, None]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    gradient = (WEIGHTS[label] - np.einsum("bk,khwc->bhwc", p, WEIGHTS)) * gain[:, None, None, None]
    sigma = np.sqrt(1 - SCHEDULE.alpha_bar[TIMES])[:, None, None, None]
    plain = predicted(made, np.zeros_like(X_T)).eps
    np.testing.assert_allclose(found, plain - sigma * gradient, rtol=1e-4, atol=1e-4)

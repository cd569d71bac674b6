"""The classifier of noised pictures: what it learns, what it leaves out, and where its gradient points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import process
from dalle2_jax.models.stages import classifier
from tests.learned import assert_within, descend, key_of

KEY = jax.random.key(0)


def build(**changes):
    settings = dict(
        num_classes=3,
        image_size=8,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        head_dim=16,
    )
    return classifier.build(**settings | changes)


@functools.partial(jax.jit, static_argnums=0)
def batch_of(size, key=KEY):
    """Pictures of one channel's colour each: class c is bright in channel c."""
    label = jnp.arange(size) % 3
    noise = 0.1 * jax.random.normal(key, (size, 8, 8, 3))
    image = jnp.where(jnp.arange(3) == label[:, None, None, None], 0.8, -0.8) + noise
    return {"image": jnp.clip(image, -1, 1), "label": label}


BOUNDS = {
    "accuracy": (">", 0.8),
    "log_p_little_noise": (">", -0.1),
    "log_p_noise_alone": ("<", -0.85),  # chance is log(1 / 3) = -1.10
    "gradient_to_class": (">", 0.6),  # a third by chance
}


def learn(seed):
    """The stage and its parameters after 120 steps on 24 pictures."""
    key = key_of(seed)
    stage, batch = build(channel_mult=(1,), attention_resolutions=()), batch_of(24, key)
    params = jax.jit(stage.init)(key, batch)
    return stage, descend(stage, params, key, batch, steps=120, learning_rate=3e-3)[0]


def reached(seed, learned=None):
    """What it knows of 30 other pictures, and where its gradient points on them."""
    stage, params = learned or learn(seed)
    batch = batch_of(30, key_of(seed + 100))
    accuracy = jax.jit(lambda *arguments: stage.loss(*arguments, train=False))(params, KEY, batch)[1][
        "accuracy"
    ]
    noise = jax.random.normal(key_of(seed + 200), (30, 8, 8, 3))

    @jax.jit
    def log_p(params, image, noise, t, label):
        """Of noised pictures [30], and its gradient by each of them, averaged over pixels [30, 3]."""
        times = jnp.full(30, t)
        x_t = process.q_sample(stage.schedule, image, times, noise)
        value, gradient = jax.vjp(lambda x_t: stage.log_p(params, x_t, times, label), x_t)
        return value, gradient(jnp.ones(30))[0].mean(axis=(1, 2))

    sure = {t: log_p(params, batch["image"], noise, t, batch["label"])[0].mean() for t in (50, 999)}
    # Under much noise: where the network is sure of a class, log p is flat and its gradient noise.
    gradients = [log_p(params, batch["image"], noise, 900, np.full(30, c, np.int32))[1] for c in range(3)]
    return {
        "accuracy": accuracy,
        "log_p_little_noise": sure[50],
        "log_p_noise_alone": sure[999],
        "gradient_to_class": np.mean([gradients[c].argmax(axis=1) == c for c in range(3)]),
    }


@pytest.fixture(scope="module")
def trained():
    return learn(0)


def test_it_learns_classes_is_less_sure_of_more_noise_and_its_gradient_points_to_the_class(trained):
    assert_within(reached(0, trained), BOUNDS)


def test_examples_without_a_label_are_left_out(trained):
    stage, params = trained
    batch = jax.device_get(batch_of(6))
    # the same times and noise for the labelled ones: fixed times depend on the place in the batch alone
    first = np.arange(6) < 3
    unlabelled = batch | {"label": np.where(first, batch["label"], -1)}
    changed = unlabelled | {"image": np.where(first[:, None, None, None], batch["image"], np.float32(0))}
    evaluate = jax.jit(lambda params, batch: stage.loss(params, KEY, batch, train=False))
    one, two = (evaluate(params, b) for b in (unlabelled, changed))
    assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-5) and float(one[1]["labelled"]) == 0.5
    none = batch | {"label": np.full(6, -1)}
    loss, metrics, _ = jax.jit(stage.loss)(params, KEY, none)
    assert loss == 0 and metrics["accuracy"] == 0


@pytest.mark.parametrize(
    "changes, message", [(dict(num_classes=1), "num_classes 1"), (dict(image_size=9), "image_size 9")]
)
def test_mistakes_are_answered_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_without_a_schedule_it_reads_clean_pictures(trained):
    """Its loss depends on no key, and `classify` is log p of all classes at t = 0."""
    stage, params = trained
    batch, clean = batch_of(6), build(channel_mult=(1,), attention_resolutions=(), schedule=None)
    assert stage.schedule is not None and clean.schedule is None
    loss = jax.jit(lambda key: clean.loss(params, key, batch, train=True).value)
    log_p = jax.jit(clean.classify)(params, batch["image"])
    np.testing.assert_array_equal(loss(KEY), loss(jax.random.key(1)))
    np.testing.assert_allclose(loss(KEY), -log_p[np.arange(6), batch["label"]].mean(), rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-5)
    of_label = stage.log_p(params, batch["image"], jnp.zeros(6, jnp.int32), batch["label"])
    np.testing.assert_allclose(log_p[np.arange(6), batch["label"]], of_label, rtol=1e-4, atol=1e-5)

"""The classifier of noised pictures: what it learns, what it leaves out, and where its gradient points."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.diffusion import process
from dalle2_jax.stages import classifier

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


def batch_of(size, key=KEY):
    """Pictures of one channel's colour each: class c is bright in channel c."""
    label = jnp.arange(size) % 3
    noise = 0.1 * jax.random.normal(key, (size, 8, 8, 3))
    image = jnp.where(jnp.arange(3) == label[:, None, None, None], 0.8, -0.8) + noise
    return {"image": jnp.clip(image, -1, 1), "label": label}


@pytest.fixture(scope="module")
def trained():
    stage, batch = build(), batch_of(24)
    params = stage.init(KEY, batch)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        (_, metrics), grads = jax.value_and_grad(stage.loss, has_aux=True)(params, key, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for i in range(120):
        params, state, _ = step(params, state, jax.random.fold_in(KEY, i))
    return stage, params


def test_it_learns_classes_and_is_less_sure_of_more_noise(trained):
    stage, params = trained
    batch = batch_of(30, jax.random.key(9))
    _, metrics = stage.loss(params, KEY, batch, train=False)
    assert metrics["accuracy"] > 0.8 and metrics["labelled"] == 1

    def sure(t):
        times = jnp.full(30, t)
        x_t = process.q_sample(stage.schedule, batch["image"], times, jax.random.normal(KEY, (30, 8, 8, 3)))
        return float(stage.log_p(params, x_t, times, batch["label"]).mean())

    assert sure(50) > -0.1 and sure(999) < sure(600) < sure(50)
    assert sure(999) == pytest.approx(np.log(1 / 3), abs=0.6)


def test_its_gradient_points_to_the_class(trained):
    stage, params = trained
    x_t, t = jnp.zeros((3, 8, 8, 3)), jnp.full(3, 300)
    gradient = jax.grad(lambda x: stage.log_p(params, x, t, jnp.arange(3)).sum())(x_t)
    by_channel = gradient.mean(axis=(1, 2))
    np.testing.assert_array_equal(by_channel.argmax(axis=1), jnp.arange(3))


def test_examples_without_a_label_are_left_out(trained):
    stage, params = trained
    batch = batch_of(6)
    # the same times and noise for the labelled ones: fixed times depend on the place in the batch alone
    unlabelled = batch | {"label": batch["label"].at[3:].set(-1)}
    changed = unlabelled | {"image": unlabelled["image"].at[3:].set(0.0)}
    one, two = (stage.loss(params, KEY, b, train=False) for b in (unlabelled, changed))
    assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-5) and float(one[1]["labelled"]) == 0.5
    none = batch | {"label": jnp.full(6, -1)}
    loss, metrics = stage.loss(params, KEY, none)
    assert loss == 0 and metrics["accuracy"] == 0


@pytest.mark.parametrize(
    "changes, message", [(dict(num_classes=1), "num_classes 1"), (dict(image_size=9), "image_size 9")]
)
def test_mistakes_are_answered_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)

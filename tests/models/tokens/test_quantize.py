"""Quantizers: closed forms, gradients, the use of codes, restarts."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.tokens import quantize
from dalle2_jax.models.tokens.quantize import FSQ, VQ, Gumbel
from dalle2_jax.runtime import partition

K, D = 8, 4
KEY = jax.random.key(0)


def state_of(quantizer) -> dict:
    trained, stats = quantizer.init(KEY)
    return trained | stats


@functools.partial(jax.jit, static_argnums=(0, 5))
def quantized(quantizer, state, z, key, step, train):
    """`quantize` as one program."""
    return quantizer.quantize(state, z, key, step, train)


def vectors(count: int = 64, seed: int = 1) -> jax.Array:
    """z [1, 1, count, D]."""
    return jax.random.normal(jax.random.key(seed), (1, 1, count, D))


def stacked(statistics: dict) -> dict:
    """Of one part of a batch."""
    return jax.tree.map(lambda x: x[None], statistics)


# --- VQ ---


def test_codes_are_the_nearest_vectors():
    quantizer = VQ(K, D)
    state, z = state_of(quantizer), np.asarray(vectors())
    far = ((z[..., None, :] - np.asarray(state["book"])) ** 2).sum(-1)
    np.testing.assert_array_equal(quantizer.encode(state, z), far.argmin(-1))


def test_codes_do_not_depend_on_the_type_of_the_encoder():
    """Distances are float32 products of float32 numbers, whatever the network computes in."""
    quantizer = VQ(2, 1)
    state = {"book": jnp.array([[1.0], [1.0 + 2**-9]])}
    z = jnp.array([1.0 + 2**-8]).reshape(1, 1, 1, 1)
    assert quantizer.encode(state, z).item() == 1


def test_the_gradient_goes_straight_through():
    """To z it is that of the decoder to z_q, and that of the commitment; the book gets none."""
    quantizer = VQ(K, D, beta=0.25)
    state, z = state_of(quantizer), vectors(6)
    weights = jax.random.normal(jax.random.key(2), z.shape)

    def loss(z, book):
        made = quantized(quantizer, state | {"book": book}, z, KEY, 0, True)
        return jnp.sin(made.z_q * weights).sum() + made.loss

    to_z, to_book = jax.jit(jax.grad(loss, argnums=(0, 1)))(z, state["book"])
    nearest = state["book"][quantizer.encode(state, z)]
    expected = weights * jnp.cos(nearest * weights) + 0.25 * 2 * (z - nearest) / z.size
    np.testing.assert_allclose(to_z, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(to_book, 0)


def test_beta_weighs_the_commitment_and_not_the_book():
    """With a trained book the gradient to the book does not depend on beta, that to z does."""
    z = vectors(6)

    def gradients(beta):
        quantizer = VQ(K, D, beta=beta, decay=0.0)
        state = state_of(quantizer)
        loss = lambda z, book: quantized(quantizer, state | {"embedding": book}, z, KEY, 0, True).loss  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(z, state["embedding"])

    (z_one, book_one), (z_two, book_two) = gradients(1.0), gradients(0.25)
    np.testing.assert_allclose(z_one, 4 * z_two, rtol=1e-5)
    np.testing.assert_array_equal(book_one, book_two)
    assert np.abs(book_one).max() > 0


def test_the_book_converges_to_the_means_of_clusters():
    centres = 3 * np.eye(4, dtype=np.float32)
    draw = np.random.default_rng(0)
    z = jnp.asarray((centres[:, None] + 0.1 * draw.normal(size=(4, 16, 4))).reshape(1, 1, 64, 4), jnp.float32)
    quantizer = VQ(4, 4, decay=0.9)
    state = state_of(quantizer) | {"book": jnp.asarray(centres + 0.5)}
    old = quantizer.encode(state, z)
    np.testing.assert_array_equal(old.reshape(4, 16), np.arange(4)[:, None].repeat(16, 1))

    @jax.jit
    def step(state):
        made = quantized(quantizer, state, z, KEY, 0, True)
        return quantizer.update(state, stacked(made.statistics), KEY)[0]

    for _ in range(100):
        state = step(state)
    means = np.asarray(z).reshape(4, 16, 4).mean(axis=1)
    np.testing.assert_allclose(state["book"], means, rtol=1e-4, atol=1e-4)


def test_an_update_is_the_papers_average():
    """n and m decay, parts of a batch add up, and the counts are smoothed."""
    quantizer = VQ(K, D, decay=0.75)
    state, parts = (
        state_of(quantizer),
        [quantized(quantizer, state_of(quantizer), vectors(32, s), KEY, 0, True) for s in (3, 4)],
    )
    statistics = jax.tree.map(lambda *x: jnp.stack(x), *(part.statistics for part in parts))
    new, _ = quantizer.update(state, statistics, KEY)
    z = np.concatenate([np.asarray(vectors(32, s))[0, 0] for s in (3, 4)])
    codes = np.concatenate([np.asarray(part.codes)[0, 0] for part in parts])
    n = 0.75 * np.asarray(state["count"]) + 0.25 * np.bincount(codes, minlength=K)
    m = 0.75 * np.asarray(state["sum"])
    np.add.at(m, codes, 0.25 * z)
    smooth = (n + 1e-5) / (n.sum() + K * 1e-5) * n.sum()
    np.testing.assert_allclose(new["count"], n, rtol=1e-5)
    np.testing.assert_allclose(new["book"], m / smooth[:, None], rtol=1e-4, atol=1e-6)


def test_a_batch_is_quantized_with_the_book_before_it():
    quantizer, z = VQ(K, D), vectors()
    state = state_of(quantizer)
    made = quantized(quantizer, state, z, KEY, 0, True)
    np.testing.assert_allclose(made.z_q, state["book"][made.codes], rtol=1e-6, atol=1e-6)


def test_dead_codes_become_vectors_of_the_batch_on_every_device_alike():
    quantizer, z = VQ(K, D, restart=0.1), vectors(64).reshape(8, 2, 4, D)
    state = state_of(quantizer)
    state["book"] = state["book"].at[2:].set(100.0)  # far from everything

    @jax.jit
    def step(z):
        made = quantized(quantizer, state, z, KEY, 0, True)
        return quantizer.update(state, stacked(made.statistics), KEY)

    alone, scalars = step(z)
    assert scalars["restarts"] == 6
    flat = np.asarray(z).reshape(-1, D)
    for code in np.asarray(alone["book"])[2:]:
        assert np.isclose(flat, code, rtol=1e-3, atol=1e-3).all(axis=1).any()
    assert len(np.unique(np.asarray(alone["book"])[2:].round(3), axis=0)) == 6
    mesh = partition.make_mesh(data=4, fsdp=2)
    with partition.use_mesh(mesh):
        split, _ = step(jax.device_put(z, partition.batch_sharding(mesh)))
    for name, leaf in alone.items():
        np.testing.assert_allclose(split[name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)
        for shard in split[name].addressable_shards:  # whole on each device, and equal there
            if shard.data.shape == leaf.shape:
                np.testing.assert_array_equal(shard.data, split[name])


# --- Gumbel ---


def test_the_divergence_from_even_use():
    quantizer = Gumbel(K, D, beta=(1.0, 1.0, 1), values_per_code=2.0)
    state = state_of(quantizer)
    for logits, expected in ((jnp.zeros((1, 1, 1, K)), 0.0), (1e3 * jnp.eye(K)[None, None], math.log(K))):
        made = quantized(quantizer, state, logits, KEY, 0, True)
        np.testing.assert_allclose(made.scalars["kl"], expected, atol=1e-5)
        np.testing.assert_allclose(made.loss, expected / 2, atol=1e-5)


def test_the_schedules_of_temperature_and_weight():
    tau = (1.0, 1 / 16, 100)
    values = [float(quantize.cosine(tau, step)) for step in (0, 50, 100, 1000)]
    np.testing.assert_allclose(values, [1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16], rtol=1e-6)


def test_codes_are_hard_and_training_is_relaxed():
    quantizer = Gumbel(K, D, tau=(1 / 16, 1 / 16, 1))
    state, logits = state_of(quantizer), 2 * jax.random.normal(KEY, (1, 2, 2, K))
    hard = quantized(quantizer, state, logits, KEY, 0, False)
    np.testing.assert_array_equal(hard.codes, logits.argmax(-1))
    np.testing.assert_array_equal(hard.z_q, quantizer.lookup(state, hard.codes))
    noise = jax.random.gumbel(KEY, logits.shape)
    soft = jax.nn.softmax((logits + noise) * 16) @ state["embedding"] + state["bias"]
    np.testing.assert_allclose(
        quantized(quantizer, state, logits, KEY, 0, True).z_q, soft, rtol=1e-5, atol=1e-6
    )


# --- FSQ ---


@pytest.mark.parametrize("levels", [(8, 5, 5), (3, 2), (4,)])
def test_every_code_is_one_point_of_the_lattice(levels):
    quantizer = FSQ(math.prod(levels), levels)
    codes = jnp.arange(quantizer.num_codes).reshape(1, 1, -1)
    points = np.asarray(quantizer.lookup({}, codes))[0, 0]
    expected = [np.arange(level) / (level // 2) - 1 for level in levels]
    lattice = {tuple(np.round(point, 5)) for point in itertools.product(*expected)}
    assert {tuple(np.round(point, 5)) for point in points} == lattice and len(lattice) == len(points)
    # the vector whose bounded value is a point of the lattice
    half = np.array([(level - 1) * (1 - 1e-3) / 2 for level in levels])
    offset = np.array([0.5 if level % 2 == 0 else 0.0 for level in levels])
    digits = points * np.array([level // 2 for level in levels])
    inside = np.clip((digits + offset) / half, -1 + 1e-6, 1 - 1e-6)
    z = jnp.asarray(np.arctanh(inside) - np.tan(offset / half), jnp.float32)[None, None]

    @jax.jit
    def compute(z):
        made, pull = jax.vjp(lambda z: quantized(quantizer, {}, z, KEY, 0, True).z_q, z)
        return quantizer.encode({}, z), made, pull(jnp.ones_like(made))[0]

    found, made, gradient = compute(z)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(made[0, 0], points, atol=1e-5)
    assert np.abs(gradient).max() > 0


# --- the use of codes ---


def test_perplexity_and_the_window():
    assert float(quantize.perplexity(jnp.full(K, 3.0))) == pytest.approx(K, rel=1e-5)
    assert float(quantize.perplexity(jnp.array([5.0, 0, 0]))) == pytest.approx(1)
    quantizer = VQ(4, D, decay=0.0)
    state = state_of(quantizer)
    counts = jnp.array([[quantize.WINDOW / 2, 0, 0, 0]])
    update = functools.partial(quantizer.update, key=KEY)
    state, scalars = update(state, {"counts": counts})
    assert scalars["usage"] == 1  # half a window was drawn
    state, scalars = update(state, {"counts": jnp.roll(counts, 1, axis=1)})
    assert scalars["usage"] == 0.5 and scalars["perplexity"] == 1
    _, scalars = update(state, {"counts": counts})
    assert scalars["usage"] == 0.5

"""The autoregressive prior: its codes, its network with and without a cache, what it learns and draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops
from dalle2_jax.models.stages import ar_prior
from tests.learned import assert_within, descend, key_of, share_nearest

KEY = jax.random.key(0)
EMBED, LENGTH, CODES = 16, 6, 12


def build(**changes):
    settings = dict(
        embed_dim=EMBED,
        text=dict(vocab_size=20, context_length=LENGTH, width=32, depth=1, num_heads=2),
        latent=dict(width=32, depth=2, num_heads=2),
        num_components=CODES,
        num_buckets=32,
        num_dot_buckets=8,
        max_error=1e-3,
        fit_rows=256,
    )
    return ar_prior.build(**settings | changes)


def embeddings(count, rank=8, seed=0):
    """Image embeddings of low rank beside a little noise, and text embeddings near to them."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(EMBED, rank)))[0]
    image = rng.normal(size=(count, rank)) * np.linspace(2, 0.5, rank) @ basis.T + 0.3
    image += 1e-3 * rng.normal(size=image.shape)
    text = image + 0.5 * rng.normal(size=image.shape)
    return image.astype(np.float32), text.astype(np.float32)


def batch_of(size, seed=0):
    image, text = embeddings(size, seed=seed)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 20, (size, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (size, 1))
    return dict(image_embed=image, text_embed=text, tokens=tokens, token_mask=mask)


def in_parts(count=2000, parts=7):
    image, text = embeddings(count)
    return lambda: (
        dict(image_embed=i, text_embed=t)
        for i, t in zip(np.array_split(image, parts), np.array_split(text, parts), strict=True)
    )


def fit(seed=0):
    """A stage, its parameters with fitted statistics, and the scalars of the fit."""
    stage = build()
    params = jax.jit(stage.init)(key_of(seed), batch_of(2))
    params, scalars = stage.fit(params, in_parts())
    return stage, params, scalars


@pytest.fixture(scope="module")
def fitted():
    return fit()


def test_components_are_those_of_the_covariance_in_falling_order(fitted):
    stage, params, scalars = fitted
    image, _ = embeddings(2000)
    stats = {name: np.asarray(x) for name, x in params["stats"].items()}
    np.testing.assert_allclose(stats["mean"], image.mean(axis=0), atol=1e-5)
    _, singular, rows = np.linalg.svd(image.astype(np.float64) - image.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs((stats["components"][:8] * rows[:8]).sum(axis=1)), 1, atol=1e-4)
    explained = np.cumsum(singular**2) / (singular**2).sum()
    # the least number of components that leaves a thousandth is kept, the others are switched off
    least = int(np.argmax(explained >= 1 - 1e-3)) + 1
    assert scalars["components"] == least == stats["kept"].sum() <= 8
    assert scalars["unexplained"] == pytest.approx(1 - explained[least - 1], abs=1e-6)
    assert scalars["rows"] == 2000


def test_codes_rebuild_the_embedding_to_half_a_bucket(fitted):
    stage, params, _ = fitted
    params, image = jax.device_get(params), embeddings(500, seed=3)[0]
    encode, decode = jax.jit(stage.encode), jax.jit(stage.decode)
    codes = np.asarray(encode(params, image))
    assert codes.shape == (500, CODES) and codes.min() >= 0 and codes.max() < 32
    decoded = np.asarray(decode(params, codes))
    error = np.linalg.norm(decoded - image, axis=1)
    assert np.median(error) < 0.35 < 0.15 * np.median(np.linalg.norm(image, axis=1)) * 2
    edges = params["stats"]["edges"]
    kept = np.asarray(params["stats"]["kept"]).astype(bool)
    coordinates = (image - params["stats"]["mean"]) @ params["stats"]["components"].T
    inside = (coordinates > edges[:, 0]) & (coordinates < edges[:, -1])
    off = np.abs(jax.jit(ar_prior.centres)(edges, codes) - coordinates)
    width = edges[:, 1] - edges[:, 0]
    assert np.where(inside, off <= 0.501 * width, True)[:, kept].all()
    assert inside.mean() > 0.98
    # what lies beyond the percentiles goes to the outermost buckets
    far = encode(params, params["stats"]["mean"] + 100 * params["stats"]["components"][:1])
    assert far[0, 0] == 31
    # decoding is the inverse of encoding on codes
    again = encode(params, decoded)
    np.testing.assert_array_equal(again[:, kept], codes[:, kept])


def test_dot_products_fall_evenly_into_their_buckets(fitted):
    stage, params, _ = fitted
    image, text = embeddings(2000)
    dot_bucket = jax.jit(stage.dot_bucket)
    counts = np.bincount(dot_bucket(params, image, text), minlength=8)
    assert counts.min() > 230 and counts.max() < 270
    best = dot_bucket(params, image, image)
    assert (np.asarray(best) == 7).all()


def test_logits_of_a_code_depend_on_what_is_before_it_alone(fitted):
    stage, params, _ = fitted
    batch = batch_of(3)
    codes = np.array(jax.jit(stage.encode)(params, batch["image_embed"]))
    drop, no_dot = np.zeros(3, bool), np.zeros(3, np.int32)
    apply = jax.jit(lambda params, *arguments: stage.net.apply({"params": params}, *arguments))

    def logits(codes, dot=no_dot, drop=drop, batch=batch):
        text = (batch["tokens"], batch["token_mask"], drop)
        return np.asarray(apply(params["net"], batch["text_embed"], dot, codes, *text))

    other_code = codes.copy()
    other_code[:, 4] += 1
    plain, changed = logits(codes), logits(other_code)
    np.testing.assert_array_equal(plain[:, :5], changed[:, :5])
    assert (np.abs(plain - changed)[:, 5:].max(axis=(0, 2)) > 1e-6).all()
    assert (np.abs(plain - logits(codes, dot=np.ones(3, np.int32))).max(axis=-1) > 1e-6).all()
    # padding is not read, words are
    padded = batch | {"tokens": np.where(batch["token_mask"], batch["tokens"], 7)}
    np.testing.assert_allclose(plain, logits(codes, batch=padded), atol=1e-6)
    other = batch | {"tokens": np.where(batch["token_mask"], 7, batch["tokens"])}
    assert np.abs(plain - logits(codes, batch=other)).max() > 1e-4
    # the null branch knows neither caption nor embedding nor dot product
    null = logits(codes, drop=~drop)
    for changes in (
        dict(batch=other),
        dict(dot=np.ones(3, np.int32)),
        dict(batch=batch | {"text_embed": -batch["text_embed"]}),
    ):
        np.testing.assert_array_equal(null, logits(codes, drop=~drop, **changes))
    assert np.abs(null - logits(other_code, drop=~drop)).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_cache_changes_nothing(fitted, dtype):
    _, params, _ = fitted
    net = build(dtype=dtype, remat=True).net
    batch = batch_of(3)
    codes = np.random.default_rng(1).integers(0, 32, (3, CODES)).astype(np.int32)
    dot, drop = np.array([1, 2, 3]), np.array([False, True, False])
    words = (batch["tokens"], batch["token_mask"], drop)

    def apply(params, method, *arguments):
        return net.apply({"params": params}, *arguments, method=method)

    @jax.jit
    def at_once(params):
        return apply(params, "__call__", batch["text_embed"], dot, codes, *words)

    @jax.jit
    def before(params):
        states, mask = apply(params, "encode", *words)
        inputs = apply(params, "prefix", batch["text_embed"], dot, drop)
        inputs = [inputs[:, 0], inputs[:, 1]]
        inputs += [apply(params, "embed_codes", codes[:, i]) for i in range(CODES - 1)]
        return inputs, apply(params, "read", states), mask, apply(params, "empty_caches", 3)

    step = jax.jit(lambda params, *arguments: apply(params, "step", *arguments))
    whole = at_once(params["net"])
    inputs, text, mask, caches = before(params["net"])
    parts = []
    for i, x in enumerate(inputs):
        logits, caches = step(params["net"], x, np.int32(i), text, mask, caches)
        parts.append(np.asarray(logits, np.float32))
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(np.stack(parts[1:], axis=1), whole, atol=tolerance)


BOUNDS = {
    "loss": ("<", 0.1),
    "accuracy": (">", 0.97),
    "code_cosine": (">", 0.98),
    "nearest": (">", 0.6),
    "similarity": (">", 0.85),
}


def learn(seed, fitted):
    """The stage after it has learned eight embeddings by heart in 250 steps, and their batch."""
    stage, params, _ = fitted
    batch = batch_of(8, seed=5 + seed)
    # all dot products in the uppermost bucket, which is what will be drawn
    stats = params["stats"] | {"dot_edges": np.array([-1] * 8 + [1], np.float32)}
    params, _ = descend(stage, params | {"stats": stats}, key_of(seed), batch, steps=250, learning_rate=3e-3)
    return stage, params, batch


def reached(seed, learned=None):
    """How well it knows the eight, and how near what it draws is to the embeddings of the captions."""
    stage, params, batch = learned or learn(seed, fit(seed))
    loss, metrics, _ = jax.jit(lambda *arguments: stage.loss(*arguments, train=False))(params, KEY, batch)
    sample = jax.jit(
        lambda params, keys, batch, s: stage.sample(params, keys, batch, guidance_scale=s, dot_quantile=0.99)
    )
    drawn = sample(params, jax.random.split(jax.random.key(3 + seed), 8), batch, jnp.float32(2.0))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    similarity = unit(drawn) @ unit(batch["image_embed"]).T
    return {
        "loss": loss,
        "accuracy": metrics["accuracy"],
        "code_cosine": metrics["code_cosine"],
        "nearest": share_nearest(similarity),
        "similarity": np.diagonal(similarity).mean(),
    }


@pytest.fixture(scope="module")
def trained(fitted):
    return learn(0, fitted)


def test_eight_embeddings_are_learned_and_drawn(trained):
    assert_within(reached(0, trained), BOUNDS)


@pytest.mark.parametrize("scale", [pytest.param(1, marks=pytest.mark.slow), 2.0])
def test_a_sample_depends_on_its_own_key_and_caption_alone(trained, scale):
    stage, params, batch = trained
    keys, how = jax.random.split(jax.random.key(3), 8), dict(num_candidates=2, guidance_scale=scale)
    draw = jax.jit(functools.partial(stage.sample, **how))
    sample = functools.partial(draw, params)
    whole = sample(keys, batch)
    first = np.arange(8) < 4
    other_keys = jnp.where(first, jax.random.split(KEY, 8), keys)
    others = {name: np.concatenate([x[:4][::-1], x[4:]]) for name, x in batch.items()}
    changed = sample(other_keys, others)
    np.testing.assert_allclose(whole[4:], changed[4:], atol=1e-5)
    assert (np.abs(whole - changed)[:4].max(axis=1) > 1e-3).all()
    np.testing.assert_array_equal(whole, sample(keys, batch))


@pytest.mark.parametrize("scale", [1, 2.0])
def test_the_caption_is_read_once_for_all_candidates(fitted, scale):
    stage, params, _ = fitted
    batch, keys = batch_of(4), jax.random.split(jax.random.key(0), 4)
    one, two, three = (
        flops.count(lambda n=n: stage.sample(params, keys, batch, num_candidates=n, guidance_scale=scale))
        for n in (1, 2, 3)
    )

    def read(net):
        return net.read(net.encode(batch["tokens"], batch["token_mask"], jnp.zeros(4, bool))[0])

    once = flops.count(lambda: stage.net.apply({"params": params["net"]}, method=read))
    assert three - two == two - one == one - (1 if scale == 1 else 2) * once


def test_the_dot_product_is_drawn_from_the_upper_half_and_the_nearest_candidate_kept(fitted):
    stage, params, _ = fitted
    batch = batch_of(4)
    keys, seen, net = jax.random.split(KEY, 4), [], stage.net

    class Watched:
        num_dot_buckets, num_codes = net.num_dot_buckets, net.num_codes

        @staticmethod
        def apply(variables, *arguments, method):
            if method == "prefix":
                seen.append(arguments[1])
            return net.apply(variables, *arguments, method=method)

    watched = dataclasses.replace(stage, net=Watched)

    @jax.jit
    def draw_many(params, keys, batch):
        return watched.sample(params, keys, batch, num_candidates=16), seen[-1]

    many, buckets = jax.device_get(draw_many(params, keys, batch))
    assert buckets.shape == (64,) and set(buckets) == {4, 5, 6, 7}
    one = np.asarray(jax.jit(functools.partial(stage.sample, num_candidates=1))(params, keys, batch))

    def cosine(x):
        text = batch["text_embed"]
        return (x * text).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(text, axis=-1)

    assert (cosine(many) >= cosine(one) - 1e-6).all() and cosine(many).mean() > cosine(one).mean() + 0.05
    draw_greedily = jax.jit(functools.partial(stage.sample, temperature=1e-6, dot_quantile=0.99))
    greedy = [draw_greedily(params, jax.random.split(jax.random.key(seed), 4), batch) for seed in range(2)]
    np.testing.assert_array_equal(*greedy)


def test_statistics_have_no_gradient(fitted):
    stage, params, _ = fitted
    grads = jax.jit(jax.grad(lambda *arguments: stage.loss(*arguments).value))(params, KEY, batch_of(4))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads["stats"]))
    assert any((np.asarray(g) != 0).any() for g in jax.tree.leaves(grads["net"]))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_components=17), "num_components 17 must be in 1 .. embed_dim"),
        (dict(num_buckets=1), "num_buckets 1"),
        (dict(text_drop=1.0), "text_drop 1.0"),
        (dict(temperature=0.0), "temperature 0.0"),
        (dict(latent=dict(width=30, depth=1, num_heads=4)), "latent.width 30 is not a multiple"),
        (dict(latent=dict(widht=32, depth=1, num_heads=2)), "did you mean latent.width"),
    ],
)
def test_mistakes_are_answered_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_too_few_embeddings_are_refused():
    stage = build()
    with pytest.raises(ValueError, match="raise model.fit_rows"):
        stage.fit({}, in_parts(count=10, parts=2))

"""Text transformers: where CLIP's is pooled, what padding may change, and GLIDE's learned padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.text import CLIPTextTransformer, GlideTextTransformer, TextPool, last_true

KEY = jax.random.key(0)
LENGTH, VOCAB = 6, 13


def build(kind, **more):
    """(apply, tokens, mask) of a network whose parameters are all random; captions of 2, 4 and 6 tokens."""
    net = kind(vocab_size=VOCAB, context_length=LENGTH, width=8, depth=2, num_heads=2, **more)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([[2], [4], [6]])
    with layers.shapes_only(True):
        shapes = jax.eval_shape(net.init, KEY, tokens, mask)
    variables = jax.tree.map(lambda x: np.asarray(0.5 * draw.standard_normal(x.shape), np.float32), shapes)
    return functools.partial(jax.jit(net.apply), variables), tokens, mask


@pytest.fixture(scope="module")
def clip_text():
    return build(CLIPTextTransformer, embed_dim=5)


@pytest.fixture(scope="module")
def glide_text():
    return build(GlideTextTransformer)


def test_last_true_is_the_end_of_text():
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    np.testing.assert_array_equal(last_true(mask), [0, 1, 2, 1])


def test_clip_ignores_what_stands_after_the_end_of_text(clip_text):
    apply, tokens, mask = clip_text
    embed, states = jax.device_get(apply(tokens, mask))
    assert embed.shape == (3, 5) and states.shape == (3, LENGTH, 8)
    other, other_states = jax.device_get(apply(np.where(mask, tokens, (tokens + 1) % VOCAB), mask))
    np.testing.assert_array_equal(embed, other)
    np.testing.assert_array_equal(states[mask], other_states[mask])
    assert np.abs(states - other_states)[~mask].max() > 1e-3


def test_clip_is_pooled_at_the_last_real_token_whatever_its_id(clip_text):
    """Trap 19: pooling at the highest id would fail for vocabularies with tokens above the end of text."""
    apply, tokens, mask = clip_text
    first, last = np.arange(LENGTH) == 0, np.arange(LENGTH) == np.array([[1], [3], [5]])
    tokens = np.where(first, VOCAB - 1, tokens)  # the highest id stands first
    embed, _ = jax.device_get(apply(tokens, mask))
    changed, _ = jax.device_get(apply(np.where(last, (tokens + 1) % VOCAB, tokens), mask))
    assert (np.abs(embed - changed).max(axis=1) > 1e-3).all()
    shorter, _ = jax.device_get(apply(tokens, mask & (np.arange(LENGTH) < LENGTH - 1)))
    np.testing.assert_array_equal(embed[:2], shorter[:2])
    assert np.abs(embed[2] - shorter[2]).max() > 1e-3


def test_clip_reads_shorter_batches_as_padded_ones(clip_text):
    apply, tokens, mask = clip_text
    np.testing.assert_allclose(
        apply(tokens[:2, :4], mask[:2, :4])[0], apply(tokens[:2], mask[:2])[0], atol=1e-5
    )


def test_glide_without_tokens_does_not_depend_on_them(glide_text):
    apply, tokens, mask = glide_text
    null = np.asarray(apply(tokens, np.zeros_like(mask)))
    np.testing.assert_array_equal(null, apply((tokens + 1) % VOCAB, np.zeros_like(mask)))
    np.testing.assert_allclose(null[0], null[1], atol=1e-6)
    assert np.abs(null[0] - null[0, :1]).max() > 1e-3  # the padding embedding differs by position


@pytest.mark.parametrize("remat", ["none", "products"])
def test_glides_blocks_as_one_loop_have_the_same_states_and_gradients(glide_text, remat):
    apply, tokens, mask = glide_text
    scanned = build(GlideTextTransformer, scan_blocks=True, remat=remat)[0]

    def loss(states_of, variables):
        return jnp.square(states_of.func(variables, tokens, mask)).sum()

    assert "scan[" in str(jax.make_jaxpr(functools.partial(loss, scanned))(*scanned.args))
    expected, here = (jax.value_and_grad(functools.partial(loss, x))(*apply.args) for x in (apply, scanned))
    np.testing.assert_allclose(here[0], expected[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(here[1]), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-4 * np.abs(x).max())


def test_glide_looks_both_ways_and_not_at_padded_ids(glide_text):
    apply, tokens, mask = glide_text
    states = apply(tokens, mask)
    np.testing.assert_array_equal(states, apply(np.where(mask, tokens, 0), mask))
    changed = apply(np.where(np.arange(LENGTH) == 1, (tokens + 1) % VOCAB, tokens), mask)
    assert (np.abs(states - changed).max(axis=-1) > 1e-4).all()


def test_pooling_equals_its_definition():
    """Norm, attention of the mean + position to the mean and the states, Dense, norm (Imagen, IF)."""
    net, draw = TextPool(num_heads=2, features=6), np.random.default_rng(1)
    states, mask = 3 * draw.standard_normal((2, 4, 8)) + 1, np.array([[True] * 4, [True, True, False, False]])
    with layers.shapes_only(True):
        shapes = jax.eval_shape(net.init, KEY, states, mask)["params"]
    params = jax.tree.map(lambda x: np.asarray(0.5 * draw.standard_normal(x.shape), np.float32), shapes)

    def norm(name, x):
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return x * params[name]["scale"] + params[name]["bias"]

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    expected = []
    for x, real in zip(norm("norm1", states), mask, strict=True):
        x = x[real]
        x = np.concatenate([x.mean(axis=0, keepdims=True) + params["position"]["embedding"], x])
        q, (k, v) = dense("q", x[:1]).reshape(2, 4), np.split(dense("kv", x).reshape(-1, 4, 4), 2, axis=1)
        weights = np.exp(np.einsum("hd,khd->hk", q, k) / 2)
        weights /= weights.sum(axis=1, keepdims=True)
        pooled = np.einsum("hk,khd->hd", weights, v).reshape(8)
        expected.append(norm("norm2", dense("proj", pooled)))
    np.testing.assert_allclose(jax.jit(net.apply)({"params": params}, states, mask), expected, atol=1e-4)

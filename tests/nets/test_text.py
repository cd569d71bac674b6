"""Text transformers: where CLIP's is pooled, what padding may change, and GLIDE's learned padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.nets.text import CLIPTextTransformer, GlideTextTransformer, last_true

KEY = jax.random.key(0)
LENGTH, VOCAB = 6, 13


def build(kind, **more):
    """(apply, tokens, mask) of a network whose parameters are all random; captions of 2, 4 and 6 tokens."""
    net = kind(vocab_size=VOCAB, context_length=LENGTH, width=8, depth=2, num_heads=2, **more)
    tokens = jax.random.randint(KEY, (3, LENGTH), 0, VOCAB)
    mask = jnp.arange(LENGTH) < jnp.array([[2], [4], [6]])
    shapes = net.init(KEY, tokens, mask)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(KEY, len(leaves))
    params = jax.tree.unflatten(
        tree, [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )
    return jax.jit(lambda tokens, mask: net.apply({"params": params}, tokens, mask)), tokens, mask


@pytest.fixture(scope="module")
def clip_text():
    return build(CLIPTextTransformer, embed_dim=5)


@pytest.fixture(scope="module")
def glide_text():
    return build(GlideTextTransformer)


def test_last_true_is_the_end_of_text():
    mask = jnp.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    np.testing.assert_array_equal(last_true(mask), [0, 1, 2, 1])


def test_clip_ignores_what_stands_after_the_end_of_text(clip_text):
    apply, tokens, mask = clip_text
    embed, states = apply(tokens, mask)
    assert embed.shape == (3, 5) and states.shape == (3, LENGTH, 8)
    other, other_states = apply(jnp.where(mask, tokens, (tokens + 1) % VOCAB), mask)
    np.testing.assert_array_equal(embed, other)
    np.testing.assert_array_equal(states[mask], other_states[mask])
    assert np.abs(states - other_states)[~mask].max() > 1e-3


def test_clip_is_pooled_at_the_last_real_token_whatever_its_id(clip_text):
    """Trap 19: pooling at the highest id would fail for vocabularies with tokens above the end of text."""
    apply, tokens, mask = clip_text
    tokens = tokens.at[:, 0].set(VOCAB - 1)  # the highest id stands first
    embed, _ = apply(tokens, mask)
    last = jnp.array([1, 3, 5])
    changed, _ = apply(tokens.at[jnp.arange(3), last].set((tokens[jnp.arange(3), last] + 1) % VOCAB), mask)
    assert (np.abs(embed - changed).max(axis=1) > 1e-3).all()
    shorter, _ = apply(tokens, mask.at[:, -1].set(False))
    np.testing.assert_array_equal(embed[:2], shorter[:2])
    assert np.abs(embed[2] - shorter[2]).max() > 1e-3


def test_clip_reads_shorter_batches_as_padded_ones(clip_text):
    apply, tokens, mask = clip_text
    np.testing.assert_allclose(
        apply(tokens[:2, :4], mask[:2, :4])[0], apply(tokens[:2], mask[:2])[0], atol=1e-5
    )


def test_glide_without_tokens_does_not_depend_on_them(glide_text):
    apply, tokens, mask = glide_text
    null = apply(tokens, jnp.zeros_like(mask))
    np.testing.assert_array_equal(null, apply((tokens + 1) % VOCAB, jnp.zeros_like(mask)))
    np.testing.assert_allclose(null[0], null[1], atol=1e-6)
    assert np.abs(null[0] - null[0, :1]).max() > 1e-3  # the padding embedding differs by position


def test_glide_looks_both_ways_and_not_at_padded_ids(glide_text):
    apply, tokens, mask = glide_text
    states = apply(tokens, mask)
    np.testing.assert_array_equal(states, apply(jnp.where(mask, tokens, 0), mask))
    changed = apply(tokens.at[:, 1].set((tokens[:, 1] + 1) % VOCAB), mask)
    assert (np.abs(states - changed).max(axis=-1) > 1e-4).all()

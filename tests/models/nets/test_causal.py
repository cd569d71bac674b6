"""The transformer block with a cache: in pieces it computes what it computes at once, under any mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import causal, layers

KEY = jax.random.key(0)
BATCH, LENGTH, WIDTH, HEADS = 2, 6, 8, 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sparse_mask(seed=3):
    """Each position sees itself and some of those before it, other ones in each example."""
    seen = np.random.default_rng(seed).random((BATCH, 1, LENGTH, LENGTH)) < 0.5
    return np.asarray(causal.causal_mask(LENGTH)) & (seen | np.eye(LENGTH, dtype=bool))


MASKS = {"causal": lambda: np.asarray(causal.causal_mask(LENGTH)), "sparse": sparse_mask}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("remat", ["none", "all"])
def test_in_pieces_with_a_cache_it_is_what_it_is_at_once(mask, cross, remat):
    block = layers.remat(causal.Block, remat)(WIDTH, HEADS, "gelu", 0.3, cross_attention=cross)
    x, mask = normal(BATCH, LENGTH, WIDTH), MASKS[mask]()
    states = normal(BATCH, 4, 5, seed=1) if cross else None
    states_mask = np.arange(4) < np.array([[2], [4]]) if cross else None
    variables = block.init(KEY, x, mask, context=states, context_mask=states_mask)
    whole, no_cache = block.apply(variables, x, mask, context=states, context_mask=states_mask)
    assert no_cache is None

    context = block.apply(variables, states, method="read") if cross else None
    cache = causal.empty_cache(BATCH, LENGTH, WIDTH, HEADS, jnp.float32)
    step = jax.jit(
        lambda x, mask, cache, start: block.apply(variables, x, mask, cache, start, context, states_mask)
    )
    parts = []
    for start, end, looked_at in ((0, 3, 3), (3, 4, LENGTH), (4, 6, LENGTH)):
        part, cache = step(x[:, start:end], mask[:, :, start:end, :looked_at], cache, start)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    if mask.shape[0] > 1:  # and the mask matters
        other, _ = block.apply(
            variables, x, causal.causal_mask(LENGTH), context=states, context_mask=states_mask
        )
        assert np.abs(other - whole).max() > 1e-3


def test_positions_that_are_not_there_yet_are_never_looked_at():
    """NaN in the cache beyond the mask's last position reaches nothing."""
    block = causal.Block(WIDTH, HEADS, "gelu", 0.3)
    x, mask = normal(BATCH, 3, WIDTH), causal.causal_mask(3)
    variables = block.init(KEY, x, mask)
    cache = jax.tree.map(lambda a: a + jnp.nan, causal.empty_cache(BATCH, LENGTH, WIDTH, HEADS, jnp.float32))
    part, cache = block.apply(variables, x, mask, cache, 0)
    np.testing.assert_allclose(part, block.apply(variables, x, mask)[0], atol=1e-6)
    assert np.isfinite(cache.keys[:, :3]).all() and np.isnan(cache.keys[:, 3:]).all()

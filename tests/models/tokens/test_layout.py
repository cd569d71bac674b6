"""Several fields of tokens as one sequence with one vocabulary."""

import numpy as np

from dalle2_jax.models.tokens.layout import Layout, Part

LAYOUT = Layout((Part("tokens", 3, 10), Part("codes", 4, 5)))


def test_a_sequence_is_joined_and_split_again():
    rng = np.random.default_rng(0)
    batch = {"codes": rng.integers(0, 5, (2, 4)), "tokens": rng.integers(0, 10, (2, 3))}
    ids = LAYOUT.join(batch)
    assert ids.shape == (2, LAYOUT.length) == (2, 7) and LAYOUT.vocab_size == 15
    np.testing.assert_array_equal(ids[:, :3], batch["tokens"])
    np.testing.assert_array_equal(ids[:, 3:], batch["codes"] + 10)
    again = LAYOUT.split(ids)
    assert list(again) == ["tokens", "codes"]
    for name, value in again.items():
        np.testing.assert_array_equal(value, batch[name])


def test_each_position_allows_the_ids_of_its_own_field():
    allowed = np.asarray(LAYOUT.allowed())
    assert allowed.shape == (7, 15)
    assert allowed[:3, :10].all() and not allowed[:3, 10:].any()
    assert allowed[3:, 10:].all() and not allowed[3:, :10].any()

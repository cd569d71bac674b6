"""Several fields of tokens as one sequence with one vocabulary."""

import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.tokens.layout import Layout, Part

LAYOUT = Layout((Part("tokens", (3,), 10), Part("codes", (4,), 5)))
PADDED = Layout((Part("tokens", (3,), 10, pads=True), Part("top", (1, 2), 4), Part("codes", (2, 3), 5)))


def test_a_sequence_is_joined_and_split_again():
    rng = np.random.default_rng(0)
    batch = {"codes": rng.integers(0, 5, (2, 4)), "tokens": rng.integers(0, 10, (2, 3))}
    ids = LAYOUT.join(batch)
    assert ids.shape == (2, LAYOUT.length) == (2, 7) and LAYOUT.vocab_size == LAYOUT.num_ids == 15
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


def test_a_pad_has_an_id_of_its_position():
    rng = np.random.default_rng(1)
    batch = {"tokens": np.array([[7, -1, -1], [-1, 3, 0]])}
    batch |= {"top": rng.integers(0, 4, (2, 1, 2)), "codes": rng.integers(0, 5, (2, 2, 3))}
    ids = PADDED.join(batch)
    assert PADDED.vocab_size == 19 and PADDED.num_ids == 22 and ids.shape == (2, 11)
    np.testing.assert_array_equal(ids[:, :3], [[7, 20, 21], [19, 3, 0]])
    for name, value in PADDED.split(ids).items():
        np.testing.assert_array_equal(value, batch[name])


def test_positions_of_a_grid_are_rows_and_columns():
    none = PADDED.num_rows
    assert none == 3 + (1 + 2) + (2 + 3)
    rows = np.asarray(PADDED.rows())
    text, top, last = rows[:3], rows[3:5], rows[5:]
    np.testing.assert_array_equal(text, [[0, none], [1, none], [2, none]])
    np.testing.assert_array_equal(top, [[3, 4], [3, 5]])
    np.testing.assert_array_equal(last, [[6 + r, 8 + c] for r in range(2) for c in range(3)])


def test_the_first_parts_alone_are_joined():
    ids = Layout((Part("", (1,), 1), Part("codes", (2, 2), 5))).join({"": jnp.zeros(3)}, 1)
    np.testing.assert_array_equal(ids, np.zeros((3, 1)))

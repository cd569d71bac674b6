"""Masks of token models against loops over rows and columns, and what layers of them reach."""

import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.tokens import masks

TEXT, WIDTH, HEIGHT = 3, 4, 5
LENGTH = TEXT + WIDTH * HEIGHT
KINDS = ("full", "row", "column", "conv3", "conv5")


def mask(kind, text=TEXT, width=WIDTH, length=LENGTH):
    return np.asarray(masks.rows((kind,), 0, length, length, text, width))[0, 0, 0]


def cells(kind, a, width=WIDTH):
    """The cells that cell `a` reads, by walking over its neighbours (section 2.2 of DALL-E's sheet)."""
    if kind == "full":
        return set(range(a + 1))
    if kind == "row":
        return {b for b in range(a + 1) if a - b in range(width + 1)}
    if kind == "column":
        return {b for b in range(a, -1, -width)}
    half = int(kind[4:]) // 2
    offsets = {dy * width + dx for dy in range(half + 1) for dx in range(-half, half + 1)}
    return {a - offset for offset in offsets if 0 <= offset <= a}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_the_brute_force_one(kind):
    got = mask(kind)
    for i in range(LENGTH):
        if i < TEXT:
            wanted = set(range(i + 1))
        else:
            wanted = {*range(TEXT), *(TEXT + b for b in cells(kind, i - TEXT))}
        assert set(np.flatnonzero(got[i])) == wanted, i


@pytest.mark.parametrize(
    "kind, read", [("row", {5, 6, 7, 8, 9}), ("column", {1, 5, 9}), ("conv3", {4, 5, 6, 8, 9})]
)
def test_the_cells_that_cell_9_of_rows_of_4_reads(kind, read):
    """The sheet's cases; `conv` wraps around rows, as DALL-E's does."""
    assert set(np.flatnonzero(mask(kind, text=0)[9])) == read
    assert {3, 4} <= set(np.flatnonzero(mask("conv3", text=0)[8])) or kind != "conv3"


def test_column_after_row_reaches_the_whole_past():
    reached = mask("column").astype(int) @ mask("row").astype(int) > 0
    np.testing.assert_array_equal(reached, np.tril(np.ones_like(reached)))
    assert not (mask("column").astype(int) @ mask("column").astype(int) > 0)[-1].all()


def test_rows_from_a_position_on_are_those_of_the_whole_mask():
    whole = masks.rows(KINDS, 0, LENGTH, LENGTH, TEXT, WIDTH)
    part = masks.rows(KINDS, jnp.int32(7), 2, LENGTH, TEXT, WIDTH)
    assert part.shape == (len(KINDS), 1, 1, 2, LENGTH)
    np.testing.assert_array_equal(part, whole[:, :, :, 7:9])


@pytest.mark.parametrize("kind", ["conv4", "conv", "rows", ""])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match="kind .* of attention is unknown"):
        masks.check_kind(kind)

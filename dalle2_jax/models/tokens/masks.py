"""Attention masks of token models, as rules on positions: whether position i reads position j.

A sequence is `prefix` positions, such as a caption, then the cells of grids `width` cells wide, row by row.
No rule reads what comes later. Cells read the whole prefix; the prefix reads itself. With d = i - j a cell
reads these cells (Sparse Transformers, arXiv 1904.10509; DALL-E, arXiv 2102.12092, figure 11):

    full      d >= 0
    row       0 <= d <= width                   itself and the `width` cells before it, across the row's start
    column    d = 0, width, 2 width, ...
    convK     d = dy width + dx >= 0 with 0 <= dy <= K // 2, |dx| <= K // 2     (it wraps around rows, too)
"""

import re

import jax
import jax.numpy as jnp

_CONV = re.compile(r"conv(\d*[13579])")


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind."""
    if kind not in ("full", "row", "column") and not _CONV.fullmatch(kind):
        raise ValueError(
            f"kind {kind!r} of attention is unknown: use full, row, column, or conv3, conv5, ..."
        )


def reads(kind: str, i: jax.Array, j: jax.Array, prefix: int, width: int) -> jax.Array:
    """Whether positions i read positions j: bool, in the shape that i and j broadcast to."""
    distance = i - j
    if kind == "full":
        return distance >= 0
    if kind == "row":
        near = distance <= width
    elif kind == "column":
        near = distance % width == 0
    else:
        half = int(kind.removeprefix("conv")) // 2
        near = distance <= half  # of its own row
        for dy in range(1, half + 1):
            near |= abs(distance - dy * width) <= half
    return (distance >= 0) & (near | (j < prefix))


def rows(
    kinds: tuple[str, ...], start: int | jax.Array, count: int, length: int, prefix: int, width: int
) -> jax.Array:
    """Rows start .. start + count - 1 of the masks of these kinds, [len(kinds), 1, 1, count, length] bool.

    The two axes of size 1 are those of examples and heads. start may be traced.
    """
    i, j = start + jnp.arange(count)[:, None], jnp.arange(length)
    return jnp.stack([reads(kind, i, j, prefix, width) for kind in kinds])[:, None, None]

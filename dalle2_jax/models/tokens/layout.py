"""The layout of a sequence of several fields of tokens, such as caption and picture (DALL-E 1).

The ids of a part follow those of the part before. After all of them come the pads: a position of a part with
`pads` that holds no token has an id of its own. Pads are read, never predicted.

Positions are a table of learned vectors, whose rows are summed: a part without a grid has a row for each
position, a part on a grid one for each index of each axis (row and column; of video frame, row and column).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
    """One field of a batch, int32 in 0 .. vocab_size - 1; -1 is a pad.

    shape: of an example; with two axes or more the part is a grid. name: '' is a part of zeros, no field.
    """

    name: str
    shape: tuple[int, ...]
    vocab_size: int
    pads: bool = False

    @property
    def length(self) -> int:
        """Positions of the part."""
        return math.prod(self.shape)


class Place(NamedTuple):
    """Where a part lies: its first position, its first id, the first id of its pads."""

    part: Part
    position: int
    id: int
    pad: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parts one after the other, in one vocabulary."""

    parts: tuple[Part, ...]

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return sum(part.length for part in self.parts)

    @property
    def vocab_size(self) -> int:
        """Ids of all parts together, without the pads."""
        return sum(part.vocab_size for part in self.parts)

    @property
    def num_ids(self) -> int:
        """Ids of all parts and pads."""
        return self.vocab_size + sum(part.length for part in self.parts if part.pads)

    def places(self) -> tuple[Place, ...]:
        """Where each part lies."""
        found, position, first, pad = [], 0, 0, self.vocab_size
        for part in self.parts:
            found.append(Place(part, position, first, pad))
            position, first = position + part.length, first + part.vocab_size
            pad += part.length if part.pads else 0
        return tuple(found)

    def join(self, batch: Mapping[str, jax.Array], parts: int | None = None) -> jax.Array:
        """The fields of a batch -> ids [B, length] int32; parts: of the first `parts` parts alone."""
        size, found = len(next(iter(batch.values()))), []
        for part, _, first, pad in self.places()[:parts]:
            if not part.name:
                found.append(jnp.full((size, part.length), first))
                continue
            values = batch[part.name].reshape(-1, part.length)
            ids = values + first
            found.append(jnp.where(values < 0, pad + jnp.arange(part.length), ids) if part.pads else ids)
        return jnp.concatenate(found, axis=1).astype(jnp.int32)

    def split(self, ids: jax.Array) -> dict[str, jax.Array]:
        """Ids [B, length] -> the fields; the inverse of `join`."""
        found = {}
        for part, position, first, _ in self.places():
            if part.name:
                values = ids[:, position : position + part.length] - first
                values = jnp.where(values >= part.vocab_size, -1, values) if part.pads else values
                found[part.name] = values.reshape(-1, *part.shape)
        return found

    def allowed(self) -> jax.Array:
        """[length, vocab_size] bool: the ids that may be predicted at each position."""
        ids = jnp.arange(self.vocab_size)
        rows = [
            jnp.broadcast_to((first <= ids) & (ids < first + part.vocab_size), (part.length, len(ids)))
            for part, _, first, _ in self.places()
        ]
        return jnp.concatenate(rows)

    @property
    def num_rows(self) -> int:
        """Rows of the table of positions."""
        return sum(sum(part.shape) for part in self.parts)

    def rows(self) -> jax.Array:
        """The rows of each position, [length, K] int32, K the most axes of a part; `num_rows`: none."""
        axes, start, found = max(len(part.shape) for part in self.parts), 0, []
        for part in self.parts:
            columns = [jnp.full((part.length,), self.num_rows)] * axes
            for axis, size in enumerate(part.shape):
                index = jnp.arange(part.length) // math.prod(part.shape[axis + 1 :]) % size
                columns[axis], start = start + index, start + size
            found.append(jnp.stack(columns, axis=1))
        return jnp.concatenate(found).astype(jnp.int32)

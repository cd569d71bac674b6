"""The layout of a sequence of several fields of tokens, such as caption and picture (DALL-E 1)."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
    """One field of a batch, [B, length] int32 in 0 .. vocab_size - 1."""

    name: str
    length: int
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parts one after the other, in one vocabulary: the ids of a part follow those of the part before."""

    parts: tuple[Part, ...]

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return sum(part.length for part in self.parts)

    @property
    def vocab_size(self) -> int:
        """Ids of all parts together."""
        return sum(part.vocab_size for part in self.parts)

    def _places(self):
        """(part, its first position, its first id), part by part."""
        position = offset = 0
        for part in self.parts:
            yield part, position, offset
            position, offset = position + part.length, offset + part.vocab_size

    def join(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The fields of a batch -> ids [B, length] int32."""
        return jnp.concatenate([batch[part.name] + offset for part, _, offset in self._places()], axis=1)

    def split(self, ids: jax.Array) -> dict[str, jax.Array]:
        """Ids [B, length] -> the fields; the inverse of `join`."""
        return {
            part.name: ids[:, start : start + part.length] - offset for part, start, offset in self._places()
        }

    def allowed(self) -> jax.Array:
        """[length, vocab_size] bool: the ids that may stand at each position."""
        ids = jnp.arange(self.vocab_size)
        rows = [
            jnp.broadcast_to((offset <= ids) & (ids < offset + part.vocab_size), (part.length, len(ids)))
            for part, _, offset in self._places()
        ]
        return jnp.concatenate(rows)

"""Text states in files: of each caption as many as it has tokens, in bfloat16.

FOLDER/text_states/text_states_N.npy    uint16 [tokens, D], the bits of bfloat16, caption after caption
FOLDER/token_counts/token_counts_N.npy  int32 [n], the tokens of each record, 0 for one without states

`dalle2_jax.embed` writes them; numpy's format has no bfloat16. Arrays are mapped, so that a record reads its
own states alone.
"""

from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from dalle2_jax.data import npy
from dalle2_jax.data.records import BadRecord

KINDS = ("text_states", "token_counts")


def packed(states: Sequence[np.ndarray | None], width: int) -> dict[str, np.ndarray]:
    """{kind: array to write} of floats [tokens, D] of each record, None for a record without."""
    counts = np.array([0 if one is None else len(one) for one in states], np.int32)
    parts = [np.asarray(one, ml_dtypes.bfloat16) for one in states if one is not None]
    joined = np.concatenate([np.zeros((0, width), ml_dtypes.bfloat16), *parts])
    return {"text_states": joined.view(np.uint16), "token_counts": counts}


def padded(states: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """{'text_states': [length, D], 'token_mask': bool [length]} of the states [tokens, D] of a caption."""
    rows = np.zeros((length, states.shape[1]), states.dtype)
    rows[: len(states)] = states
    return {"text_states": rows, "token_mask": np.arange(length) < len(states)}


class StateFiles:
    """The mapped files of a folder.

    Attributes:
      most: the most tokens of a caption.

    Raises ValueError for files that do not fit each other.
    """

    def __init__(self, states: Iterable[str], counts: Iterable[str]):
        self._states: list[np.ndarray | npy.RemoteRows] = []
        self._ends: list[np.ndarray] = []
        self.most = 0
        for path, of_counts in zip(states, counts, strict=True):
            found, lengths = _mapped(path, np.uint16, 2), np.asarray(_mapped(of_counts, np.int32, 1))
            if lengths.min(initial=0) < 0 or lengths.sum(dtype=np.int64) != len(found):
                raise ValueError(f"{of_counts} counts other tokens than the {len(found)} of {path}")
            if self._states and found.shape[1] != self._states[0].shape[1]:
                raise ValueError(f"{path} has states of width {found.shape[1]}, not {self.width}")
            self._states.append(found)
            self._ends.append(np.cumsum(lengths, dtype=np.int64))
            self.most = max(self.most, int(lengths.max(initial=0)))

    @property
    def width(self) -> int:
        """Entries of a state."""
        return int(self._states[0].shape[1])

    @property
    def rows(self) -> list[int]:
        """The number of records of each file."""
        return [len(ends) for ends in self._ends]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file of states."""
        return [states.nbytes for states in self._states]

    def row(self, file: int, place: int) -> np.ndarray:
        """The states uint16 [tokens, D] of a record. Raises BadRecord for one without."""
        begin, end = self._ends[file][place - 1] if place else 0, self._ends[file][place]
        if begin == end:
            raise BadRecord("no_text_states")
        return np.asarray(self._states[file][begin:end])


def _mapped(path: str, dtype: type, rank: int) -> np.ndarray | npy.RemoteRows:
    """The array of a file, whose rows are read one by one. Raises ValueError for another type or rank."""
    found = npy.open_rows(path)
    if found.dtype != dtype or found.ndim != rank:
        raise ValueError(
            f"{path}: expected {np.dtype(dtype)} of {rank} axes, found {found.dtype} {found.shape}"
        )
    return found

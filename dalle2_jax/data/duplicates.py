"""Near-duplicates among embedded pictures: pairs whose CLIP image embeddings have a high cosine.

    FOLDER/duplicates.tsv   a line a pair, the nearest first: cosine, key, key of the later record, captions
    FOLDER/leave_out.txt    for `data.leave_out`: the key of each record that nearly equals an earlier one,
                            unless that one is left out itself

FOLDER is a split of `dalle2_jax.embed`. The time grows with the square of the number of records.
"""

import contextlib
import os

import numpy as np

from dalle2_jax.data import embeddings, metadata
from dalle2_jax.data.records import BadRecord
from dalle2_jax.data.shards import language_of
from dalle2_jax.runtime import files

_CHUNK = 1024  # rows of a block of cosines
PAIRS, LEAVE_OUT = "duplicates.tsv", "leave_out.txt"


def pairs(embeds: np.ndarray, threshold: float) -> list[tuple[float, int, int]]:
    """(cosine, row, later row) of the pairs of rows [N, E] with a cosine of at least `threshold`, the nearest
    first.

    Rows that are not finite have no pairs.
    """
    usable = np.flatnonzero(np.isfinite(embeds).all(axis=1))
    rows = embeds[usable].astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found = []
    for start in range(0, len(rows), _CHUNK):
        cosines = rows[start : start + _CHUNK] @ rows[start:].T
        near = np.argwhere(np.triu(cosines >= threshold, 1))
        found += [(float(cosines[i, j]), int(usable[start + i]), int(usable[start + j])) for i, j in near]
    return sorted(found, key=lambda pair: (-pair[0], pair[1:]))


def to_leave_out(found: list[tuple[float, int, int]]) -> list[int]:
    """The rows to leave out, ascending: each later row of a pair whose earlier row stays."""
    left: set[int] = set()
    for _, earlier, later in sorted(found, key=lambda pair: pair[1:]):
        if earlier not in left:
            left.add(later)
    return sorted(left)


def write(folder: str | os.PathLike, threshold: float) -> tuple[int, int]:
    """Write the two files of a folder of embeddings: (number of pairs, number of records to leave out).

    Raises ValueError for a folder without image embeddings or without keys.
    """
    folder = os.fspath(folder)
    table = embeddings.Embeddings(folder)
    columns, _ = metadata.read_columns(table.metadata, lambda name: name == "key" or language_of(name))
    keys = columns.pop("key", [])
    if "image_embed" not in table.dims or None in keys or not keys:
        raise ValueError(f"{folder} holds no image embeddings with the keys of their records")
    embeds = np.full((len(table), table.dims["image_embed"]), np.nan, np.float32)
    for row in range(len(table)):
        with contextlib.suppress(BadRecord):
            embeds[row] = table.row(row)["image_embed"]
    found = pairs(embeds, threshold)
    captions = next(iter(columns.values()), [""] * len(keys))

    def line(cosine: float, *both: int) -> str:
        cells = [*(keys[row] or "" for row in both), *(captions[row] or "" for row in both)]
        return "\t".join([f"{cosine:.4f}", *(" ".join(cell.split()) for cell in cells)])

    left = to_leave_out(found)
    texts = {
        PAIRS: ["cosine\tkey\tlater_key\tcaption\tlater_caption", *(line(*pair) for pair in found)],
        LEAVE_OUT: [keys[row] or "" for row in left],
    }
    for name, lines in texts.items():
        with files.atomic_write(os.path.join(folder, name)) as partial:
            partial.write_text("".join(f"{one}\n" for one in lines), "utf-8")
    return len(found), len(left)

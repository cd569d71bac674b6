"""Several sources as one: their records one after another, read in proportion to their weights.

`order` assigns each position to a source. Reasons of lost records are counted for each source.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dalle2_jax.data import records
from dalle2_jax.data.records import BadRecord, Record


class Mixture(records.RecordSource):
    """The records of named sources with weights; a record's key is NAME/KEY, a reason NAME/REASON.

    Raises ValueError if the sources have labels of different classes, or embeddings of different CLIPs.
    """

    def __init__(self, sources: Mapping[str, records.RecordSource], weights: Sequence[float]):
        self.sources = dict(sources)
        counts = [len(source) for source in sources.values()]
        self.mixture = tuple(zip(counts, weights, strict=True))
        self._firsts = np.cumsum([0, *counts])
        for kind in ("refused", "passed", "examples"):
            parts = {name: getattr(source, kind) for name, source in sources.items()}
            merged = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}
            setattr(self, kind, merged)
        self.files = [
            (f"{name}/{path}", size, count)
            for name, source in sources.items()
            for path, size, count in source.files
        ]
        of_each = [(f"{n} {one.fingerprint}", 0, len(one)) for n, one in enumerate(sources.values())]
        self.fingerprint = records.fingerprint(of_each)
        firsts = zip(self._firsts.tolist(), sources.values(), strict=False)
        self.left_out = frozenset(first + number for first, one in firsts for number in one.left_out)
        self.remote = any(source.remote for source in sources.values())
        self.has_images = all(source.has_images for source in sources.values())
        self.embed_dims = self._common("embed_dims", "embeddings of one size, or none")
        self.encoder_sha256 = self._common("encoder_sha256", "embeddings of one encoder")
        self.most_tokens = max(source.most_tokens for source in sources.values())
        self.classes = self._common("classes", "the same classes, or none")
        self.num_classes = max(source.num_classes for source in sources.values())
        if self.num_classes and not all(source.num_classes for source in sources.values()):
            raise ValueError("some sources of data.sources have labels, others have none")

    def _common(self, name: str, what: str):
        found = {key: getattr(source, name) for key, source in self.sources.items()}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"the sources of data.sources must have {what}: {found}")
        return values[0]

    def __len__(self):
        return int(self._firsts[-1])

    def span(self, index: int) -> tuple[int, int]:
        """(first record, number of records) of the source of record `index`."""
        number = self._number(index)
        return int(self._firsts[number]), self.mixture[number][0]

    def _number(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """One record; see `records.RecordSource`."""
        number = self._number(index)
        name = list(self.sources)[number]
        try:
            record = self.sources[name].read(index - int(self._firsts[number]), image, captions)
        except BadRecord as error:
            raise BadRecord(f"{name}/{error.reason}", error.detail) from None
        return dataclasses.replace(record, key=f"{name}/{record.key}", source=name)


def named(paths: Sequence[str]) -> list[str]:
    """The names of sources: the last part of each path, with its number where two are equal."""
    names = [path.rstrip("/").rpartition("/")[2] or path for path in paths]
    counts = collections.Counter(names)
    return [name if counts[name] == 1 else f"{name}#{number}" for number, name in enumerate(names)]

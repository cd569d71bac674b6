"""Records of a source with the rows of an embedding folder: row i belongs to record i.

A folder of `dalle2_jax.embed` names its dataset in embed.json. For a folder of clip-retrieval, the keys and
captions in its metadata are compared with those of the records.
"""

import collections
import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

import numpy as np
from absl import logging

from dalle2_jax.data import embeddings, metadata, records, remote
from dalle2_jax.data.records import BadRecord, Record
from dalle2_jax.data.shards import encodable, language_of

_KEYS = ("key", "image_path")  # columns with the name of a row's record: img2dataset's, clip-retrieval's
_CHECKED_ROWS = 64  # spread over a folder and compared with their records
_AGAIN = "they belong to another dataset, or some records are lost; embed this one again"
_NUMBERED = re.compile(r"(?:row|.*\.tfrecord[^:]*):[0-9]+")  # the key of a record without a name


class Paired(records.RecordSource):
    """Records of a source with the rows of an embedding folder, in the same order.

    With embeddings of captions and their texts, a record's captions are the embedded ones of its row. If the
    metadata name the records, one whose row has another name is bad (`other_record`). Raises ValueError for
    embeddings of other records, by their number, embed.json, or a sample of keys and captions.
    """

    def __init__(self, source, path: str):
        plan, self._source, self._table = embeddings.read_plan(path), source, embeddings.Embeddings(path)
        if len(source) != len(self._table):
            raise ValueError(
                f"{path} holds {len(self._table)} embeddings, the dataset {len(source)} records: {_AGAIN}"
            )
        if plan and plan["fingerprint"] != source.fingerprint:
            raise ValueError(
                f"the embeddings of {path} are of a dataset with fingerprint {plan['fingerprint'][:12]}, "
                f"this one's is {source.fingerprint[:12]}: {_AGAIN}"
            )
        columns, self._fields = metadata.read_columns(
            self._table.metadata, lambda field: field in _KEYS or language_of(field)
        )
        keys = [columns.pop(name) for name in _KEYS if name in columns]
        self._keys = _checked_keys(path, source, keys, columns, foreign=not plan)
        self._captions = columns if {"text_embed", "text_states"} & self._table.dims.keys() else {}
        self.refused, self.passed, self.examples = source.refused, source.passed, source.examples
        self.has_images, self.embed_dims = source.has_images, self._table.dims
        self.remote = source.remote or remote.is_remote(path)
        self.num_classes, self.classes = source.num_classes, source.classes
        self.encoder_sha256, self.most_tokens = embeddings.encoder_sha256(plan), self._table.most_tokens
        beside = [(f"embeddings/{name}", size, count) for name, size, count in self._table.entries]
        self.files = [*source.files, *beside]
        self.fingerprint = records.fingerprint([(source.fingerprint, 0, len(source)), *self._table.entries])

    def __len__(self):
        return len(self._source)

    def keys(self) -> Iterator[str | None]:
        """See `records.RecordSource`."""
        return self._source.keys()

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """A record with the embeddings of its row; see `records.RecordSource`."""
        record = self._source.read(index, image, captions)
        if _same_record(record.key, self._keys, index) is False:
            raise BadRecord(
                "other_record", f"{record.key}: its row of embeddings is of {_named(self._keys, index)!r}"
            )
        texts, fields = record.captions, record.fields
        if captions and self._captions:
            texts, fields = metadata.row_captions(self._captions, index, embedded=True), self._fields
        return dataclasses.replace(record, captions=texts, embeds=self._table.row(index), fields=fields)


def _name(key: str) -> str:
    """The name of a file in a key, without shard, folders and a picture's extension: `0.tar:a/b.jpg` -> b."""
    stem, ending = os.path.splitext(re.split(r"[/\\:]", encodable(key))[-1])
    return stem if ending[1:].lower() in records.IMAGE_EXTENSIONS else stem + ending


def _named(keys: list[list[str | None]], row: int) -> str:
    """The first key of a row, or ''."""
    return next((key for column in keys if (key := column[row])), "")


def _same_record(key: str, keys: list[list[str | None]], row: int) -> bool | None:
    """Whether one of the row's keys is that of the record `key`; None: one of them has no name."""
    named = [name for column in keys if (name := column[row])]
    if key in named:
        return True
    if not named or _NUMBERED.fullmatch(key):
        return None
    return _name(key) in map(_name, named)


def _checked_keys(
    path: str, source, keys: list[list], captions: dict[str, list], foreign: bool
) -> list[list]:
    """Compare some rows with their records: keys, and captions of a `foreign` folder, one without embed.json.

    Returns the columns of keys to compare with each record that is read: those of a foreign folder that
    agree. Raises ValueError for rows of other records; warns if nothing can be compared.
    """
    sampled = _sampled(source, captions=foreign) if keys or (foreign and captions) else {}
    same = {row: _same_record(record.key, keys, row) for row, record in sampled.items()}
    if not foreign and hasattr(source, "former_key"):  # keys in embeddings of older versions
        for row in (row for row, equal in same.items() if equal is False):
            same[row] = _same_record(source.former_key(row), keys, row)
    differing = [row for row, equal in same.items() if equal is False]
    agree = sum(equal is True for equal in same.values())
    at_home, elsewhere = _captions_found(sampled, captions) if foreign and not agree else (0, {})
    # If no key agrees but captions do, the keys are names of another kind.
    if differing and (agree or 2 * at_home <= len(sampled)):
        row = differing[0]
        raise ValueError(
            f"row {row} of {path} is of record {_named(keys, row)!r}, not {sampled[row].key!r}: {_AGAIN}"
        )
    if len(elsewhere) > 1:
        row, other = next(iter(elsewhere.items()))
        raise ValueError(
            f"{path}: the caption of record {row} ({sampled[row].key}) stands in row {other}, and so with "
            f"{len(elsewhere)} of {len(sampled)} records compared: {_AGAIN}"
        )
    if foreign and not agree and not at_home:
        logging.warning(
            "%s: nothing in its metadata tells whether its rows are of these records (no %s, none of their "
            "captions); row i is taken for record i%s",
            path, " or ".join(_KEYS), _example(sampled, captions),
        )  # fmt: skip
    return keys if foreign and agree else []


def _sampled(source, captions: bool) -> dict[int, Record]:
    """{number: record} of some readable records spread over a source."""
    rows, found = np.linspace(0, len(source) - 1, min(_CHECKED_ROWS, len(source))).astype(int), {}
    for row in rows.tolist():
        with contextlib.suppress(BadRecord):
            found[row] = source.read(row, image=False, captions=captions)
    return found


def _captions_found(sampled: dict[int, Record], columns: dict[str, list]) -> tuple[int, dict[int, int]]:
    """(number of records with a caption of their row, {record: the only other row with its caption})."""
    at_home, wanted = 0, collections.defaultdict(list)
    for row, record in sampled.items():
        captions = {text for texts in record.captions.values() for text in texts}
        if captions & {text for texts in metadata.row_captions(columns, row).values() for text in texts}:
            at_home += 1
        else:
            for text in captions:
                wanted[text].append(row)
    places = collections.defaultdict(set)
    for column in columns.values() if wanted else ():
        for place, value in enumerate(column):
            if value and value.strip() in wanted:
                places[value.strip()].add(place)
    return at_home, {
        row: next(iter(places[text]))
        for text, rows in wanted.items()
        for row in rows
        if len(rows) == len(places[text]) == 1
    }


def _example(sampled: dict[int, Record], columns: dict[str, list]) -> str:
    """': row 3 says ..., its record ...' of the first row with captions of both, or ''."""
    for row, record in sampled.items():
        captions = metadata.row_captions(columns, row)
        for language in captions.keys() & record.captions.keys():
            one, other = captions[language][0][:80], record.captions[language][0][:80]
            return f": row {row} says {one!r}, its record {other!r}"
    return ""

"""img2dataset's shards: tar files of KEY.jpg|png|webp, KEY.txt, KEY.json, KEY.cls, or TFRecord files.

KEY ends at the last dot before the extension: `v1.3.png` is the picture of `v1.3`. The name of a caption's
field gives its language: `caption`, `text` and `.txt` are 'en', `caption_xx` is 'xx'.
"""

import codecs
import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from dalle2_jax.data import damage, records, remote, tar
from dalle2_jax.data.examples import Example
from dalle2_jax.data.find import find_files
from dalle2_jax.data.records import BadRecord, Record

_MAX_COUNT = 1 << 48  # samples of a shard in a manifest
_CAPTION_FIELD = re.compile(r"(?:caption|captions|text|txt)(?:_([a-z]{2,3}))?(?:/text|/raw)?")


def language_of(field: str) -> str | None:
    """The language of a caption field by its name; None: no caption field."""
    match = _CAPTION_FIELD.fullmatch(field)
    return (match.group(1) or "en") if match else None


def decode_caption(data: bytes) -> str:
    """The text of a stored caption, without a byte-order mark before it. Raises BadRecord('invalid_utf8')."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise BadRecord("invalid_utf8", "it is UTF-16: save it as UTF-8" if marked else str(error)) from None


def encodable(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, so that UTF-8 can encode it; pairs become their
    character.

    Surrogates come from JSON's escapes (`\\ud83d`), and from file names and command lines in other encodings.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clean_caption(text: str) -> str:
    """The caption `encodable`, without a byte-order mark before it or white space around it."""
    return encodable(text).strip().removeprefix("\ufeff").strip()


def add_caption(captions: dict[str, list[str]], language: str, text: str) -> None:
    """Add a caption, cleaned by `clean_caption`, unless it is blank or a duplicate."""
    text = clean_caption(text)
    if text and text not in captions.setdefault(language, []):
        captions[language].append(text)


def freeze(captions: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """The captions as `Record` holds them."""
    return {language: tuple(texts) for language, texts in captions.items() if texts}


def _expected(path: str) -> int | None:
    """The number of samples in img2dataset's `_stats.json` beside a shard; None: no valid number."""
    stats = os.path.splitext(path)[0] + "_stats.json"
    try:
        if remote.is_remote(path) and not remote.is_listed(stats):
            return None
        with remote.open_file(stats) as file:
            expected = int(json.loads(file.read(records.MAX_TEXT_BYTES))["successes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return expected if 0 <= expected <= _MAX_COUNT else None


def _with_manifest(path: str, index: records.Index, has_end_mark: bool) -> records.Index:
    """The index of a file compared with its `_stats.json`, if any.

    A file without records is damaged, unless it is intact and `_stats.json` counts none. A file with fewer
    records than counted is damaged if its format has no end mark; else the samples were lost earlier.
    """
    expected, count = _expected(path), len(index.rows)
    refused, passed, found = dict(index.refused), dict(index.passed), index.damage
    missing = max(0, (expected or 0) - count)
    if missing and not found and not has_end_mark:
        found = "missing_from_shard"
    if not count and not found and expected != 0:
        found = "no_records"
    if found and found != "missing_from_shard":
        passed[found] = 1
    if missing:
        counts = passed if found else refused
        counts["missing_from_shard"] = missing
    return dataclasses.replace(index, refused=refused, passed=passed, damage=found)


def open_files(
    path: str,
    split: str,
    suffix: str,
    index_file,
    has_end_mark: bool,
    allow_damaged: str | Sequence[str] | None,
) -> tuple[list[str], list[records.Index]]:
    """(files, their indexes). Raises ValueError for damaged files that are not allowed."""
    paths = find_files(path, split, suffix)
    scanned = zip(paths, records.scan(paths, index_file), strict=True)
    indexes = [_with_manifest(file, index, has_end_mark) for file, index in scanned]
    path = os.path.abspath(path)
    damage.check(paths, indexes, path if os.path.isdir(path) else _root(paths), allow_damaged)
    return paths, indexes


def _root(paths: Sequence[str]) -> str:
    """The common folder of these files."""
    if remote.is_remote(paths[0]):
        name = remote.scheme(paths[0])
        return f"{name}://" + os.path.commonpath([os.path.dirname(path[len(name) + 3 :]) for path in paths])
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def _size(path: str) -> int:
    """The size of a file in bytes, 0 where there is none."""
    if remote.is_remote(path):
        return remote.file_size(path)
    return os.path.getsize(path) if os.path.exists(path) else 0


class IndexedSource(records.RecordSource):
    """The base of tar and TFRecord sources: the index rows of all files, and the file of each."""

    def __init__(self, paths: list[str], indexes: list[records.Index]):
        self._files = records.Files(paths)
        self.remote = any(map(remote.is_remote, paths))
        root, counts = _root(paths), [len(index.rows) for index in indexes]
        self._file_of = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        refused: collections.Counter[str] = collections.Counter()
        passed: collections.Counter[str] = collections.Counter()
        examples: dict[str, str] = {}
        self.files, self.refused, self.passed, self.examples = [], refused, passed, examples
        for path, index in zip(paths, indexes, strict=True):
            name = os.path.relpath(os.path.abspath(path), root)
            refused.update(index.refused)
            passed.update(index.passed)
            for reason in {**index.refused, **index.passed}:
                example = f": {index.examples[reason]}" if reason in index.examples else ""
                examples.setdefault(reason, damage.printable(os.fsencode(name)) + example)
            size = _size(path)
            self.files.append((name, size, len(index.rows)))
        _log_losses(root, self, indexes)
        self.fingerprint = records.fingerprint(self.files)
        if not any(counts):
            lost = {reason: f"{n}, such as {self.examples[reason]}" for reason, n in self.refused.items()}
            raise ValueError(f"no usable record in {len(paths)} files under {root}: refused {lost}")
        self._rows = np.concatenate([index.rows for index in indexes if len(index.rows)])
        names = [os.path.basename(path) for path in paths]
        if len(set(names)) < len(names):  # files of one name in several folders
            names = [name for name, _, _ in self.files]
        self._names = [damage.printable(os.fsencode(name)) for name in names]

    def __len__(self):
        return len(self._rows)

    def _key(self, index: int) -> str:
        file = int(self._file_of[index])
        return f"{self._names[file]}:{index - int(self._first[file])}"


def _log_losses(root: str, source: IndexedSource, indexes: Sequence[records.Index]) -> None:
    """Log the allowed damaged files, and a line for each reason of a loss."""
    for (name, _, count), index in zip(source.files, indexes, strict=True):
        if index.damage:
            logging.warning("%s/%s %s; %d records are read", root, name, damage.KINDS[index.damage], count)
    for reason, count in source.refused.items():
        logging.warning("%s: lost %d (%s), such as %s", root, count, reason, source.examples[reason])
    for reason, count in source.passed.items():
        if reason not in damage.KINDS:
            example = source.examples[reason]
            logging.warning("%s: passed over %d (%s), such as %s", root, count, reason, example)


class TarSource(IndexedSource):
    """img2dataset's tar shards: KEY.jpg|png|webp with KEY.txt, KEY.json and WebDataset's KEY.cls, a label.

    verify_sha256: compare the image's bytes with `sha256` in its JSON, the hash of the download. img2dataset
    keeps these bytes only with resize_mode no. caption_field: the field of the JSON with the captions, which
    are then read from no other place; '': KEY.txt and the fields that `language_of` knows.
    """

    def __init__(
        self,
        paths: list[str],
        indexes: list[records.Index],
        verify_sha256: bool = False,
        caption_field: str = "",
    ):
        super().__init__(paths, indexes)
        self._verify_sha256, self._caption_field = verify_sha256, caption_field
        self.num_classes = max(0, int(self._rows[:, 8].max()) + 1)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """One record; see `records.RecordSource`."""
        file, row = int(self._file_of[index]), self._rows[index].tolist()
        wanted = {"key": row[6:8]} | ({"image": row[:2]} if image else {})
        if captions and row[3] >= 0 and not self._caption_field:
            wanted["txt"] = row[2:4]
        if (captions or self._verify_sha256) and row[5] >= 0:
            wanted["json"] = row[4:6]
        for part in wanted.keys() & {"txt", "json"}:
            if wanted[part][1] > records.MAX_TEXT_BYTES:  # parsed JSON takes many times its size
                raise BadRecord("text_too_large", f"{wanted[part][1]} bytes")
        data = dict(zip(wanted, self._files.read_ranges(file, list(wanted.values())), strict=True))
        key, encoded, label = damage.printable(data["key"]), data.get("image"), row[8]
        texts: dict[str, list[str]] = {}
        fields: dict[str, Any] = {}
        if "txt" in data:
            add_caption(texts, "en", decode_caption(data["txt"]))
        if "json" in data:
            fields = _json_fields(data["json"])
            if captions:
                add_fields(texts, fields, self._caption_field)
            expected = fields.get("sha256") if self._verify_sha256 else None
            if expected and encoded is not None and hashlib.sha256(encoded).hexdigest() != expected:
                raise BadRecord("sha256_differs", f"{key}: {expected} in its JSON")
        names = (".txt",) * (row[3] >= 0) + tuple(fields)
        stored = None if label == tar.NO_LABEL else label
        return Record(f"{self._names[file]}:{key}", encoded, freeze(texts), fields=names, label=stored)

    def former_key(self, index: int) -> str:
        """The key in embeddings of older versions, by the first 100 bytes of the name before the image."""
        file = int(self._file_of[index])
        data = self._files.read(file, int(self._rows[index, 0]) - 512, 100)
        name = data.split(b"\0")[0].decode("ascii", "replace").rpartition("/")[2].partition(".")[0]
        return f"{os.path.basename(self._files.paths[file])}:{name}"


def _json_fields(data: bytes) -> dict:
    """The object in a JSON file. Raises BadRecord."""
    try:
        fields = json.loads(decode_caption(data))
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid_json", str(error)) from None
    if not isinstance(fields, dict):
        raise BadRecord("invalid_json", "not an object")
    return fields


def add_fields(captions: dict[str, list[str]], fields: dict, caption_field: str = "") -> None:
    """Add every caption field, a text or a list of texts, to `captions`.

    caption_field: the only field that is read, in English unless its name is that of a caption in another
    language; '': the fields that `language_of` knows.
    """
    if caption_field:
        fields = {caption_field: fields.get(caption_field)}
    for field, value in fields.items():
        language = language_of(field) or ("en" if caption_field else None)
        if language:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    add_caption(captions, language, text)


def open_tar(
    path: str,
    split: str,
    verify_sha256: bool = False,
    allow_damaged: str | Sequence[str] | None = None,
    caption_field: str = "",
) -> TarSource:
    """img2dataset's tar shards; see `find_files` for path and split, `TarSource` for the others.

    allow_damaged: files whose intact part is read; see `damage.check`. Raises ValueError, naming all other
    damaged files.
    """
    opened = open_files(path, split, ".tar", tar.index_tar, True, allow_damaged)
    return TarSource(*opened, verify_sha256, caption_field)


class ExampleSource(IndexedSource):
    """TFRecord files of tf.train.Example protos with an encoded image, captions and a label.

    caption_fields: {field: language}. label_field: '' for none; classes: names of its labels.
    """

    def __init__(
        self,
        paths: list[str],
        indexes: list[records.Index],
        image_field: str,
        caption_fields: dict[str, str],
        label_field: str = "",
        classes: Sequence[str] = (),
    ):
        super().__init__(paths, indexes)
        self._image_field, self._caption_fields = image_field, caption_fields
        self._label_field, self.classes, self.num_classes = label_field, classes, len(classes)

    def example(self, index: int) -> Example:
        """One record. Raises BadRecord."""
        offset, size = self._rows[index].tolist()
        framed = self._files.read(int(self._file_of[index]), offset, size + 4)
        data, checksum = framed[:size], int.from_bytes(framed[size:], "little")
        if records.masked_crc32c(data) != checksum:
            raise BadRecord("checksum_differs", f"the record at byte {offset - 12}")
        return Example(data)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """One record; see `records.RecordSource`."""
        example, encoded = self.example(index), None
        texts: dict[str, list[str]] = {}
        if image:
            values = example.values(self._image_field)
            if not values:
                raise BadRecord("no_image", f"feature {self._image_field!r} is empty")
            encoded = values[0]
        if captions:
            for field, language in self._caption_fields.items():
                for value in example.values(field):
                    add_caption(texts, language, decode_caption(value))
        keys = example.values("key")
        key = keys[0].decode("utf-8", "replace") if keys else self._key(index)
        label = next(iter(example.integers(self._label_field)), None) if self._label_field else None
        return Record(key, encoded, freeze(texts), fields=tuple(sorted(example)), label=label)


def _example_fields(names, path: str) -> tuple[str, dict[str, str]]:
    """(image field, {caption field: language}) of img2dataset's columns. Raises ValueError."""
    image = next((name for name in ("jpg", "png", "webp", "jpeg", "image") if name in names), None)
    if image is None:
        raise ValueError(f"{path}: no image column (jpg, png, webp, image) among {sorted(names)}")
    return image, {name: language for name in sorted(names) if (language := language_of(name))}


def open_tfrecord(path: str, split: str, allow_damaged: str | Sequence[str] | None = None) -> ExampleSource:
    """img2dataset's TFRecord files: key, jpg|png|webp, txt or caption, and other columns; see `open_tar`."""
    paths, indexes = open_files(path, split, ".tfrecord", records.index_tfrecord, False, allow_damaged)
    source = ExampleSource(paths, indexes, "", {})
    for index in range(min(len(source), 16)):
        try:
            names = list(source.example(index))
        except BadRecord:
            continue
        source._image_field, source._caption_fields = _example_fields(names, paths[0])
        return source
    raise ValueError(f"{paths[0]}: the first records are no tf.train.Example protos")

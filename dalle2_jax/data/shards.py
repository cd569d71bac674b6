"""Shards as img2dataset writes them: tar files of KEY.jpg|png|webp, KEY.txt, KEY.json, or TFRecord files.

What a caption's language is follows from the name of its field: `caption`, `text` and `.txt` are 'en',
`caption_zh` is 'zh', `caption_xx` is 'xx'.
"""

import codecs
import collections
import difflib
import glob
import hashlib
import json
import os
import re

import numpy as np
from absl import logging

from dalle2_jax.data import records
from dalle2_jax.data.examples import Example
from dalle2_jax.data.records import BadRecord, Record

_MAX_COUNT = 1 << 48  # of samples that a manifest may say a shard has
_CAPTION_FIELD = re.compile(r"(?:caption|captions|text|txt)(?:_([a-z]{2,3}))?(?:/text|/raw)?")


def did_you_mean(word: str, known) -> str:
    """'; did you mean X?' where one of `known` is near `word`, and then the known ones."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(word, known, n=1)
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" There is: {shown or 'nothing'}"


def find_files(path: str, split: str, suffix: str) -> list[str]:
    """The sorted files of a dataset: `path` is a folder, a file or a glob.

    In a folder, `split` picks FOLDER/SPLIT/*suffix or FOLDER/SPLIT-*suffix; '' takes all files of the folder.

    Raises:
        ValueError: nothing is found; the message names what exists.
    """
    path = os.fspath(path)
    if "://" in path:
        raise ValueError(
            f"{path}: records are read with pread from mounted file systems; mount the bucket (gcsfuse)"
        )
    if not path:
        raise ValueError("data.path is empty: give the folder, or a glob, of the shards")
    if os.path.isfile(path):
        return [path]
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path) if os.path.isfile(file))
        if not found:
            folder = os.path.dirname(path)
            folder = folder if os.path.isdir(folder) else "."
            raise ValueError(
                f"no file matches {path}" + did_you_mean(os.path.basename(path), os.listdir(folder))
            )
        return found
    if not os.path.isdir(path):
        parent = os.path.dirname(os.path.abspath(path))
        listing = os.listdir(parent) if os.path.isdir(parent) else []
        raise ValueError(f"{path} does not exist" + did_you_mean(os.path.basename(path), listing))
    if split and os.path.isdir(os.path.join(path, split)):
        path, split = os.path.join(path, split), ""
    names = sorted(name for name in os.listdir(path) if name.endswith(suffix))
    if not names:
        raise ValueError(f"{path} holds no *{suffix}" + did_you_mean(suffix, os.listdir(path)))
    if split:
        chosen = [name for name in names if re.match(re.escape(split) + r"[-_.]", name)]
        if not chosen:
            prefixes = {re.split(r"[-_.]", name)[0] for name in names}
            raise ValueError(
                f"{path} holds neither {split}-*{suffix} nor {split}/*{suffix} (split '' takes all)"
                + did_you_mean(split, prefixes)
            )
        names = chosen
    return [os.path.join(path, name) for name in names]


def language_of(field: str) -> str | None:
    """The language of a caption field by its name, or None where the name is not a caption's."""
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
    """The text with U+FFFD for each half of a surrogate pair that stands alone, so that UTF-8 can hold it.

    JSON's escapes (`\\ud83d`), file names and command lines in other encodings bring such halves. Two halves
    that make a pair become their character.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clean_caption(text: str) -> str:
    """A caption as it enters: `encodable`, without a byte-order mark before it or white space around it."""
    return encodable(text).strip().removeprefix("\ufeff").strip()


def add_caption(captions: dict[str, list[str]], language: str, text: str) -> None:
    """Add a caption, cleaned by `clean_caption`, that is neither blank nor there already."""
    text = clean_caption(text)
    if text and text not in captions.setdefault(language, []):
        captions[language].append(text)


def freeze(captions: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """The captions as `Record` holds them."""
    return {language: tuple(texts) for language, texts in captions.items() if texts}


def _missing_by_manifest(path: str, count: int) -> int:
    """How many samples the `_stats.json` that img2dataset writes beside a shard counts beyond `count`.

    0 where it counts none, or more than a file can hold.
    """
    stats = os.path.splitext(path)[0] + "_stats.json"
    try:
        with open(stats, encoding="utf-8") as file:
            expected = int(json.loads(file.read(records.MAX_TEXT_BYTES))["successes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0
    return max(0, expected - count) if expected <= _MAX_COUNT else 0


class _Indexed:
    """What tar and TFRecord sources share: the rows of all files, and which file each comes from."""

    has_images, clip_sha256 = True, ""

    def __init__(self, paths: list[str], indexes: list[records.Index]):
        self._files = records.Files(paths)
        self._rows = np.concatenate([index.rows for index in indexes])
        self._file_of = np.repeat(
            np.arange(len(paths), dtype=np.int32), [len(index.rows) for index in indexes]
        )
        self._first = np.concatenate([[0], np.cumsum([len(index.rows) for index in indexes])])
        self.refused, self.embed_dims = collections.Counter(), {}
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        self.files = []
        for path, index in zip(paths, indexes, strict=True):
            self.refused.update(index.refused)
            missing = _missing_by_manifest(path, len(index.rows))
            if missing:
                self.refused["missing_from_shard"] += missing
            for reason, count in index.refused.items():
                logging.warning("%s: %s x %d", path, reason, count)
            if missing:
                logging.warning("%s: %d samples fewer than its _stats.json counts", path, missing)
            self.files.append(
                (os.path.relpath(os.path.abspath(path), root), os.path.getsize(path), len(index.rows))
            )
        self.fingerprint = records.fingerprint(self.files)
        if not len(self._rows):
            raise ValueError(
                f"no usable record in {len(paths)} files under {root}: refused {dict(self.refused)}"
            )

    def __len__(self):
        return len(self._rows)

    def _key(self, index: int) -> str:
        file = int(self._file_of[index])
        return f"{os.path.basename(self._files.paths[file])}:{index - int(self._first[file])}"


class TarSource(_Indexed):
    """img2dataset's tar shards: KEY.jpg|png|webp with KEY.txt and KEY.json.

    verify_sha256: compare the image's bytes with `sha256` in its JSON. img2dataset notes the hash of the
    file that it downloaded, which these bytes only are where it did not encode them again (resize_mode no).
    """

    def __init__(self, paths: list[str], indexes: list[records.Index], verify_sha256: bool = False):
        super().__init__(paths, indexes)
        self._verify_sha256 = verify_sha256

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        file, row = int(self._file_of[index]), self._rows[index].tolist()
        # The 512 bytes before the image are its header, which holds the name.
        offset, size = (row[0] - 512, row[1] + 512) if image else (row[0] - 512, 512)
        data = self._files.read(file, offset, size)
        name = data[:100].split(b"\0")[0].decode("ascii", "replace").rpartition("/")[2].partition(".")[0]
        texts: dict[str, list[str]] = {}
        fields: dict = {}
        if captions and row[3] >= 0:
            add_caption(texts, "en", decode_caption(self._text(file, row[2], row[3])))
        if (captions or self._verify_sha256) and row[5] >= 0:
            fields = _json_fields(self._text(file, row[4], row[5]))
            if captions:
                _add_fields(texts, fields)
            expected = fields.get("sha256") if self._verify_sha256 and image else None
            if expected and hashlib.sha256(data[512:]).hexdigest() != expected:
                raise BadRecord("sha256_differs", f"{name}: {expected} in its JSON")
        key = f"{os.path.basename(self._files.paths[file])}:{name}"
        names = (".txt",) * (row[3] >= 0) + tuple(fields)
        return Record(key, data[512:] if image else None, freeze(texts), fields=names)

    def _text(self, file: int, offset: int, size: int) -> bytes:
        """A .txt or .json. Raises BadRecord for one above MAX_TEXT_BYTES: JSON takes many times its size."""
        if size > records.MAX_TEXT_BYTES:
            raise BadRecord("text_too_large", f"{size} bytes")
        return self._files.read(file, offset, size)


def _json_fields(data: bytes) -> dict:
    """The object in a JSON file. Raises BadRecord."""
    try:
        fields = json.loads(decode_caption(data))
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid_json", str(error)) from None
    if not isinstance(fields, dict):
        raise BadRecord("invalid_json", "not an object")
    return fields


def _add_fields(captions: dict[str, list[str]], fields: dict) -> None:
    """Add every caption field, a text or a list of texts, to `captions`."""
    for field, value in fields.items():
        language = language_of(field)
        if language:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    add_caption(captions, language, text)


def open_tar(path: str, split: str, verify_sha256: bool = False) -> TarSource:
    """Tar shards as img2dataset writes them; see `find_files` for path and split."""
    paths = find_files(path, split, ".tar")
    return TarSource(paths, records.scan(paths, records.index_tar), verify_sha256)


class ExampleSource(_Indexed):
    """TFRecord files of tf.train.Example protos with an encoded image and captions."""

    def __init__(self, paths, indexes, image_field: str, caption_fields: dict[str, str]):
        super().__init__(paths, indexes)
        self._image_field, self._caption_fields = image_field, caption_fields

    def example(self, index: int) -> Example:
        """One record. Raises BadRecord."""
        offset, size = self._rows[index].tolist()
        framed = self._files.read(int(self._file_of[index]), offset, size + 4)
        data, checksum = framed[:size], int.from_bytes(framed[size:], "little")
        if records.masked_crc32c(data) != checksum:
            raise BadRecord("checksum_differs", f"the record at byte {offset - 12}")
        return Example(data)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        example, texts, encoded = self.example(index), {}, None
        if image:
            values = example.values(self._image_field)
            if not values:
                raise BadRecord("no_image", f"feature {self._image_field!r} is empty")
            encoded = values[0]
        if captions:
            for field, language in self._caption_fields.items():
                for value in example.values(field):
                    add_caption(texts, language, decode_caption(value))
        key = example.values("key")
        key = key[0].decode("utf-8", "replace") if key else self._key(index)
        return Record(key, encoded, freeze(texts), fields=tuple(sorted(example)))


def _example_fields(names, path: str) -> tuple[str, dict[str, str]]:
    """(image field, {caption field: language}) of img2dataset's columns. Raises ValueError."""
    image = next((name for name in ("jpg", "png", "webp", "jpeg", "image") if name in names), None)
    if image is None:
        raise ValueError(f"{path}: no image column (jpg, png, webp, image) among {sorted(names)}")
    return image, {name: language_of(name) for name in sorted(names) if language_of(name)}


def open_tfrecord(path: str, split: str) -> ExampleSource:
    """TFRecord files as img2dataset writes them: key, jpg|png|webp, txt or caption, and other columns."""
    paths = find_files(path, split, ".tfrecord")
    indexes = records.scan(paths, records.index_tfrecord)
    source = ExampleSource(paths, indexes, "", {})
    for index in range(min(len(source), 16)):
        try:
            names = list(source.example(index))
        except BadRecord:
            continue
        source._image_field, source._caption_fields = _example_fields(names, paths[0])
        return source
    raise ValueError(f"{paths[0]}: the first records are no tf.train.Example protos")

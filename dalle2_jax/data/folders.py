"""Folders of pictures: by class as ImageNet's, with KEY.txt beside KEY.jpg, or with Hugging Face's metadata.

By class: FOLDER/SPLIT/CLASS/*.png, or FOLDER/CLASS/*.png; the sorted names of the folders are the classes 0,
1, ... With captions: metadata.jsonl or metadata.csv in FOLDER or FOLDER/SPLIT (Hugging Face's imagefolder: a
row has `file_name` and its captions), or KEY.txt beside KEY.jpg there; the folders below are no classes.
KEY.txt beside pictures of classes are their captions; `class_captions` gives the others the names of their
classes. A folder may be one of an object store.
"""

import array
import collections
import csv
import io
import json
import os
import stat
import time
from collections.abc import Iterator

import numpy as np
from absl import logging

from dalle2_jax.data import damage, records, remote, shards
from dalle2_jax.data.find import VALIDATION, did_you_mean, entries, holds, is_folder, split_names
from dalle2_jax.data.records import BadRecord, Record
from dalle2_jax.runtime import files

METADATA = ("metadata.jsonl", "metadata.csv")
_SPLITS = ("train", *VALIDATION, "test")
_Table = dict[str, dict[str, tuple[str, ...]]]  # path of a picture -> its captions by language


class _Tree:
    """The files in a folder and below, on the disk or in an object store, by their paths below it."""

    def __init__(self, root: str):
        self._root = root
        self._sizes = remote.sizes(root) if remote.is_remote(root) else {}
        # first folder of a path ('' for a file of the root) -> folder -> names of its files
        self._below: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
        for path in self._sizes:
            folder, _, name = path.rpartition("/")
            self._below[folder.partition("/")[0]].setdefault(folder, []).append(name)

    def walk(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """(folder, names of its files) of the folder `name` of the root, '' for the root itself, and of those
        in it that are not hidden."""
        if remote.is_remote(self._root):
            for top in [name] if name else self._below:
                for folder, names in self._below[top].items():
                    if not any(part.startswith(".") for part in folder.split("/")):
                        yield folder, names
            return
        begin = len(os.path.join(self._root, ""))
        for place, folders, names in os.walk(os.path.join(self._root, name), onerror=_fail):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            yield place[begin:], names

    def size(self, path: str) -> tuple[int, str]:
        """(size of a file in bytes, why it cannot be used or '')."""
        size, lost = self._sizes.get(path, 0), ""
        if not remote.is_remote(self._root):
            size, lost = _size(os.path.join(self._root, path))
        return size, lost or "member_too_large" * (size > records.MAX_MEMBER_BYTES)

    def read(self, path: str) -> bytes:
        """A file. Raises BadRecord."""
        try:
            if remote.is_remote(self._root):
                return remote.read(os.path.join(self._root, path), 0, self._sizes[path])
            with open(os.path.join(self._root, path), "rb") as file:
                return file.read()
        except (FileNotFoundError, PermissionError) as error:
            key = damage.printable(os.fsencode(path))
            raise BadRecord("unreadable", f"{key}: {error.strerror or error}") from None


class FolderSource(records.RecordSource):
    """The pictures in a folder and below, sorted by path, with their classes or captions; see the module.

    caption_field: the column of the metadata with the captions; '': those that `shards.language_of` knows.
    class_captions: the caption of a picture of a class without KEY.txt is the name of the class, with spaces
    for underscores.

    Raises ValueError if there is no picture. Folders without a picture are no classes, with a warning.
    """

    def __init__(self, root: str, caption_field: str = "", class_captions: bool = False):
        self._root, self._paths, labels = root, [], array.array("i")
        self._tree, self.remote = _Tree(root), remote.is_remote(root)
        self._has_text = bytearray()  # 1: KEY.txt holds the captions of that picture
        files_read, self.files, empty = [], [], []
        self.examples: dict[str, str] = {}
        refused, passed = records.Counts(self.examples), records.Counts(self.examples)
        self._table, self._fields = _read_table(root, caption_field)
        flat = self._table is not None or _holds_captions(root)
        began, logged = time.monotonic(), 10.0
        classes: list[str] = []
        for name in [""] if flat else _folders(root):
            found = sorted(_pictures(self._tree, name, self._table, refused, passed))
            if not found:
                empty.append(name)
                continue
            for path, size, text_size in found:
                files_read += [(path, size, 1)] + [(_text_of(path), text_size, 0)] * (text_size >= 0)
                self._paths.append(path)
                self._has_text.append(text_size >= 0)
            labels.extend([len(classes)] * len(found))
            self.files.append((name or ".", sum(size for _, size, _ in found), len(found)))
            classes.append(damage.printable(os.fsencode(name)))
            if time.monotonic() - began > logged:
                logged = time.monotonic() - began + 10
                logging.info("%s: %d pictures of %d classes so far", root, len(self._paths), len(classes))
        if not classes:
            raise ValueError(_nothing_in(root, refused))
        for path in sorted((self._table or {}).keys() - set(self._paths)):
            refused.note("no_image", os.fsencode(path))
        self._warn(empty, refused, passed)
        self.refused, self.passed = dict(refused), dict(passed)
        self.classes = () if flat else tuple(classes)
        self.num_classes, self._labels = len(self.classes), np.asarray(labels)
        self._class_captions = [name.replace("_", " ") for name in self.classes] if class_captions else []
        files_read += [(name, self._tree.size(name)[0], 0) for name in _metadata_of(root)]
        self.fingerprint = records.fingerprint(files_read)

    def _warn(self, empty: list[str], refused: records.Counts, passed: records.Counts) -> None:
        if empty:
            shown = ", ".join(empty[:10])
            logging.warning("%s: folders without a picture are no classes: %s", self._root, shown)
        for what, counts in (("lost", refused), ("passed over", passed)):
            for reason, count in counts.items():
                example = self.examples[reason]
                logging.warning("%s: %s %d (%s), such as %s", self._root, what, count, reason, example)

    def __len__(self):
        return len(self._paths)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """One record; see `records.RecordSource`."""
        path = self._paths[index]
        encoded = self._tree.read(path) if image else None
        texts: dict[str, tuple[str, ...]] = {}
        if captions and self._table is not None:
            texts = self._table[path]
        elif captions and self._has_text[index]:
            written: dict[str, list[str]] = {}
            shards.add_caption(written, "en", shards.decode_caption(self._tree.read(_text_of(path))))
            texts = shards.freeze(written)
        elif captions and self._class_captions:
            texts = {"en": (self._class_captions[self._labels[index]],)}
        fields = (".txt",) if self._has_text[index] else self._fields
        label = int(self._labels[index]) if self.num_classes else None
        return Record(damage.printable(os.fsencode(path)), encoded, texts, fields=fields, label=label)


def open_folder(path: str, split: str, caption_field: str = "", class_captions: bool = False) -> FolderSource:
    """The pictures in FOLDER/SPLIT, or in FOLDER where it has no folders of splits; see `FolderSource`.

    'validation', 'val' and 'valid' are one split. Raises ValueError for no such folder or split, naming
    existing ones, and for a folder without pictures.
    """
    if not path:
        raise ValueError("data.path is empty: give the folder of the pictures")
    if remote.is_remote(path):
        remote.refresh(path)
    if not is_folder(path):
        above = os.path.dirname(path.rstrip("/") if remote.is_remote(path) else os.path.abspath(path))
        near = holds(os.path.basename(path), above) if is_folder(above) else ""
        raise ValueError(f"{path} is no folder{near}")
    for name in split_names(split) if split else ():
        if _holds_data(folder := os.path.join(path, name)):
            return FolderSource(folder, caption_field, class_captions)
    splits = [name for name in _SPLITS if _holds_data(os.path.join(path, name))]
    if splits:
        flag = "eval_split" if split in VALIDATION else "split"
        there = did_you_mean(split, splits)
        raise ValueError(f"{path} has no split {split!r}{there}; name it by --config.data.{flag}")
    return FolderSource(path, caption_field, class_captions)


def _holds_data(folder: str) -> bool:
    """Whether a folder of a split has folders, metadata, or pictures with captions."""
    return is_folder(folder) and bool(_folders(folder) or _metadata_of(folder) or _holds_captions(folder))


def _folders(folder: str) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones; [] where it does not exist."""
    found = entries(folder) if is_folder(folder) else []
    return sorted(name for name, below in found if below and not name.startswith("."))


def _metadata_of(folder: str) -> list[str]:
    return [name for name in METADATA if remote.is_file(os.path.join(folder, name))]


def _text_of(path: str) -> str:
    """KEY.txt of KEY.jpg."""
    return os.path.splitext(path)[0] + ".txt"


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in records.IMAGE_EXTENSIONS


def _holds_captions(folder: str) -> bool:
    """Whether a picture in a folder itself has a KEY.txt beside it."""
    names = {name for name, _ in entries(folder)}
    return any(_is_picture(name) and _text_of(name) in names for name in names if not name.startswith("."))


def _pictures(
    tree: _Tree, name: str, table: _Table | None, refused: records.Counts, passed: records.Counts
) -> Iterator[tuple[str, int, int]]:
    """Yield (path, size in bytes, size of KEY.txt or -1) of the pictures in the folder `name` of a tree and
    below; with a table, of its pictures."""
    for place, names in tree.walk(name):
        texts = set() if table is not None else {_text_of(file) for file in names if _is_picture(file)}
        texts &= set(names)
        for file in names:
            relative = os.path.join(place, file)
            if file.startswith("."):
                passed.note("hidden_file", os.fsencode(relative))
            elif _is_picture(file):
                size, lost = tree.size(relative)
                if table is not None and relative not in table:
                    passed.note("not_in_metadata", os.fsencode(relative))
                elif lost:
                    refused.note(lost, os.fsencode(relative))
                else:
                    text = tree.size(_text_of(relative))[0] if _text_of(file) in texts else -1
                    yield relative, size, text
            elif file not in texts and relative not in METADATA:
                passed.note("other_extension", os.fsencode(relative))


def _fail(error: OSError) -> None:
    raise error


def _size(path: str) -> tuple[int, str]:
    """(size of a file in bytes, why it cannot be used or '')."""
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing
        return 0, "unreadable"
    if not stat.S_ISREG(found.st_mode):
        return 0, "not_a_regular_file"
    return found.st_size, ""


def _read_table(root: str, caption_field: str) -> tuple[_Table | None, tuple[str, ...]]:
    """({path of a picture: its captions}, the fields) of a folder's metadata; None: it has none.

    Rows of one picture are merged. Raises ValueError, with a remedy, for an unreadable file or row, without
    the field file_name, and for a `caption_field` that is not there.
    """
    names = _metadata_of(root)
    if not names:
        if caption_field:
            raise ValueError(
                f"data.caption_field={caption_field!r} is a field of {METADATA[0]}, and {root} has no such "
                "file: without one, captions are in KEY.txt beside KEY.jpg"
            )
        return None, ()
    path = os.path.join(root, names[0])
    texts: dict[str, dict[str, list[str]]] = {}
    fields: dict[str, None] = {}
    for line, row in (_json_rows if path.endswith("l") else _csv_rows)(path):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{path}: line {line} has no file_name, the path of its picture from this folder; its fields "
                f"are {', '.join(map(str, row)) or 'none'}"
            )
        fields |= dict.fromkeys(row)
        captions = texts.setdefault(os.path.normpath(name), {})
        shards.add_fields(captions, row, caption_field)
    if caption_field and caption_field not in fields:
        raise ValueError(f"{path} has no field {caption_field!r}" + did_you_mean(caption_field, fields))
    return {name: shards.freeze(captions) for name, captions in texts.items()}, tuple(fields)


def _text(path: str) -> str:
    with remote.open_file(path) as file:
        return files.decode_text(file.read(), path)


def _json_rows(path: str) -> Iterator[tuple[int, dict]]:
    """(number of the line, its object) of a file in JSON lines. Raises ValueError."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, dict(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is no object in JSON: {error}") from None


def _csv_rows(path: str) -> Iterator[tuple[int, dict]]:
    """(number of the line, {column: value}) of a table with a line of names. Raises ValueError."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name}
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num + 1} is no row of a CSV: {error}") from None


def _nothing_in(root: str, refused: records.Counts) -> str:
    """Why a folder is refused, and what to do."""
    lost = f" (refused: {dict(refused)})" if refused else ""
    if names := _metadata_of(root):
        return f"{root}/{names[0]} names no picture that is there: file_name is the path from {root}{lost}"
    message = f"{root} holds no picture in the folder of a class, such as {root}/CLASS/1.png{lost}"
    beside = sum(_is_picture(name) for name, _ in entries(root))
    if beside:
        return (
            f"{message}; its {beside} pictures lie in no such folder: move them into one, {root}/all, or "
            f"give them captions: KEY.txt beside KEY.png, or {root}/metadata.jsonl with lines "
            '{"file_name": "1.png", "text": "..."}'
        )
    return message + holds("", root)

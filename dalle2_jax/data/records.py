"""Random-access records: an index of every record's place in its file, and one `pread` to fetch it.

Tar shards (`tar`) and TFRecord files are scanned once, header by header, and sizes and types are checked;
nothing is unpacked. Losses are counted by reason, with an example; a file that ends early is damaged
(`Index`).

A TFRecord is length (8 bytes, little endian), masked crc32c of the length (4), the payload, masked crc32c of
the payload (4), with masked(c) = rotate_right(c, 15) + 0xA282EAD8.
"""

import collections
import dataclasses
import hashlib
import json
import os
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import google_crc32c
import numpy as np
from absl import logging

from dalle2_jax.data import damage, remote
from dalle2_jax.runtime import files

MAX_MEMBER_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20  # of a caption, and of the JSON of a picture or a shard
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_CACHED_FROM = 16  # files; those of an object store always
_NEAR, _NEAR_REMOTE = 4096, 64 << 10  # bytes between ranges that are read at once
_REMOTE_SCANS = 8  # files of an object store that are indexed at once
_INDEX_VERSION = 3  # of the meaning of `Index`


class BadRecord(Exception):
    """An unusable record: `reason` is a short name, for counts; `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Record:
    """One record as stored.

    image: the encoded file; None: not read. captions: by language. embeds: image_embed and text_embed,
    float32 [E]; text_states, the bits of bfloat16 [tokens, D]. fields: the names of its source's fields,
    captions and others. label: the number of its class in its source, -1 for no class; None: no label is
    stored, or an unreadable one. source: its name in a mixture of sources.
    """

    key: str
    image: bytes | None = None
    captions: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    embeds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    label: int | None = None
    source: str = ""


class RecordSource:
    """A dataset's records, by number. The attributes have the values of a source without losses or
    embeddings."""

    files: list[tuple[str, int, int]] = []  # (relative path, size in bytes, number of records) of each
    fingerprint: str = ""  # of the files
    refused: Mapping[str, int] = {}  # {reason: records or members lost while indexing}
    # {reason: files and members left out without loss, or with an allowed loss}
    passed: Mapping[str, int] = {}
    examples: Mapping[str, str] = {}  # {reason: the name of one of them}
    embed_dims: Mapping[str, int] = {}  # {'image_embed': E, ...}, {'text_states': D}
    encoder_sha256: Mapping[str, str] = {}  # {'clip': of its parameters} of the embeddings' encoder, if known
    most_tokens: int = 0  # of a caption with stored text states
    has_images: bool = True
    remote: bool = False  # whether a record is a request to an object store
    num_classes: int = 0  # above every label; 0: no record has a label
    classes: Sequence[str] = ()  # names of the labels 0 ... num_classes - 1, if they are known
    # Of a mixture: its sources by name; (number of records, weight) of each.
    sources: Mapping[str, "RecordSource"] = {}
    mixture: tuple[tuple[int, float], ...] = ()
    left_out: frozenset[int] = frozenset()  # numbers of the records that data.leave_out names

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """Record `index`, with or without its image and captions. Raises BadRecord."""
        raise NotImplementedError

    def keys(self) -> Iterator[str | None]:
        """Yield the key of each record, None for one without a readable key."""
        for index in range(len(self)):
            try:
                yield self.read(index, image=False, captions=False).key
            except BadRecord:
                yield None

    def span(self, index: int) -> tuple[int, int]:
        """(first record, number of records) among which a bad record `index` is replaced."""
        return 0, len(self)


@dataclasses.dataclass(frozen=True)
class Index:
    """The places of the records of one file, and its losses.

    rows: int64 [n, columns]. refused: {reason: number of lost records}. passed: {reason: number of other
    things, such as files of other kinds}. examples: {reason: a name}. damage: one of `damage.KINDS`, '' for
    none.
    """

    rows: np.ndarray
    refused: dict[str, int]
    passed: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    damage: str = ""


class Damaged(Exception):
    """The readable part of a file ends here; `kind` is one of `damage.KINDS`."""

    def __init__(self, kind: str):
        super().__init__(damage.KINDS[kind])
        self.kind = kind


class Counts(collections.Counter):
    """Counts by reason; `examples` has the first name of each, shortened."""

    def __init__(self, examples: dict[str, str]):
        super().__init__()
        self.examples = examples

    def note(self, reason: str, name: bytes) -> None:
        """Add one to the count of a reason."""
        self[reason] += 1
        self.examples.setdefault(reason, damage.printable(name if len(name) <= 100 else name[:100] + b"..."))


def fingerprint(entries: Iterable[tuple[str, int, int]]) -> str:
    """sha256 over the sorted (relative path, size in bytes, number of records) of a dataset's files."""
    digest = hashlib.sha256()
    for path, size, count in sorted(entries):
        digest.update(f"{path}\0{size}\0{count}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class Files:
    """Reads byte ranges of many files from many threads, with at most `limit` idle files open.

    The files of an object store are read by `remote`.
    """

    def __init__(self, paths: list[str], limit: int = 128):
        self.paths, self._limit = paths, limit
        self._lock = threading.Lock()
        # file number -> [descriptor, readers]
        self._open: collections.OrderedDict[int, list[int]] = collections.OrderedDict()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of file number `file`. Raises BadRecord('truncated') past its end."""
        if remote.is_remote(self.paths[file]):
            data = remote.read(self.paths[file], offset, size)
        else:
            data = self._read_local(file, offset, size)
        if len(data) != size:
            raise BadRecord("truncated", f"{self.paths[file]} ends before byte {offset + size}")
        return data

    def read_ranges(self, file: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size); ranges that lie near each other are read at once."""
        near = _NEAR_REMOTE if remote.is_remote(self.paths[file]) else _NEAR
        spans: list[list[int]] = []  # begin, end
        for begin, size in sorted(ranges):
            if spans and begin - spans[-1][1] <= near:
                spans[-1][1] = max(spans[-1][1], begin + size)
            else:
                spans.append([begin, begin + size])
        data = [self.read(file, begin, end - begin) for begin, end in spans]
        found = []
        for begin, size in ranges:
            span = next(n for n, (first, end) in enumerate(spans) if first <= begin and begin + size <= end)
            found.append(data[span][begin - spans[span][0] :][:size])
        return found

    def _read_local(self, file: int, offset: int, size: int) -> bytes:
        with self._lock:
            entry = self._open.get(file)
            if entry is None:
                self._close_idle()
                entry = self._open[file] = [os.open(self.paths[file], os.O_RDONLY), 0]
            entry[1] += 1
            self._open.move_to_end(file)
        try:
            return os.pread(entry[0], size, offset)
        finally:
            with self._lock:
                entry[1] -= 1

    def _close_idle(self):
        if len(self._open) >= self._limit:
            for file, (descriptor, readers) in list(self._open.items()):
                if not readers:
                    os.close(descriptor)
                    del self._open[file]
                    return

    def __del__(self, close=os.close):  # module globals may be gone at the program's end
        for descriptor, _ in getattr(self, "_open", {}).values():
            close(descriptor)


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of `data`; see the module."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def index_tfrecord(path: str) -> Index:
    """Index one TFRecord file: a row (offset, size) for each record.

    A truncated or damaged file keeps the records before the damage. A file that ends between two records
    looks
    intact: compare the count with a manifest.
    """
    rows, offset, found = [], 0, ""
    examples: dict[str, str] = {}
    refused = Counts(examples)
    with remote.open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            found = "empty_file"
        while offset < size and not found:
            file.seek(offset)
            header = file.read(12)
            length, crc = struct.unpack("<QI", header) if len(header) == 12 else (0, None)
            if crc is None:
                found = "truncated_archive"
            elif crc != masked_crc32c(header[:8]):
                found = "damaged_archive"
            elif offset + 16 + length > size:
                found = "truncated_archive"
            elif length > MAX_MEMBER_BYTES:
                refused.note("member_too_large", b"the record at byte %d" % offset)
            else:
                rows.append((offset + 12, length))
            if found and not offset and found != "truncated_archive":
                file.seek(0)
                found = damage.of_beginning(file.read(512), "not_an_archive")
            offset += 16 + length
    return Index(np.asarray(rows, np.int64).reshape(-1, 2), dict(refused), {}, examples, found)


def cache_dir() -> str:
    """The folder of prepared data and indexes: $DALLE2_JAX_CACHE, else the user's cache directory."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dalle2_jax")
    return files.expand(os.environ.get("DALLE2_JAX_CACHE") or default)


def scan(paths: list[str], index_file: Callable[[str], Index]) -> list[Index]:
    """Index files with `index_file`; the indexes of many files, and of any in an object store, are kept in
    the cache directory.

    A file that cannot be opened has an index without rows, with the damage 'unreadable'. Raises
    `remote.Unreachable`.
    """

    def one(path: str) -> Index:
        try:
            cached = len(paths) >= _CACHED_FROM or remote.is_remote(path)
            return _cached_index(path, index_file) if cached else index_file(path)
        except remote.Unreachable:
            raise
        except OSError as error:
            reason = {"unreadable": error.strerror or str(error)}
            return Index(np.zeros((0, 0), np.int64), {}, {}, reason, "unreadable")

    indexes, started, logged = [], time.monotonic(), 0.0
    for number, index in enumerate(remote.mapped(one, paths, _REMOTE_SCANS)):
        indexes.append(index)
        if time.monotonic() - started > logged + 10:
            logged = time.monotonic() - started
            logging.info("indexed %d of %d files, once, in %.0f s", number + 1, len(paths), logged)
    return indexes


def _cached_index(path: str, index_file: Callable[[str], Index]) -> Index:
    if remote.is_remote(path):
        state = [path, *remote.identity(path)]
    else:
        found = os.stat(path)
        state = [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    identity = [_INDEX_VERSION, index_file.__name__, *state]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest() + ".npz"
    cached = os.path.join(cache_dir(), "index", name)
    try:
        with np.load(cached, allow_pickle=False) as stored:
            return Index(stored["rows"], **json.loads(stored["about"].item()))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        pass  # absent, or truncated by a crash
    index = index_file(path)
    about = {name: value for name, value in vars(index).items() if name != "rows"}
    try:
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        with files.atomic_write(cached) as partial, partial.open("wb") as file:
            np.savez(file, rows=index.rows, about=np.array(json.dumps(about)))
    except OSError as error:
        logging.log_first_n(logging.WARNING, "indexes are not cached: %s", 1, error)
    return index

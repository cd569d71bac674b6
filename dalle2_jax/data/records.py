"""Random-access records: an index of where every record lies in its file, and one `pread` to fetch it.

Tar shards and TFRecord files are scanned once, header by header; nothing is unpacked. The scan trusts
nothing: member names, sizes and types are checked. What is refused or passed over is counted by reason, with
an example, and a file that ends early is called damaged (`Index`).

A tar header is 512 bytes: name [0:100], size [124:136], checksum [148:156], type [156], prefix [345:500]
(POSIX.1-1988 ustar, with the pax and GNU long-name extensions). A TFRecord is length (8 bytes, little
endian), masked crc32c of the length (4), the payload, masked crc32c of the payload (4), with masked(c) =
rotate_right(c, 15) + 0xA282EAD8.
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
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import google_crc32c
import numpy as np
from absl import logging

from dalle2_jax.data import damage
from dalle2_jax.runtime import files

MAX_MEMBER_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20  # of a caption, or of the JSON beside a picture or a shard
MAX_MEMBERS = 1_000_000  # of one tar shard; img2dataset writes 30,000
MAX_HEADER_BYTES = 64 << 10  # of a pax or long-name header
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_CACHED_FROM = 16  # files
_INDEX_VERSION = 2  # of what an `Index` means
_END_BYTES = 2 << 20  # behind the end mark; `tar` fills its last block, of 10 KiB or what was asked for
_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"


class BadRecord(Exception):
    """One record that cannot be used; `reason` is a short name to count by, `detail` says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Record:
    """One record as stored; `image` is the encoded file, or None where not asked for."""

    key: str
    image: bytes | None = None
    captions: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # by language
    embeds: dict[str, np.ndarray] = dataclasses.field(
        default_factory=dict
    )  # image_embed, text_embed: float32 [E]
    fields: tuple[str, ...] = ()  # names of what its source says of it, captions or not, where they were read


class RecordSource(Protocol):
    """What the pipeline knows of a dataset."""

    files: list[tuple[str, int, int]]  # (relative path, size in bytes, number of records) of each
    fingerprint: str  # of these
    refused: dict[str, int]  # records or members lost before reading, by reason
    passed: dict[str, int]  # files and members left out that are no loss, or an allowed one, by reason
    examples: dict[str, str]  # the name of one of each reason
    embed_dims: dict[str, int]  # {'image_embed': E, ...}; empty without embeddings
    clip_sha256: str  # of the parameters of the CLIP that made the embeddings; '' where none is named
    has_images: bool

    def __len__(self) -> int: ...

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """Record `index`, with the asked-for parts. Raises BadRecord."""


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the records of one file lie, and what it holds besides.

    rows: int64 [n, columns]. refused: what was lost, by reason. passed: what is no part of a record, such as
    files of other kinds, by reason. examples: a name for each of these reasons. damage: the one of
    `damage.KINDS` that the file has, '' where it is whole.
    """

    rows: np.ndarray
    refused: dict[str, int]
    passed: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    damage: str = ""


class Damaged(Exception):
    """A file ends here; `kind` is one of `damage.KINDS`."""

    def __init__(self, kind: str):
        super().__init__(damage.KINDS[kind])
        self.kind = kind


class _Counts(collections.Counter):
    """Counts by reason, and the first name of each, shortened, in `examples`."""

    def __init__(self, examples: dict[str, str]):
        super().__init__()
        self.examples = examples

    def note(self, reason: str, name: bytes) -> None:
        """Count one of a reason."""
        self[reason] += 1
        self.examples.setdefault(reason, damage.printable(name if len(name) <= 100 else name[:100] + b"..."))


def fingerprint(entries: Iterable[tuple[str, int, int]]) -> str:
    """sha256 over the sorted (relative path, size in bytes, number of records) of a dataset's files."""
    digest = hashlib.sha256()
    for path, size, count in sorted(entries):
        digest.update(f"{path}\0{size}\0{count}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class Files:
    """Reads byte ranges of many files from many threads, keeping at most `limit` idle ones open."""

    def __init__(self, paths: list[str], limit: int = 128):
        self.paths, self._limit = paths, limit
        self._lock = threading.Lock()
        self._open = collections.OrderedDict()  # file number -> [descriptor, readers]

    def read(self, file: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of file number `file`. Raises BadRecord('truncated') past its end."""
        with self._lock:
            entry = self._open.get(file)
            if entry is None:
                self._close_idle()
                entry = self._open[file] = [os.open(self.paths[file], os.O_RDONLY), 0]
            entry[1] += 1
            self._open.move_to_end(file)
        try:
            data = os.pread(entry[0], size, offset)
        finally:
            with self._lock:
                entry[1] -= 1
        if len(data) != size:
            raise BadRecord("truncated", f"{self.paths[file]} ends before byte {offset + size}")
        return data

    def _close_idle(self):
        if len(self._open) >= self._limit:
            for file, (descriptor, readers) in list(self._open.items()):
                if not readers:
                    os.close(descriptor)
                    del self._open[file]
                    return

    def __del__(self, close=os.close):  # the module's names may be gone when the program ends
        for descriptor, _ in getattr(self, "_open", {}).values():
            close(descriptor)


def _number(field: bytes) -> int:
    """A tar header's number: octal text, or base 256 where the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0")[0].strip()
    number = int(text, 8) if text else 0
    if number < 0:
        raise ValueError(f"negative number {text}")
    return number


def _checksum_ok(header: bytes) -> bool:
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * 32  # the checksum field itself counts as spaces


def _pax_fields(data: bytes) -> dict[bytes, tuple[int, bytes]]:
    """{keyword: (where its value begins, value)} of a pax header, whose lines are 'LENGTH keyword=value\\n'.

    Raises ValueError.
    """
    fields, position = {}, 0
    while position < len(data) and data[position : position + 1] != b"\0":
        space = data.index(b" ", position)
        length = int(data[position:space])
        if length <= space - position:
            raise ValueError("pax line too short")
        keyword, _, value = data[space + 1 : position + length - 1].partition(b"=")
        fields[keyword] = space + 1 + len(keyword) + 1, value
        position += length
    return fields


class _Member(NamedTuple):
    """A member of a tar: its full name, where the last part of the name lies, its type, and its data."""

    name: bytes
    base_at: int
    kind: bytes
    start: int
    size: int


def _tar_members(file, size: int):
    """Yield each `_Member` of an open tar. Raises Damaged where it ends early, or is no tar."""
    offset, long_name, pax = 0, None, {}
    for _ in range(MAX_MEMBERS):
        file.seek(offset)
        header = file.read(512)
        if len(header) < 512:  # no end mark: cut, if only on a boundary
            begins_well = offset or header[257:262] == b"ustar"
            raise Damaged(
                "truncated_archive" if begins_well else damage.of_beginning(header, "not_an_archive")
            )
        if not header.strip(b"\0"):
            if _goes_on(file):
                raise Damaged("joined_archives")
            return
        try:
            member_size = int(pax[b"size"][1]) if b"size" in pax else _number(header[124:136])
            damaged = member_size < 0 or not _checksum_ok(header)
        except ValueError:
            damaged = True
        if damaged:
            begins_well = offset or header[257:262] == b"ustar"
            raise Damaged("damaged_archive" if begins_well else damage.of_beginning(header, "not_an_archive"))
        kind, at, start = header[156:157], offset, offset + 512
        if start + member_size > size:
            raise Damaged("truncated_archive")
        offset = start + (member_size + 511) // 512 * 512
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            if member_size > MAX_HEADER_BYTES:
                raise Damaged("header_too_large")
            data = file.read(member_size)
            if kind == _GNU_NAME:
                long_name = start, data.rstrip(b"\0")
            elif kind == _PAX:
                try:
                    pax = {word: (start + place, value) for word, (place, value) in _pax_fields(data).items()}
                except ValueError:
                    raise Damaged("damaged_archive") from None
            continue
        name = header[:100].split(b"\0")[0]
        if header[257:262] == b"ustar" and header[263:265] == b"00":
            prefix = header[345:500].split(b"\0")[0]
            if prefix:  # before the name, but behind it in the header: only the name's own place counts
                at, name = at - len(prefix) - 1, prefix + b"/" + name
        for place, other in (long_name or (0, b""), pax.get(b"path", (0, b""))):
            if other:
                at, name = place, other
        long_name, pax = None, {}
        yield _Member(name, at + name.rfind(b"/") + 1, kind, start, member_size)
    raise Damaged("too_many_members")


def _goes_on(file) -> bool:
    """Whether an archive goes on behind its end mark, where `file` stands, as one of several joined ones."""
    for _ in range(_END_BYTES // 512):
        block = file.read(512)
        if len(block) < 512 or block.strip(b"\0"):
            return len(block) == 512 and _checksum_ok(block)
    return False


def index_tar(path: str) -> Index:
    """Index one tar shard: a row a sample that holds an image.

    A row is (offset, size) of the image, of its .txt, of its .json, and of the key within the image's name;
    size -1 marks an absent part. A sample is the members that share their name up to the last dot, which a
    known extension follows; see `_is_part`.

    Refused: members that are no regular files, unsafe names (nothing is unpacked, but they are printed),
    members above 64 MiB, repeated parts, samples without an image. Passed over: folders without a count,
    hidden files, files of other kinds, and what belongs to the sample of a shorter key. Of an archive that
    is cut or damaged, the samples before the damage are kept.
    """
    examples: dict[str, str] = {}
    refused, passed, samples, found = _Counts(examples), _Counts(examples), {}, ""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            for member in _tar_members(file, size):
                _add_member(member, samples, refused, passed)
        except Damaged as error:
            found = error.kind
    rows = []
    for key, row in samples.items():
        if _is_part(key, row, samples):
            passed.note("part_of_another", key.removeprefix(b"/"))
        elif row[1] < 0:
            refused.note("no_image", key.removeprefix(b"/"))
        else:
            rows.append(row)
    return Index(np.asarray(rows, np.int64).reshape(-1, 8), dict(refused), dict(passed), examples, found)


def _add_member(member: _Member, samples: dict[bytes, list], refused: _Counts, passed: _Counts) -> None:
    """Put a member into its sample's row, or count it."""
    name = member.name
    if member.kind == _DIRECTORY:
        return
    if member.kind not in _REGULAR:
        return refused.note("not_a_regular_file", name)
    if name.startswith(b"/") or b".." in name.split(b"/") or damage.has_control_characters(name):
        return refused.note("unsafe_name", name)
    folder, _, base = name.rpartition(b"/")
    stem, _, extension = base.rpartition(b".")
    extension = extension.lower().decode("ascii", "replace")
    column = 0 if extension in IMAGE_EXTENSIONS else {"txt": 2, "json": 4}.get(extension)
    if base.startswith(b"."):  # such as ._KEY.jpg
        return passed.note("hidden_file", name)
    if column is None or not stem:
        return passed.note("other_extension", name)
    if member.size > MAX_MEMBER_BYTES:
        return refused.note("member_too_large", name)
    row = samples.setdefault(folder + b"/" + stem, [0, -1, 0, -1, 0, -1, 0, 0])
    if row[column + 1] >= 0:
        return refused.note("repeated_member", name)
    row[column : column + 2] = member.start, member.size
    if column == 0:
        row[6:] = member.base_at, len(stem)


def _is_part(key: bytes, row: list, samples: dict[bytes, list]) -> bool:
    """Whether a sample is but a part of that of a shorter key, as KEY.seg.png is of KEY.png.

    So it is where KEY has an image, unless this one has an image and a caption of its own: a .txt, or a .json
    where KEY has no .txt.
    """
    end = key.rfind(b"/") + 1
    while (end := key.find(b".", end + 1)) > 0:
        whole = samples.get(key[:end])
        if whole is not None and whole[1] >= 0:
            return row[1] < 0 or not (row[3] >= 0 or (row[5] >= 0 and whole[3] < 0))
    return False


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of `data`; see the module."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def index_tfrecord(path: str) -> Index:
    """Index one TFRecord file: a row (offset, size) a record.

    A cut or damaged file keeps the records before the damage. A file that was cut exactly between two
    records looks whole: compare the count with a manifest.
    """
    rows, offset, found, examples = [], 0, "", {}
    refused = _Counts(examples)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
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
    """Where prepared data and indexes lie: $DALLE2_JAX_CACHE, else the user's cache directory."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dalle2_jax")
    return files.expand(os.environ.get("DALLE2_JAX_CACHE") or default)


def scan(paths: list[str], index_file: Callable[[str], Index]) -> list[Index]:
    """Index files with `index_file`; where they are many, the indexes are kept in the cache directory.

    A file that cannot be opened has an index without rows, and its damage is 'unreadable'.
    """
    indexes, started, told = [], time.monotonic(), 0.0
    for number, path in enumerate(paths):
        try:
            cached = len(paths) >= _CACHED_FROM
            indexes.append(_cached_index(path, index_file) if cached else index_file(path))
        except OSError as error:
            reason = {"unreadable": error.strerror or str(error)}
            indexes.append(Index(np.zeros((0, 0), np.int64), {}, {}, reason, "unreadable"))
        if time.monotonic() - started > told + 10:
            told = time.monotonic() - started
            logging.info("indexed %d of %d files, once, in %.0f s", number + 1, len(paths), told)
    return indexes


def _cached_index(path: str, index_file: Callable[[str], Index]) -> Index:
    state = os.stat(path)
    identity = [_INDEX_VERSION, index_file.__name__, os.path.abspath(path), state.st_size, state.st_mtime_ns]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest() + ".npz"
    cached = os.path.join(cache_dir(), "index", name)
    try:
        with np.load(cached, allow_pickle=False) as stored:
            return Index(stored["rows"], **json.loads(stored["about"].item()))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        pass  # absent, or cut by a crash: made again
    index = index_file(path)
    about = {name: value for name, value in vars(index).items() if name != "rows"}
    try:
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        with files.whole(cached) as partial, partial.open("wb") as file:
            np.savez(file, rows=index.rows, about=np.array(json.dumps(about)))
    except OSError as error:
        logging.log_first_n(logging.WARNING, "indexes are not cached: %s", 1, error)
    return index

"""Random-access records: an index of where every record lies in its file, and one `pread` to fetch it.

Tar shards and TFRecord files are scanned once, header by header; nothing is unpacked. The scan trusts
nothing: member names, sizes and types are checked, and what is refused is counted by reason
(`Index.refused`).

A tar header is 512 bytes: name [0:100], size [124:136], checksum [148:156], type [156], prefix [345:500]
(POSIX.1-1988 ustar, with the pax and GNU long-name extensions). A TFRecord is length (8 bytes, little
endian), masked crc32c of the length (4), the payload, masked crc32c of the payload (4), with masked(c) =
rotate_right(c, 15) + 0xA282EAD8.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import re
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from absl import logging

from dalle2_jax import files

MAX_MEMBER_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20  # of a caption, or of the JSON beside a picture or a shard
MAX_MEMBERS = 1_000_000  # of one tar shard; img2dataset writes 30,000
MAX_HEADER_BYTES = 64 << 10  # of a pax or long-name header
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_CACHED_FROM = 16  # files
_INDEX_VERSION = 1  # of what `Index.rows` means
_SAFE_NAME = re.compile(r"[0-9A-Za-z_./-]+")
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
    embed_dims: dict[str, int]  # {'image_embed': E, ...}; empty without embeddings
    clip_sha256: str  # of the parameters of the CLIP that made the embeddings; '' where none is named
    has_images: bool

    def __len__(self) -> int: ...

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """Record `index`, with the asked-for parts. Raises BadRecord."""


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the records of one file lie. rows: int64 [n, columns]; refused: what was left out, by reason."""

    rows: np.ndarray
    refused: dict[str, int]


def fingerprint(entries: Iterable[tuple[str, int, int]]) -> str:
    """sha256 over the sorted (relative path, size in bytes, number of records) of a dataset's files."""
    digest = hashlib.sha256()
    for path, size, count in sorted(entries):
        digest.update(f"{path}\0{size}\0{count}\n".encode())
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


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    """{keyword: value} of a pax header, whose lines are 'LENGTH keyword=value\\n'. Raises ValueError."""
    fields, position = {}, 0
    while position < len(data) and data[position : position + 1] != b"\0":
        space = data.index(b" ", position)
        length = int(data[position:space])
        if length <= space - position:
            raise ValueError("pax line too short")
        keyword, _, value = data[space + 1 : position + length - 1].partition(b"=")
        fields[keyword] = value
        position += length
    return fields


def _tar_members(file, size: int, refused: collections.Counter):
    """Yield (name, type, data offset, data size) of each member of an open tar; count damage in `refused`."""
    offset, long_name, pax = 0, None, {}
    for _ in range(MAX_MEMBERS):
        file.seek(offset)
        header = file.read(512)
        if len(header) < 512:
            refused["truncated_archive"] += 1  # no end-of-archive block: cut, if only on a boundary
            return
        if not header.strip(b"\0"):
            return
        try:
            member_size = int(pax[b"size"]) if b"size" in pax else _number(header[124:136])
            damaged = member_size < 0 or not _checksum_ok(header)
        except ValueError:
            damaged = True
        if damaged:
            refused["damaged_archive"] += 1  # nothing says where the next member begins
            return
        kind, start = header[156:157], offset + 512
        if start + member_size > size:
            refused["truncated_archive"] += 1
            return
        offset = start + (member_size + 511) // 512 * 512
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            if member_size > MAX_HEADER_BYTES:
                refused["member_too_large"] += 1
                return
            data = file.read(member_size)
            if kind == _GNU_NAME:
                long_name = data.rstrip(b"\0")
            elif kind == _PAX:
                try:
                    pax = _pax_fields(data)
                except ValueError:
                    refused["damaged_archive"] += 1
                    return
            continue
        prefix = (
            header[345:500].split(b"\0")[0]
            if header[257:262] == b"ustar" and header[263:265] == b"00"
            else b""
        )
        name = header[:100].split(b"\0")[0]
        name = pax.get(b"path") or long_name or (prefix + b"/" + name if prefix else name)
        long_name, pax = None, {}
        yield name, kind, start, member_size
    refused["too_many_members"] += 1


def index_tar(path: str) -> Index:
    """Index one tar shard: a row a sample that holds an image, (offset, size) of its image, .txt and .json.

    A sample is the members that share their name up to the first dot after the last slash; size -1 marks
    an absent part. Refused and counted: members that are no regular files, unsafe names, members above 64
    MiB, repeated parts, samples without an image, and archives that are cut or damaged (the samples before
    the damage are kept).

    Raises:
        ValueError: the file is compressed, so that no member can be read on its own.
    """
    refused, samples = collections.Counter(), {}
    with open(path, "rb") as file:
        if file.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7"):
            raise ValueError(
                f"{path} is compressed; decompress it to a plain .tar (images are compressed already)"
            )
        size = os.fstat(file.fileno()).st_size
        for raw_name, kind, start, member_size in _tar_members(file, size, refused):
            if kind == _DIRECTORY:
                continue
            name = raw_name.decode("ascii", "replace")
            if kind not in _REGULAR:
                refused["not_a_regular_file"] += 1
            elif not _SAFE_NAME.fullmatch(name) or name.startswith("/") or ".." in name.split("/"):
                refused["unsafe_name"] += 1
            elif member_size > MAX_MEMBER_BYTES:
                refused["member_too_large"] += 1
            else:
                folder, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                column = 0 if extension in IMAGE_EXTENSIONS else {"txt": 2, "json": 4}.get(extension)
                if column is None or not stem:  # other files, and hidden ones such as ._KEY.jpg
                    continue
                row = samples.setdefault(f"{folder}/{stem}", [0, -1, 0, -1, 0, -1])
                if row[column + 1] >= 0:
                    refused["repeated_member"] += 1
                else:
                    row[column : column + 2] = start, member_size
    rows = [row for row in samples.values() if row[1] >= 0]
    if len(rows) < len(samples):
        refused["no_image"] += len(samples) - len(rows)
    return Index(np.asarray(rows, np.int64).reshape(-1, 6), dict(refused))


_CRC32C_BLOCK = 256  # bytes that are looked up together
_CRC32C_BLOCKS = 4096  # blocks at a time: what is looked up takes four times their bytes


@functools.cache
def _crc32c_tables() -> tuple[np.ndarray, list[list[int]]]:
    """uint32 [block, 256]: what a byte at a place of a block adds to the checksum at the block's end.

    And of it, as numbers of Python, the last row and the first four.
    """
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = (last >> 1) ^ np.where(last & 1, np.uint32(0x82F63B78), np.uint32(0))
    tables = np.empty((_CRC32C_BLOCK, 256), np.uint32)
    tables[-1] = last
    for place in range(_CRC32C_BLOCK - 2, -1, -1):
        tables[place] = (tables[place + 1] >> 8) ^ last[tables[place + 1] & 0xFF]
    return tables, tables[[-1, 0, 1, 2, 3]].tolist()


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of `data`: 0.2 ms for 50 kB.

    A checksum is linear: a block's is the exclusive or of what each of its bytes adds, and the checksum
    before it acts as four more bytes at its beginning.
    """
    tables, (last, *first) = _crc32c_tables()
    crc, head = 0xFFFFFFFF, len(data) % _CRC32C_BLOCK
    for byte in data[:head]:
        crc = (crc >> 8) ^ last[(crc ^ byte) & 0xFF]
    if len(data) > head:
        blocks = np.frombuffer(data, np.uint8, offset=head).reshape(-1, _CRC32C_BLOCK)
        for start in range(0, len(blocks), _CRC32C_BLOCKS):
            looked_up = tables[np.arange(_CRC32C_BLOCK), blocks[start : start + _CRC32C_BLOCKS]]
            for added in np.bitwise_xor.reduce(looked_up, axis=1).tolist():
                for place, table in enumerate(first):
                    added ^= table[crc >> 8 * place & 0xFF]
                crc = added
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def index_tfrecord(path: str) -> Index:
    """Index one TFRecord file: a row (offset, size) a record.

    A cut or damaged file keeps the records before the damage. A file that was cut exactly between two
    records looks whole: compare the count with a manifest.
    """
    rows, refused, offset = [], collections.Counter(), 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while offset < size:
            file.seek(offset)
            header = file.read(12)
            if len(header) < 12:
                refused["truncated_archive"] += 1
                break
            length, crc = struct.unpack("<QI", header)
            if crc != masked_crc32c(header[:8]):
                refused["damaged_archive"] += 1
                break
            if offset + 16 + length > size:
                refused["truncated_archive"] += 1
                break
            if length > MAX_MEMBER_BYTES:
                refused["member_too_large"] += 1
            else:
                rows.append((offset + 12, length))
            offset += 16 + length
    return Index(np.asarray(rows, np.int64).reshape(-1, 2), dict(refused))


def cache_dir() -> str:
    """Where prepared data and indexes lie: $DALLE2_JAX_CACHE, else the user's cache directory."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dalle2_jax")
    return files.expand(os.environ.get("DALLE2_JAX_CACHE") or default)


def scan(paths: list[str], index_file: Callable[[str], Index]) -> list[Index]:
    """Index files with `index_file`; where they are many, the indexes are kept in the cache directory."""
    if len(paths) < _CACHED_FROM:
        return [index_file(path) for path in paths]
    indexes, started, told = [], time.monotonic(), 0.0
    for number, path in enumerate(paths):
        indexes.append(_cached_index(path, index_file))
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
            return Index(stored["rows"], json.loads(stored["refused"].item()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent, or cut by a crash: made again
    index = index_file(path)
    try:
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        with files.whole(cached) as partial, partial.open("wb") as file:
            np.savez(file, rows=index.rows, refused=np.array(json.dumps(index.refused)))
    except OSError as error:
        logging.log_first_n(logging.WARNING, "indexes are not cached: %s", 1, error)
    return index

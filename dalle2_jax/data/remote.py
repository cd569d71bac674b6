"""Files of object stores, by address: gs://, s3:// and hf://datasets/, read in ranges through fsspec.

A range that fails or comes back short, as when a connection is cut, is asked for again, `RETRIES` times with
growing pauses; then `Unreachable` stops the run, which resumes at the same record. Losing the network loses
no record: the order of examples stays what it was.
"""

import functools
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

from absl import logging

from dalle2_jax.runtime import extras

BLOCK_BYTES = 8 << 20  # of one request where a file is read from its beginning to its end
RETRIES, FIRST_PAUSE, LONGEST_PAUSE = 8, 0.2, 30.0  # seconds; about a minute in all
THREADS = 16  # requests of a chunk of records at once
# The package with the file system of an address.
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, TypeError)


class Unreachable(OSError):
    """A file of an object store cannot be read, after all retries."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of an object store."""
    return "://" in os.fspath(path)


def scheme(path: str) -> str:
    """'gs' of gs://bucket/key."""
    return path.partition("://")[0]


@functools.lru_cache(16)
def _file_system(name: str):
    """The fsspec file system of a scheme. Raises ValueError, with a remedy."""
    if name not in PACKAGES:
        raise ValueError(f"{name}:// is unknown: there are {', '.join(f'{one}://' for one in PACKAGES)}")
    extras.check(f"{name}://", PACKAGES[name])
    import fsspec

    return fsspec.filesystem(name)


def _retried(path: str, what: str, call) -> Any:
    """`call()` again after each failure that may pass; see the module. Raises Unreachable, or OSError."""
    pause = FIRST_PAUSE
    for tries in range(RETRIES + 1):
        try:
            return call()
        except _PERMANENT:
            raise
        except Exception as error:  # each library has errors of its own for a lost connection
            if "Credential" in type(error).__name__:
                raise ValueError(f"{path}: {error}; for a public bucket set FSSPEC_S3_ANON=true") from None
            if tries == RETRIES:
                raise Unreachable(
                    f"{path}: {what} failed {RETRIES + 1} times, the last time with {type(error).__name__}: "
                    f"{error}. Start the same command again once the store answers: a run resumes"
                ) from error
            logging.log_every_n_seconds(
                logging.WARNING, "%s: %s failed (%s: %s); trying again", 10,
                path, what, type(error).__name__, error,
            )  # fmt: skip
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def read(path: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file, or those up to its end. One request."""
    if not size:
        return b""

    def call() -> bytes:
        # hf reads whole blocks ahead unless its cache is 'none'
        options = {"cache_type": "none"} if scheme(path) == "hf" else {}
        data = _file_system(scheme(path)).cat_file(path, start=offset, end=offset + size, **options)
        if len(data) < size and offset + len(data) < file_size(path):
            raise ConnectionError(f"{len(data)} of {size} bytes came")
        return data

    return _retried(path, f"reading {size} bytes at {offset}", call)


def _info(path: str) -> dict:
    return _retried(path, "asking for its size", lambda: _file_system(scheme(path)).info(path))


def file_size(path: str) -> int:
    """The size of a file in bytes."""
    return int(_info(path)["size"])


def identity(path: str) -> list:
    """What changes with a file's content: its size, and the store's checksum or time."""
    info = _info(path)
    marks = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "lfs", "LastModified", "mtime", "updated")
    return [int(info["size"]), str(next((info[mark] for mark in marks if info.get(mark)), ""))]


def refresh(path: str) -> None:
    """Forget the listings of a store, so that new files are seen."""
    _file_system(scheme(path)).invalidate_cache()


def entries(folder: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies in a folder; [] where nothing does."""
    system = _file_system(scheme(folder))
    try:
        found = _retried(folder, "listing", lambda: system.ls(folder, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = ((info["name"].rstrip("/").rpartition("/")[2], info["type"] == "directory") for info in found)
    return [(name, is_folder) for name, is_folder in named if name]


def sizes(folder: str) -> dict[str, int]:
    """{path below a folder: size in bytes} of all files in and below it, by one listing."""
    system, begin = _file_system(scheme(folder)), len(_key(folder)) + 1
    found = _retried(folder, "listing", lambda: system.find(folder, detail=True))
    named = {path[begin:]: int(info["size"]) for path, info in found.items() if info["type"] == "file"}
    return {name: size for name, size in named.items() if name and not name.endswith("/")}


def _key(path: str) -> str:
    """bucket/key of gs://bucket/key, without a slash at its end."""
    return path.partition("://")[2].rstrip("/")


def is_listed(path: str) -> bool:
    """Whether the listing of a file's folder, which is kept, has it."""
    folder, _, name = path.rpartition("/")
    return (name, False) in entries(folder)


def mapped(call: Callable[[str], Any], paths: Sequence[str], threads: int) -> Iterator[Any]:
    """`call(path)` of each path in their order; of addresses by several threads."""
    if not any(map(is_remote, paths)):
        yield from map(call, paths)
        return
    with futures.ThreadPoolExecutor(threads) as pool:
        yield from pool.map(call, paths)


def is_file(path: str) -> bool:
    """Whether there is such a file, on the disk or in an object store."""
    if not is_remote(path):
        return os.path.isfile(path)
    return _retried(path, "looking for it", lambda: _file_system(scheme(path)).isfile(path))


def matches(pattern: str) -> list[str]:
    """The addresses of the files that match a pattern of fsspec: *, ?, [...], **."""
    system = _file_system(scheme(pattern))
    found = _retried(pattern, "listing", lambda: system.glob(pattern))
    return [f"{scheme(pattern)}://{name}" for name in found]


class RemoteFile(io.RawIOBase):
    """A file of an object store, open for reading; one block at a time is in memory.

    `readline` is slow: wrap it in an `io.BufferedReader` for lines.

    block: bytes of a request, at least; 0: exactly those that are read.
    """

    def __init__(self, path: str, block: int = BLOCK_BYTES):
        super().__init__()
        self.path, self.size = path, file_size(path)
        self._block, self._at, self._begin, self._data = block, 0, 0, b""

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; see `io.IOBase`."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        """Fills a buffer; returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all to the end for -1."""
        left = max(0, self.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        found = self._data[max(0, self._at - self._begin) : self._at - self._begin + size]
        if self._at < self._begin or len(found) < size:
            begin = self._at
            self._data = read(self.path, begin, min(max(size, self._block), left))
            self._begin, found = begin, self._data[:size]
        self._at += len(found)
        return found


def open_file(path: str):
    """A file, local or in an object store, for reading from its beginning to its end."""
    return RemoteFile(path) if is_remote(path) else open(path, "rb")

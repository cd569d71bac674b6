"""Paths and texts written by users, atomic writes, and files that a failed download has damaged."""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

AnyPath = Any  # str, pathlib.Path or epath.Path, which has no types


def expand(path: str | os.PathLike) -> str:
    """The path with ~ or ~USER at its beginning replaced by that home folder.

    Shells do not expand `--workdir=~/run`. Addresses (gs://, hf://), '' and expanded paths are unchanged.
    Call it once, where a flag, a setting or an argument of the library becomes a path.
    """
    return os.path.expanduser(os.fspath(path))


def sha256(path: AnyPath) -> str:
    """The checksum of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: AnyPath) -> Iterator[epath.Path]:
    """Yields a temporary path that is renamed to `path` at the end of the `with`, or removed after an error.

    Its name is random, so processes on several machines may write the same file: the last one wins.
    """
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


# Byte-order marks. That of UTF-32 begins with that of UTF-16, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes, name: str | os.PathLike) -> str:
    """Decodes a file called `name` by its byte-order mark (which is removed), as UTF-8 without one.

    Raises ValueError with the name and the line for another encoding.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        shown = data[error.start : error.start + 1].hex()
        raise ValueError(
            f"{os.fspath(name)}: line {line} holds the byte 0x{shown}, which is not "
            f"{encoding.removesuffix('-sig').upper()}: save the file as UTF-8"
        ) from None
    if "\0" in text:  # UTF-16 without its mark, or a binary file
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{os.fspath(name)}: line {line} holds a zero byte, which is no text: save the file as UTF-8"
        )
    return text


def read_text(path: str | os.PathLike) -> str:
    """The text of a file by `decode_text`, with its line ends."""
    return decode_text(epath.Path(path).read_bytes(), path)


def not_arrived(head: bytes) -> str:
    """'empty', 'git_lfs_pointer' or 'web_page' for what a failed download leaves, else ''.

    head: the first 1024 bytes of the file.
    """
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "git_lfs_pointer"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    pages = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<error", b"<?xml")
    return "web_page" if text.startswith(pages) and b"<svg" not in text else ""


def damage(path: str | os.PathLike) -> str:
    """The damage of a local file of weights, from its first bytes and its size; '' if none is found.

    Returns the end of a sentence that begins with the file's name, such as 'is empty: ...'.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(1024)
        found = not_arrived(head)
        if found == "empty":
            return "is empty (0 bytes): download or copy it again"
        if found == "git_lfs_pointer":
            promised = re.search(rb"^size (\d+)$", head, re.MULTILINE)
            there = f", of {int(promised[1]):,} bytes" if promised else ""
            return f"is a git-lfs pointer and not the file itself{there}: run `git lfs pull` in its folder"
        if found == "web_page":
            return (
                "is a web page and not a file of weights: the address shows a page or asks for a login; "
                "download the file itself"
            )
        whole = _safetensors_size(head, size, file)
    if whole > size:
        return (
            f"is not a whole safetensors file: it is truncated, {size:,} bytes are there of at least "
            f"{whole:,}: download or copy it again"
        )
    return ""


def _safetensors_size(head: bytes, size: int, file) -> int:
    """The least size in bytes of a safetensors file by its header; 0 for another format."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or length > 100 << 20:  # the library's limit
        return 0
    if 8 + length > size:
        return 8 + length
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return 0  # the library reports the error


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder with its contents to the new folder `target`."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name)


def renames_folders(directory: epath.Path) -> bool:
    """Whether the file system can rename a folder with files; buckets, and gcsfuse by default, cannot."""
    if "://" in os.fspath(directory):
        return False
    probe = directory.parent / f".probe_{secrets.token_hex(4)}"
    target = probe.with_name(probe.name + "_renamed")
    try:
        probe.mkdir()
        (probe / "file").write_text("")
        os.rename(probe, target)
        return True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return True  # another problem, which the first write reports
        logging.info("%s cannot rename folders: checkpoints are committed by a file", directory)
        return False
    finally:
        for left in (probe, target):
            shutil.rmtree(left, ignore_errors=True)

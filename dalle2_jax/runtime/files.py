"""Paths and texts as people write them; files that others find whole or not at all, or that came damaged."""

import codecs
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator

from absl import logging
from etils import epath


def expand(path: str | os.PathLike) -> str:
    """A path as the system takes it: ~ and ~USER at its beginning become that home folder.

    No shell does this in `--workdir=~/run`, nor anything in a config. Addresses (gs://, hf://) and '' stay as
    they are, and what is expanded already. It is called where a flag, a setting or an argument of the
    library becomes a path, and nowhere behind that.
    """
    return os.path.expanduser(os.fspath(path))


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[epath.Path]:
    """Where to write what becomes `path` at the end of the `with`; after an error there is nothing of it.

    The place, beside `path`, is one writer's alone: processes on different machines, which may have the same
    number, can write the same file, and the last one's stays.
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


# Their first bytes say so; UTF-32's begin with UTF-16's, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes, name: str | os.PathLike) -> str:
    """The text of the bytes of a file called `name`: UTF-8, or what its byte-order mark says.

    The mark is no part of the text. Raises ValueError with the name and the line for another encoding.
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
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{os.fspath(name)}: line {line} holds a zero byte, which is no text: save the file as UTF-8"
        )
    return text


def read_text(path: str | os.PathLike) -> str:
    """The text of a file that a person wrote, see `decode_text`; its line ends stay as they are."""
    return decode_text(epath.Path(path).read_bytes(), path)


def not_arrived(head: bytes) -> str:
    """What lies in the place of a file that a download did not bring, by its first bytes, at best 1024.

    'empty', 'git_lfs_pointer', 'web_page', or '' for anything else.
    """
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "git_lfs_pointer"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    pages = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<error", b"<?xml")
    return "web_page" if text.startswith(pages) and b"<svg" not in text else ""


def damage(path: str | os.PathLike) -> str:
    """What is wrong with a local file of weights that can be told from its first bytes and its size.

    Returns the end of a sentence that begins with the file's name, such as 'is empty: ...', or '' for a file
    that may be whole.
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
    """The bytes that a file of safetensors has by its header, or at least has; 0 for another file."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or length > 100 << 20:  # the most that the library reads
        return 0
    if 8 + length > size:
        return 8 + length
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return 0  # the library says what is wrong with it


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder and all that it holds; `target` is made."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name)


def renames_folders(directory: epath.Path) -> bool:
    """Whether a folder that is not empty can be renamed there; buckets, and gcsfuse by default, cannot."""
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
            return True  # that is another matter, and will be told by who writes
        logging.info("%s cannot rename folders: checkpoints are committed by a file", directory)
        return False
    finally:
        for left in (probe, target):
            shutil.rmtree(left, ignore_errors=True)

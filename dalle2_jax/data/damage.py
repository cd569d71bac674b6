"""Damaged files of a dataset, which end early or have no record, and one error that names them all."""

import collections
import os
import re
from collections.abc import Sequence

from dalle2_jax.runtime import files

KINDS = {
    "empty_file": "is empty (0 bytes)",
    "git_lfs_pointer": "is a git-lfs pointer, not the file itself: run `git lfs pull`",
    "web_page": "is a web page or XML: its download failed",
    "compressed_archive": "is compressed: decompress it (the pictures in it are compressed already)",
    "not_an_archive": "is no tar archive, TFRecord or parquet file (a pattern must name such files alone)",
    "truncated_archive": "is cut: it ends early",
    "damaged_archive": "has a damaged header, and nothing says where the next record begins",
    "joined_archives": "goes on behind its end mark: join archives with `tar --concatenate`, not with `cat`",
    "header_too_large": "has a header that is larger than any name",
    "too_many_members": "has more members than any shard has",
    "missing_from_shard": "holds fewer records than its _stats.json counts: it is cut, or _stats.json is old",
    "no_records": "holds no record",
    "unreadable": "cannot be read",
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_SHOWN = 20  # damaged files with their details; the setting names all of them
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def printable(name: bytes) -> str:
    """A name with control characters and bytes outside UTF-8 as \\xNN."""
    text = name.decode("utf-8", "backslashreplace")
    return _UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def has_control_characters(name: bytes) -> bool:
    """Whether a name has control characters or line separators."""
    return bool(_UNPRINTABLE.search(name.decode("utf-8", "surrogateescape")))


def of_beginning(head: bytes, otherwise: str) -> str:
    """The kind of damage of a file of a wrong format, by its first 512 bytes."""
    if head.startswith(_COMPRESSED):
        return "compressed_archive"
    found = files.not_arrived(head)
    return "empty_file" if found == "empty" else found or otherwise


def _detail(index) -> str:
    """The system's error of a damaged file, or the reasons of one without records."""
    if index.damage == "unreadable":
        return f" ({index.examples['unreadable']})"
    if index.damage != "no_records" or not index.refused | index.passed:
        return ""
    counted = {reason: n for reason, n in (index.refused | index.passed).items() if reason not in KINDS}
    shown = ", ".join(f"{reason} x {n}, such as {index.examples[reason]!r}" for reason, n in counted.items())
    return f" ({shown})" if shown else ""


def _names(path: str) -> list[str]:
    """The names of a file: the last part of its path, the last two, ..., the whole path."""
    parts = os.path.abspath(path).split(os.sep)
    return [os.sep.join(parts[first:]) for first in range(len(parts) - 1, -1, -1)]


def _short_names(paths: Sequence[str], root: str) -> list[str]:
    """The shortest unique name of each file, at least its path from `root`."""
    counts = collections.Counter(name for path in paths for name in _names(path))
    shortest = [len(os.path.relpath(os.path.abspath(path), root)) for path in paths]
    return [
        next((name for name in _names(path) if counts[name] == 1 and len(name) >= least), _names(path)[-1])
        for path, least in zip(paths, shortest, strict=True)
    ]


def is_named(path: str, setting: str | Sequence[str]) -> bool:
    """Whether `data.allow_damaged` names a file, by its name, its path, or the end of its path."""
    listed = setting if isinstance(setting, str) else ",".join(setting)

    def plain(text: str) -> str:
        return re.sub(r",\s+", ",", text.strip())

    # Searched between commas, because a name may contain commas.
    return any(f",{plain(name)}," in f",{plain(listed)}," for name in (*_names(path), path))


def check(paths: Sequence[str], indexes, root: str, allow_damaged: str | Sequence[str] | None) -> None:
    """Raise ValueError, naming every damaged file that is not in `allow_damaged`.

    Args:
        paths, indexes: the files and their `records.Index`.
        root: the folder of the data, at which the names in the message begin.
        allow_damaged: names separated by commas, or a sequence of names; None: no such setting.
    """
    damaged = [
        number
        for number, index in enumerate(indexes)
        if index.damage and not (allow_damaged and is_named(paths[number], allow_damaged))
    ]
    if not damaged:
        return
    names = _short_names(paths, root)
    lines = [
        f"  {printable(os.fsencode(names[number]))} {KINDS[index.damage]}{_detail(index)}; "
        f"{len(index.rows)} records can be read"
        for number, index in ((number, indexes[number]) for number in damaged[:_SHOWN])
    ]
    if len(damaged) > _SHOWN:
        lines.append(f"  and {len(damaged) - _SHOWN} more")
    way = "Mend them, or move them away"
    if allow_damaged is not None:
        before = [allow_damaged] if isinstance(allow_damaged, str) else allow_damaged
        listed = ",".join([*(name for name in before if name), *(names[number] for number in damaged)])
        way = f"Mend them, or train on what they hold with --config.data.allow_damaged={_quoted(listed)}"
    raise ValueError(
        f"{len(damaged)} of the {len(paths)} files under {root} are damaged, so that a part of the data is "
        "missing:\n" + "\n".join(lines) + f"\n{way}"
    )


def _quoted(text: str) -> str:
    """The text as one word of a shell."""
    return text if re.fullmatch(r"[\w./,:+@%=-]*", text) else "'" + text.replace("'", "'\\''") + "'"

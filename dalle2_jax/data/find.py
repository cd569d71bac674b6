"""The files of a dataset's path: a file, a folder (with a split), or a pattern.

A pattern has a shell's `*`, `?` and `[...]`, `**` for any number of folders, and braces: `{00000..00012}`
counts, `{a,b}` lists. Existing names are literal, also within a pattern, so a folder may be called `set
[v2]`. All names that braces produce must exist.
"""

import collections
import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from absl import logging

from dalle2_jax.data import remote
from dalle2_jax.runtime.names import nearest

MAX_FILES = 1_000_000  # of braces
VALIDATION = ("validation", "val", "valid")  # names of one split
_ENDINGS = {"tar": ".tar", "parquet": ".parquet", "tfrecord": ".tfrecord"}  # of the files of a source
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_ENTRIES = 100_000  # of folders searched for deeper files
_INNER_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


def did_you_mean(
    word: str,
    choices: Iterable[str],
    most: int = 1,
    there_is: str = "There is",
    listed: Sequence[str] | None = None,
) -> str:
    """'; did you mean X? There is: X, Y': up to `most` choices near `word`, then `listed` (None: the
    choices)."""
    choices = sorted(map(str, choices))
    near, listed = nearest(word, choices, most), choices if listed is None else listed
    shown = ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "")
    return (f"; did you mean {near}?" if near else ";") + f" {there_is}: {shown or 'nothing'}"


def split_names(split: str) -> tuple[str, ...]:
    """The names of a split in the order of search: 'validation', 'val' and 'valid' are one."""
    return tuple(dict.fromkeys([split, *VALIDATION])) if split in VALIDATION else (split,)


def find_files(path: str, split: str, suffix: str) -> list[str]:
    """The sorted files of a dataset: `path` is a folder, a file or a pattern; see the module.

    In a folder, `split` picks FOLDER/SPLIT/*suffix or FOLDER/SPLIT-*suffix; '' takes the folder's files.
    'validation', 'val' and 'valid' are one split. Deeper files, and others that look like parts of the data,
    are not read, with a warning.

    Raises:
        ValueError: no file is found, or not all names of braces; the message lists existing names.
    """
    path = os.fspath(path)
    if remote.is_remote(path):
        return _find_remote(path, split, suffix)
    if not path:
        raise ValueError("data.path is empty: give the folder, or a pattern, of the shards")
    if os.path.isdir(path):
        return _in_folder(path, split, suffix)
    if os.path.lexists(path):
        return [path]
    head, rest = _existing(path)
    patterns = list(itertools.islice(_expanded(rest), MAX_FILES + 1))
    if len(patterns) > MAX_FILES:
        raise ValueError(f"{path} names more than {MAX_FILES} files")
    if patterns == [rest] and not glob.has_magic(rest):
        raise ValueError(f"{path} does not exist" + holds(rest.split("/")[0], head))
    found, missing, folders = set(), [], []
    for pattern in dict.fromkeys(patterns):
        matches = list(_matches(head, pattern.split("/")))
        files = [match for match in matches if not os.path.isdir(match)]
        if not files and matches and not glob.has_magic(pattern):  # a folder
            files = _in_folder(matches[0], split, suffix)
        found.update(files)
        folders += [] if files else matches
        if not files:
            missing.append(pattern)
    if missing and len(patterns) > 1:
        raise ValueError(
            f"{len(missing)} of the {len(patterns)} names that {path} stands for are not there: "
            + ", ".join(missing[:10])
            + (", ..." if len(missing) > 10 else "")
        )
    if not found:
        only = f"; it matches {len(folders)} folders: add /*{suffix} for their files" if folders else ""
        raise ValueError(f"no file matches {path}" + (only or holds("", head)))
    return sorted(found)


def _find_remote(path: str, split: str, suffix: str) -> list[str]:
    """The sorted files of an address; see `find_files`."""
    remote.refresh(path)
    patterns = list(itertools.islice(_expanded(path), MAX_FILES + 1))
    if len(patterns) > MAX_FILES:
        raise ValueError(f"{path} names more than {MAX_FILES} files")
    if patterns == [path] and not glob.has_magic(path):
        return [path] if remote.is_file(path) else _in_folder(path.rstrip("/"), split, suffix)
    found, missing = set(), []
    listed: dict[str, set[tuple[str, bool]]] = {}
    for pattern in dict.fromkeys(patterns):
        folder, _, name = pattern.rpartition("/")
        if glob.has_magic(pattern):
            matches = remote.matches(pattern)
        else:
            listed.setdefault(folder, set(remote.entries(folder)))
            matches = [pattern] if (name, False) in listed[folder] else []
        found.update(matches)
        missing += [] if matches else [pattern]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(patterns)} names that {path} stands for are not there: "
            + ", ".join(missing[:10])
        )
    return sorted(found)


def is_folder(path: str) -> bool:
    """Whether a path is a folder, on the disk or in an object store."""
    return bool(remote.entries(path)) if remote.is_remote(path) else os.path.isdir(path)


def entries(folder: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of all that lies in a folder."""
    if remote.is_remote(folder):
        return remote.entries(folder)
    with os.scandir(folder or ".") as found:
        return [(entry.name, entry.is_dir()) for entry in found]


def _existing(path: str) -> tuple[str, str]:
    """(the longest beginning of a path that is an existing folder, the rest)."""
    cut = len(path)
    while (cut := path.rfind("/", 0, cut)) > 0:
        if os.path.isdir(path[:cut]):
            return path[:cut], path[cut + 1 :]
    return ("/", path[1:]) if path.startswith("/") else ("", path)


def _expanded(pattern: str) -> Iterator[str]:
    """Expands the braces of a pattern; braces without a comma or '..' are literal."""
    for braces in _INNER_BRACES.finditer(pattern):
        options = _options(braces[1])
        if options is not None:
            for option in options:
                yield from _expanded(pattern[: braces.start()] + option + pattern[braces.end() :])
            return
    yield pattern


def _options(inside: str) -> Iterable[str] | None:
    """The names of braces; None: they are literal. Numbers are padded if an end is."""
    if numbers := _NUMBERS.fullmatch(inside):
        first, last, step = int(numbers[1]), int(numbers[2]), abs(int(numbers[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", end) for end in numbers.groups()[:2])
        width = max(map(len, numbers.groups()[:2])) if padded else 0
        counted = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return (str(number).zfill(width) for number in counted)
    if letters := _LETTERS.fullmatch(inside):
        first, last = map(ord, letters.groups())
        return map(chr, range(first, last + 1) if first <= last else range(first, last - 1, -1))
    return inside.split(",") if "," in inside else None


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    """The paths below `folder` that match a pattern, split at its slashes.

    Hidden names match only parts that begin with a dot. Links are followed, except to a folder above them.
    """
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _matches(folder, rest or ["*"])
        for name in sorted(os.listdir(folder or ".")):
            below = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isdir(below) and not _holds(below, folder):
                yield from _matches(below, parts)
        return
    if os.path.lexists(os.path.join(folder, part)):
        names = [part]
    elif glob.has_magic(part):
        names = fnmatch.filter(os.listdir(folder or "."), part)
        names = [name for name in names if part.startswith(".") or not name.startswith(".")]
    else:
        names = []
    for path in (os.path.join(folder, name) for name in names):
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _matches(path, rest)


def _holds(link: str, folder: str) -> bool:
    """Whether `link` is a link to `folder` or to a folder above it."""
    if not os.path.islink(link):
        return False
    target, folder = os.path.realpath(link), os.path.realpath(folder)
    return os.path.commonpath([target, folder]) == target


def _in_folder(path: str, split: str, suffix: str) -> list[str]:
    """The files of a folder; see `find_files`."""
    folder, beside, split = path, 0, _existing_split(path, split, suffix)
    if split and is_folder(os.path.join(path, split)):
        beside = sum(_is_of_split(name, split) for name in _files_of(path, suffix))
        folder, split = os.path.join(path, split), ""
    names = _files_of(folder, suffix)
    if not names:
        count, more = _deeper(folder, suffix)
        if count:
            raise ValueError(
                f"{folder} itself holds no *{suffix}; {count}{more} lie in folders below it: "
                f"{os.path.join(folder, '**', '*' + suffix)} names them all"
            )
        raise ValueError(f"{folder} holds no *{suffix}" + _other_kind(folder, suffix) + holds("", folder))
    chosen = [name for name in names if not split or _is_of_split(name, split)]
    if not chosen:
        splits = {re.split(r"[-_.]", name)[0] for name in names}
        splits = {name for name in splits if not name.isdigit()}  # a number is no split, but a part of one
        flag = "eval_split" if split in VALIDATION else "split"
        raise ValueError(
            f"--config.data.{flag}={split}: {path} holds neither {split}-*{suffix} nor {split}/*{suffix}; an "
            f"empty split (--config.data.split= --config.data.eval_split=) takes all {len(names)} files"
            + (did_you_mean(split, splits, most=3) if splits else "")
        )
    _warn_of_others(folder, split, suffix, beside)
    return [os.path.join(folder, name) for name in chosen]


def _existing_split(path: str, split: str, suffix: str) -> str:
    """The first of the `split_names` that a folder has, as a folder or in names of files; else `split`."""
    names = split_names(split)
    if len(names) > 1:
        files = _files_of(path, suffix)
        for name in names:
            if is_folder(os.path.join(path, name)) or any(_is_of_split(file, name) for file in files):
                return name
    return split


def _other_kind(folder: str, suffix: str) -> str:
    """'; ...': the source that reads the files of a folder without *suffix, or ''."""
    names = [name.lower() for name, _ in entries(folder)]
    if any(re.search(r"\.(tar\.\w+|tgz)$", name) for name in names):
        return f"; shards are read uncompressed: gunzip {folder}/*.gz"
    for source, ending in _ENDINGS.items():
        if ending != suffix and any(name.endswith(ending) for name in names):
            return f"; its *{ending} are --config.data.source={source}"
    beside = any(name.endswith(_PICTURES) for name in names)
    folders = [os.path.join(folder, name) for name, below in sorted(entries(folder)) if below]
    if beside or (not remote.is_remote(folder) and any(map(_holds_picture, folders))):
        return "; folders of pictures are --config.data.source=folder"
    return ""


def _holds_picture(folder: str) -> bool:
    """Whether one of the first entries of a folder is a picture."""
    with os.scandir(folder) as found:
        return any(entry.name.lower().endswith(_PICTURES) for entry in itertools.islice(found, 100))


def _is_of_split(name: str, split: str) -> bool:
    return bool(re.match(re.escape(split) + r"[-_.]", name))


def _files_of(folder: str, suffix: str) -> list[str]:
    """The sorted names of a folder's files with a suffix, without hidden ones."""
    found = [name for name, below in entries(folder) if name.endswith(suffix) and not below]
    return sorted(name for name in found if not name.startswith("."))


def _deeper(folder: str, suffix: str) -> tuple[int, str]:
    """(the number of files with a suffix in folders below, ' or more' if the search ended early)."""
    count = searched = 0
    if remote.is_remote(folder):
        return 0, ""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += sum(name.endswith(suffix) and name[0] != "." for name in names if place != folder)
        searched += len(folders) + len(names)
        if searched > _MAX_ENTRIES:
            return count, " or more"
    return count, ""


def _warn_of_others(folder: str, split: str, suffix: str, beside: int) -> None:
    """Warn of files in or below a folder that look like parts of the data and are not read."""
    count, more = (0, "") if split else _deeper(folder, suffix)
    if count:
        pattern = os.path.join(folder, "**", "*" + suffix)
        logging.warning(
            "%s: %d%s *%s in folders below it are not read; %s reads every level",
            folder, count, more, suffix, pattern,
        )  # fmt: skip
    if beside:
        logging.warning("%s is read; %d files *%s of that split beside it are not", folder, beside, suffix)
    shard = re.compile(
        re.escape(suffix) + (r"(?![a-z])|\.t(gz|bz2?|xz)$" if suffix == ".tar" else "(?![a-z])")
    )
    like = [
        name
        for name, below in entries(folder)
        if shard.search(name.lower())
        and (not name.endswith(suffix) or name.startswith("."))
        and (not split or _is_of_split(name.lstrip("."), split))
        and not below
    ]
    if like:
        logging.warning(
            "%s: %d files that do not end with %s, or are hidden, are not read, such as %r",
            folder, len(like), suffix, min(like),
        )  # fmt: skip


def holds(word: str, folder: str) -> str:
    """'; did you mean FOLDER? ... holds: ...': folders near `word`, then a folder's contents.

    Files whose names differ only in numbers are shown as one pattern.
    """
    kinds = [(name, below) for name, below in entries(folder) if not name.startswith(".")]
    folders = [name for name, below in kinds if below]
    groups = collections.defaultdict(list)
    for name, below in kinds:
        if not below:
            groups[re.sub(r"\d+", "*", name)].append(name)
    shown = sorted(name + "/" for name in folders) + sorted(
        f"{pattern} ({len(names)} files)" if len(names) > 1 else names[0] for pattern, names in groups.items()
    )
    return did_you_mean(word, folders, 3, f"{folder or 'this folder'} holds", shown)

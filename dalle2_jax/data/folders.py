"""Folders of pictures by class, as ImageNet's: FOLDER/SPLIT/CLASS/*.png, or FOLDER/CLASS/*.png.

The sorted names of the folders are the classes 0, 1, ...
"""

import array
import os
import stat
import time

import numpy as np
from absl import logging

from dalle2_jax.data import damage, records
from dalle2_jax.data.find import check_mounted, did_you_mean, holds
from dalle2_jax.data.records import BadRecord, Record

VALIDATION = ("validation", "val", "valid")  # names of one split
_SPLITS = ("train", *VALIDATION, "test")


class FolderSource(records.RecordSource):
    """The pictures in the folders of a folder and below these, sorted by path; the folder is the class.

    Raises ValueError if there is none. Folders without a picture are no classes, with a warning.
    """

    def __init__(self, root: str):
        self._root, self._paths, labels = root, [], array.array("i")
        entries, self.files, empty = [], [], []
        self.examples: dict[str, str] = {}
        refused, passed = records.Counts(self.examples), records.Counts(self.examples)
        began, logged = time.monotonic(), 10.0
        classes: list[str] = []
        for name in _folders(root):
            found = sorted(_pictures(root, name, refused, passed))
            if not found:
                empty.append(name)
                continue
            entries += [(path, size, 1) for path, size in found]
            self._paths += [path for path, _ in found]
            labels.extend([len(classes)] * len(found))
            self.files.append((name, sum(size for _, size in found), len(found)))
            classes.append(damage.printable(os.fsencode(name)))
            if time.monotonic() - began > logged:
                logged = time.monotonic() - began + 10
                logging.info("%s: %d pictures of %d classes so far", root, len(self._paths), len(classes))
        if not classes:
            raise ValueError(_nothing_in(root, refused))
        if empty:
            logging.warning("%s: folders without a picture are no classes: %s", root, ", ".join(empty[:10]))
        for what, counts in (("lost", refused), ("passed over", passed)):
            for reason, count in counts.items():
                example = self.examples[reason]
                logging.warning("%s: %s %d (%s), such as %s", root, what, count, reason, example)
        self.refused, self.passed, self.classes = dict(refused), dict(passed), tuple(classes)
        self.num_classes, self._labels = len(classes), np.asarray(labels)
        self.fingerprint = records.fingerprint(entries)

    def __len__(self):
        return len(self._paths)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """One record, without captions; see `records.RecordSource`."""
        path, encoded = self._paths[index], None
        key = damage.printable(os.fsencode(path))
        if image:
            try:
                with open(os.path.join(self._root, path), "rb") as file:
                    encoded = file.read()
            except (FileNotFoundError, PermissionError) as error:
                raise BadRecord("unreadable", f"{key}: {error.strerror}") from None
        return Record(key, encoded, label=int(self._labels[index]))


def open_folder(path: str, split: str) -> FolderSource:
    """The pictures by class in FOLDER/SPLIT, or in FOLDER where it has no folders of splits.

    'validation', 'val' and 'valid' are one split. Raises ValueError for no such folder or split, naming
    existing ones, and for a folder without pictures.
    """
    check_mounted(path)
    if not path:
        raise ValueError("data.path is empty: give the folder with a folder for each class")
    if not os.path.isdir(path):
        above = os.path.dirname(os.path.abspath(path))
        near = holds(os.path.basename(path), above) if os.path.isdir(above) else ""
        raise ValueError(f"{path} is no folder{near}")
    others = VALIDATION if split in VALIDATION else ()
    for name in (split, *others) if split else ():
        if _folders(folder := os.path.join(path, name)):
            return FolderSource(folder)
    splits = [name for name in _SPLITS if _folders(os.path.join(path, name))]
    if splits:
        raise ValueError(f"{path} has no split {split!r}" + did_you_mean(split, splits))
    return FolderSource(path)


def _folders(folder: str) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones; [] where it does not exist."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))


def _pictures(root: str, name: str, refused: records.Counts, passed: records.Counts):
    """Yield (path below `root`, size in bytes) of the pictures of a class, in its folder and below."""
    begin = len(os.path.join(root, ""))
    for place, folders, names in os.walk(os.path.join(root, name), onerror=_fail):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for file in names:
            path = os.path.join(place, file)
            relative = path[begin:]
            if file.startswith("."):
                passed.note("hidden_file", os.fsencode(relative))
            elif os.path.splitext(file)[1][1:].lower() not in records.IMAGE_EXTENSIONS:
                passed.note("other_extension", os.fsencode(relative))
            else:
                size, lost = _size(path)
                if lost:
                    refused.note(lost, os.fsencode(relative))
                else:
                    yield relative, size


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
    return found.st_size, "member_too_large" * (found.st_size > records.MAX_MEMBER_BYTES)


def _nothing_in(root: str, refused: records.Counts) -> str:
    """Why a folder is refused, and what to do."""
    lost = f" (refused: {dict(refused)})" if refused else ""
    message = f"{root} holds no picture in the folder of a class, such as {root}/CLASS/1.png{lost}"
    beside = [name for name in os.listdir(root) if name.lower().endswith(records.IMAGE_EXTENSIONS)]
    if beside:
        return f"{message}; its {len(beside)} pictures lie in no such folder: move them into one, {root}/all"
    return message + holds("", root)

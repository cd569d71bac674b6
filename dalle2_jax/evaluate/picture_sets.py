"""Sets of pictures to measure, streamed from a folder, tar shards, an npz or rendered scenes.

    FOLDER       PNG, JPEG, WebP, BMP, GIF, TIFF or PPM files in the folder and below it, by name; the
                 caption of KEY.png is in KEY.txt. In a folder of `dalle2_jax.generate`: the pictures that
                 generate.json lists; in one of `prompts.draw`: the samples of each line of prompts.jsonl
    *.tar        img2dataset's shards (a file, a pattern, or a folder with tars alone), see data/find.py
    *.npz        `arr_0` uint8 [N, H, W, 3], the format of guided-diffusion's evaluator

Every picture is decoded once when its set is opened. Unusable pictures are then left out and counted by
reason, with an example of each; `PictureSet.describe` and `summary` report them.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data import damage, records, scenes, shards
from dalle2_jax.evaluate import npz, picture_files
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.runtime import files, processes

UNSEEN_SPLITS = ("validation", "test_pairs", "test_relations")  # of scenes


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture. key: its name. data: the encoded file, or uint8 [H, W, 3]."""

    key: str
    data: bytes | np.ndarray

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3]: upright, transparency on white. Raises ValueError for undecodable data."""
        if isinstance(self.data, np.ndarray):
            return self.data
        try:
            return np.asarray(picture_files.decode(self.data))
        except records.BadRecord as error:
            raise ValueError(f"{self.key} cannot be read as a picture: {error}") from None


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures that can be iterated over several times.

    Attributes:
      name: the last part of the path. kind: 'folder', 'tar', 'npz', 'scenes' or 'memory'.
      count: number of pictures. items: returns an iterator over them.
      texts: the first caption of each picture; empty if any picture lacks one.
      refused: number of left out files or samples by reason. examples: one example by reason.
      uncaptioned: a text that names pictures without caption, if only some lack one.
      fields: of each picture of a suite, the line of its prompt in prompts.jsonl; else empty.
    """

    name: str
    kind: str
    count: int
    items: Callable[[], Iterator[Item]]
    texts: tuple[str, ...] = ()
    refused: dict = dataclasses.field(default_factory=dict)
    examples: dict = dataclasses.field(default_factory=dict)
    uncaptioned: str = ""
    fields: tuple[dict, ...] = ()

    def captions(self) -> list[str]:
        """The first caption of each picture. Raises ValueError unless all have one."""
        if not self.texts:
            some = f" ({self.uncaptioned})" if self.uncaptioned else ""
            advice = "put KEY.txt beside each KEY.png, or give img2dataset's shards"
            raise ValueError(f"not every picture of {self.name} has a caption{some}: {advice}")
        return list(self.texts)

    def describe(self) -> str:
        """A line: the number of pictures, of files or samples, and of left out ones by reason."""
        what = {"folder": "file", "tar": "sample"}.get(self.kind)
        line = f"{self.name}: {_counted(self.count, 'picture')}"
        line += f" of {_counted(self.count + sum(self.refused.values()), what)}" if what else ""
        left = picture_files.LeftOut(self.refused, self.examples)
        return f"{line}; left out: {left.describe()}" if self.refused else line

    def summary(self) -> dict:
        """`describe` as JSON values."""
        left_out = {reason: {"count": count} for reason, count in self.refused.items()}
        for reason, example in self.examples.items():
            left_out[reason]["example"] = example
        of = self.count + sum(self.refused.values())
        return {"name": self.name, "kind": self.kind, "pictures": self.count, "of": of, "left_out": left_out}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


Progress = Callable[[str, int, int], None]


class PassLines:
    """Prints the progress of a pass over pictures, every few seconds."""

    def __init__(self, what: str = "pictures read", clock=time.monotonic, every: float = 10.0):
        self._what, self._clock, self._every, self._last = what, clock, every, clock()

    def __call__(self, name: str, done: int, count: int) -> None:
        """Print progress unless less than `every` seconds have passed since the last line."""
        if self._clock() - self._last >= self._every:
            self._last = self._clock()
            print(f"{name}: {done}/{count} {self._what}", flush=True)


def open_pictures(path: str | os.PathLike, progress: Progress | None = None) -> PictureSet:
    """The pictures at `path`; see the module. All processes must call it, since they share the decoding.

    progress: called as progress(name of the set, pictures decoded, all pictures). Raises ValueError or
      OSError.
    """
    path = files.expand(path)
    if path.endswith(".npz") and os.path.isfile(path):
        return _open_npz(path)
    if os.path.isdir(path):
        found = picture_files.look_through(Path(path))
        if found.files or not found.shards:
            return _open_folder(path, found, progress)
    elif os.path.isfile(path) and not path.endswith(".tar"):
        raise ValueError(f"{path} is neither a folder of pictures nor a .tar or .npz file")
    return _open_tar(path, progress)


def _open_tar(path: str, progress: Progress | None) -> PictureSet:
    source = shards.open_tar(path, "")
    left = picture_files.LeftOut(source.refused)

    def read(i: int) -> Item:
        record = source.read(i, captions=False)
        assert record.image is not None  # `read` raises BadRecord for a record without a picture
        return Item(record.key, record.image)

    rows = _readable(read, len(source), lambda i: f"sample {i}", _last(path), left, progress)
    keys, texts = [], []
    for i in rows:
        try:
            captions, fault = source.read(i, image=False).captions, ""
        except records.BadRecord as error:  # the caption is bad, the picture is good
            captions, fault = {}, f" ({error})"
        keys.append(f"sample {i}{fault}")
        texts.append((captions.get("en") or next(iter(captions.values()), ("",)))[0])
    return _set(path, "tar", rows, read, keys, texts, left)


def _set(path: str, kind: str, rows, read, keys: Sequence[str], texts: Sequence[str], left) -> PictureSet:
    """The set of the pictures read(i) for i in `rows`, with these keys and captions ('': no caption)."""

    def items() -> Iterator[Item]:
        for i in rows:
            try:
                yield read(i)
            except records.BadRecord as error:
                raise ValueError(f"picture {i} cannot be read any more: {error}") from None

    without = [key for key, text in zip(keys, texts, strict=True) if not text]
    some = 0 < len(without) < len(keys)
    return PictureSet(
        name=_last(path),
        kind=kind,
        count=len(rows),
        items=items,
        texts=() if without else tuple(texts),
        refused=dict(left.counts),
        examples=left.examples,
        uncaptioned=f"{len(without)} of {len(keys)} have none, such as {without[0]}" if some else "",
    )


def _last(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _readable(
    read: Callable[[int], Item],
    count: int,
    key: Callable[[int], str],
    name: str,
    left: picture_files.LeftOut,
    progress: Progress | None,
) -> list[int]:
    """Numbers of the decodable pictures among `count`; adds the others to `left`.

    read: returns a picture by its number, or raises BadRecord. Raises ValueError if none can be decoded.
    """

    def fault(i: int) -> records.BadRecord | None:
        try:
            picture_files.decode(bytes(read(int(i)).data))
        except records.BadRecord as error:
            return error
        return None

    def decodable(numbers: np.ndarray) -> np.ndarray:
        good = np.zeros(len(numbers), bool)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for i, error in enumerate(pool.map(fault, numbers)):
                good[i] = error is None
                if progress is not None:
                    progress(name, i + 1, len(numbers))
        return good

    good = processes.split_over_processes(decodable, count)
    for i in np.flatnonzero(~good).tolist():
        # again: another process may have found the reason
        error = fault(i) or records.BadRecord("unreadable", "")
        left.add(error.reason, f"{key(i)}: {error.detail}" if error.detail else key(i))
    if not good.any():
        raise ValueError(f"{name} holds no readable picture; left out: {left.describe()}")
    return np.flatnonzero(good).tolist()


def _open_folder(path: str, found: picture_files.Folder, progress: Progress | None) -> PictureSet:
    root, left = Path(path), found.left
    fields: list[dict] = []
    listed = next(filter(Path.is_file, (root / "generate.json", root / "prompts.jsonl")), None)
    if listed is not None:
        if listed.name == "generate.json":
            entries, names = picture_files.read_listed(listed)
        else:
            entries, names, fields = picture_files.read_suite(listed)
        for file in found.files:
            if file not in names:
                shown = file.relative_to(root).as_posix()
                left.add("not_listed", f"{shown}: {listed.name} does not name it")
    else:
        entries = [(file, "") for file in found.files]
    for file in found.shards:
        left.add("shard", f"{file.name}: give '{root / '*.tar'}' to measure shards instead of pictures")
    if not entries:
        others = f"; left out: {left.describe()}" if left.counts else ""
        kinds = ", ".join(picture_files.EXTENSIONS)
        raise ValueError(f"{path} holds no pictures ({kinds}) and no shards{others}")

    def key(i: int) -> str:
        return damage.printable(os.fsencode(entries[i][0].relative_to(root)))

    def read(i: int) -> Item:
        return Item(key(i), picture_files.read_bytes(entries[i][0]))

    rows = _readable(read, len(entries), key, _last(path), left, progress)
    keys, texts = [], []
    for i in rows:
        file, listed_text = entries[i]
        text, fault = (listed_text, "") if listed else picture_files.caption_beside(file)
        keys.append(key(i) + (f" ({fault})" if fault else ""))
        texts.append(text)
    opened = _set(path, "folder", rows, read, keys, texts, left)
    return dataclasses.replace(opened, fields=tuple(fields[i] for i in rows)) if fields else opened


def _open_npz(path: str) -> PictureSet:
    with npz.open_pictures(path) as (_, shape):
        count = shape[0]

    def items():
        with npz.open_pictures(path) as (file, (rows, *shape)):
            size = int(np.prod(shape))
            for i in range(rows):
                data = file.read(size)
                if len(data) != size:
                    raise ValueError(f"{path} ends after {i} of {rows} pictures")
                yield Item(f"{os.path.basename(path)}:{i}", np.frombuffer(data, np.uint8).reshape(shape))

    return PictureSet(_last(path), "npz", count, items)


def of_images(name: str, images: Any, captions: Sequence[str] = ()) -> PictureSet:
    """A set of pictures in memory: a sequence of uint8 [H, W, 3], or an array of them."""

    def items() -> Iterator[Item]:
        return (Item(f"{name} {i}", image) for i, image in enumerate(images))

    return PictureSet(name, "memory", len(images), items, tuple(captions))


def rendered(
    name: str, drawn: Sequence[scenes.Scene], image_size: int, captions: Sequence[str] = ()
) -> PictureSet:
    """A set of rendered scenes."""

    def items() -> Iterator[Item]:
        return (Item(f"scene {i}", scenes.render(scene, image_size)) for i, scene in enumerate(drawn))

    return PictureSet(name, "scenes", len(drawn), items, tuple(captions))


def unseen_scenes(
    config: scenes.SceneConfig,
    count: int,
    seed: int,
    splits: Sequence[str] = UNSEEN_SPLITS,
    keep: Callable[[scenes.Scene], bool] = lambda scene: True,
) -> list[scenes.Scene]:
    """The first `count` scenes to `keep` of those splits outside training, in turn; fewer if most are not."""
    splits = [split for split in splits if config.max_objects > 1 or split != "test_relations"]
    numbered = ((splits[i % len(splits)], i // len(splits)) for i in range(100 * count))
    found = (scenes.sample_scene(config, split, i, seed) for split, i in numbered)
    return list(itertools.islice(filter(keep, found), count))


def scene_pictures(
    config: scenes.SceneConfig,
    image_size: int,
    count: int,
    seed: int = 0,
    splits: Sequence[str] = UNSEEN_SPLITS,
) -> PictureSet:
    """A set of `count` scenes from these splits, with randomly worded captions."""
    found = unseen_scenes(config, count, seed, splits)
    words = np.random.default_rng(seed).integers(1 << 30, size=count)
    texts = [scenes.caption(scene, index=int(word)) for scene, word in zip(found, words, strict=True)]
    return rendered(f"{config.name}_{image_size}", found, image_size, texts)


def samples(pictures: PictureSet, count: int, max_size: int = 256) -> tuple[np.ndarray, list[str]]:
    """(squares uint8 [n, side, side, 3], captions or names) of the first n <= `count` pictures."""
    first = list(itertools.islice(pictures.items(), count))
    images = [item.picture() for item in first]
    side = min(max_size, max(min(image.shape[:2]) for image in images))
    labels = pictures.texts[: len(first)] or [item.key for item in first]
    return np.stack([square_picture(image, side) for image in images]), list(labels)


def chosen(
    pictures: PictureSet, rows: Sequence[int] | np.ndarray, count: int, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """(pictures uint8 [H, W, 3], their ascending row numbers): at most `count` of `rows`, drawn at random."""
    picked = np.sort(np.random.default_rng(seed).permutation(np.asarray(rows))[:count])
    return [item.picture() for item in numbered(pictures, picked).values()], picked


def numbered(pictures: PictureSet, rows: Iterable[int]) -> dict[int, Item]:
    """The pictures with these row numbers, in the order of the set."""
    wanted = set(map(int, rows))
    return {row: item for row, item in enumerate(pictures.items()) if row in wanted}


def write_npz(pictures: PictureSet, path: str | os.PathLike) -> None:
    """Write `arr_0` uint8 [N, H, W, 3] for guided-diffusion's evaluator, one picture at a time.

    Raises ValueError unless all pictures have one size.
    """
    shape = None
    with (
        files.atomic_write(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        for item in pictures.items():
            picture = item.picture()
            if shape is None:
                shape = picture.shape
                header = dict(descr="|u1", fortran_order=False, shape=(pictures.count, *shape))
                np.lib.format.write_array_header_1_0(file, header)
            if picture.shape != shape:
                raise ValueError(
                    f"{item.key} is {picture.shape[1]}x{picture.shape[0]}, the first picture "
                    f"{shape[1]}x{shape[0]}: an npz holds pictures of one size, so choose a preset that "
                    "makes them so"
                )
            file.write(np.ascontiguousarray(picture).tobytes())


def mapped(pictures: PictureSet, change: Callable[[np.ndarray], np.ndarray]) -> PictureSet:
    """The set with `change` applied to each picture, such as a crop."""

    def items() -> Iterator[Item]:
        return (dataclasses.replace(item, data=change(item.picture())) for item in pictures.items())

    return dataclasses.replace(pictures, items=items)

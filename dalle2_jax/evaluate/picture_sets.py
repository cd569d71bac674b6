"""Sets of pictures to measure, streamed: a folder, tar shards, an npz, or drawn scenes; npz files out.

    FOLDER       PNG, JPEG, WebP, BMP, GIF, TIFF or PPM files, also in folders below, by name; a caption in
                 KEY.txt beside KEY.png. Where generate.json lies, as `dalle2_jax.generate` writes it, the
                 pictures that it lists
    *.tar        img2dataset's shards (a file, a pattern, or a folder of them alone), see data/find.py
    *.npz        `arr_0` uint8 [N, H, W, 3], as guided-diffusion's evaluator reads it; not loaded whole

Every picture is decoded once when its set is opened. What cannot be measured is left out then, counted by
reason with an example, and `PictureSet.said` and `summary` say so: a number of fewer pictures is another one.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from dalle2_jax.data import damage, records, scenes, shards, transforms
from dalle2_jax.evaluate import picture_files
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.runtime import files, grid, processes

DRAWN_AT_A_TIME = 64  # pictures, before they are written


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture: its name, and the encoded file or uint8 [H, W, 3]."""

    key: str
    data: bytes | np.ndarray

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3]: upright, transparency on white. Raises ValueError for what is no picture."""
        if isinstance(self.data, np.ndarray):
            return self.data
        try:
            return np.asarray(picture_files.decode(self.data))
        except records.BadRecord as error:
            raise ValueError(f"{self.key} cannot be read as a picture: {error}") from None


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures that can be gone through again and again.

    name: the last part of where they come from. kind: 'folder', 'tar', 'npz', 'scenes' or 'memory'.
    count: how many. items: goes through them. texts: the first caption of each, or nothing if any has none.
    refused: what was left out of files, or of the samples of shards, by reason; examples: one of each.
    uncaptioned: which pictures have no caption, in words, where others have one.
    """

    name: str
    kind: str
    count: int
    items: Callable[[], Iterator[Item]]
    texts: tuple[str, ...] = ()
    refused: dict = dataclasses.field(default_factory=dict)
    examples: dict = dataclasses.field(default_factory=dict)
    uncaptioned: str = ""

    def captions(self) -> list[str]:
        """The first caption of each. Raises ValueError where there are none."""
        if not self.texts:
            raise ValueError(
                f"not every picture of {self.name} has a caption"
                + (f" ({self.uncaptioned})" if self.uncaptioned else "")
                + ": put KEY.txt beside each KEY.png, or give img2dataset's shards"
            )
        return list(self.texts)

    def said(self) -> str:
        """In a line, how many pictures there are of how many files or samples, and what was left out."""
        what = {"folder": "file", "tar": "sample"}.get(self.kind)
        line = f"{self.name}: {_counted(self.count, 'picture')}"
        if what:
            line += f" of {_counted(self.count + sum(self.refused.values()), what)}"
        if not self.refused:
            return line
        left = picture_files.LeftOut(self.refused)
        left.examples = self.examples
        return f"{line}; left out: {left.said()}"

    def summary(self) -> dict:
        """The same as JSON values."""
        left_out = {
            reason: {"count": count} | ({"example": self.examples[reason]} if reason in self.examples else {})
            for reason, count in self.refused.items()
        }
        of = self.count + sum(self.refused.values())
        return {"name": self.name, "kind": self.kind, "pictures": self.count, "of": of, "left_out": left_out}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


Progress = Callable[[str, int, int], None]


def open_pictures(path: str | os.PathLike, progress: Progress | None = None) -> PictureSet:
    """The pictures at `path`; see the module. Of several processes all must call it: they share the decoding.

    progress: called with the name of the set, pictures decoded, pictures in all. Raises ValueError or OSError
    that says what is wrong.
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
        return Item(record.key, record.image)

    rows = _readable(read, len(source), lambda i: f"sample {i}", _last(path), left, progress)
    keys, texts = [], []
    for i in rows:
        try:
            of, fault = source.read(i, image=False).captions, ""
        except records.BadRecord as error:  # of its caption; the picture is a good one
            of, fault = {}, f" ({error})"
        keys.append(f"sample {i}{fault}")
        texts.append((of.get("en") or next(iter(of.values()), ("",)))[0])
    return _set(path, "tar", rows, read, keys, texts, left)


def _still(read: Callable[[int], Item], i: int) -> Item:
    """read(i) of what could be read before. Raises ValueError where it no longer can."""
    try:
        return read(i)
    except records.BadRecord as error:
        raise ValueError(f"picture {i} cannot be read any more: {error}") from None


def _set(path: str, kind: str, rows, read, keys: Sequence[str], texts: Sequence[str], left) -> PictureSet:
    """The set of the pictures read(i) for i in `rows`, which have these keys and captions ('' for none)."""

    def items():
        return (_still(read, i) for i in rows)

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
    """Which of `count` pictures can be decoded; the others are added to `left`.

    read: a picture by its number, or BadRecord. Raises ValueError where none can be.
    """

    def fault(i: int) -> records.BadRecord | None:
        try:
            picture_files.decode(read(int(i)).data)
        except records.BadRecord as error:
            return error
        return None

    def own(numbers: np.ndarray) -> np.ndarray:
        good = np.zeros(len(numbers), bool)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for done, error in enumerate(pool.map(fault, numbers)):
                good[done] = error is None
                if progress is not None:
                    progress(name, done + 1, len(numbers))
        return good

    good = processes.in_shares(own, count)
    for i in np.flatnonzero(~good).tolist():
        error = fault(i)  # once more: the reasons of other processes are not known here
        if error is not None:
            left.add(error.reason, f"{key(i)}: {error.detail}" if error.detail else key(i))
        else:
            left.add("unreadable", key(i))
    if not good.any():
        raise ValueError(f"{name} holds no picture that can be read; there are: {left.said()}")
    return np.flatnonzero(good).tolist()


def _open_folder(path: str, found: picture_files.Folder, progress: Progress | None) -> PictureSet:
    root, listed, left = Path(path), Path(path) / "generate.json", found.left
    if listed.is_file():
        entries, known = picture_files.read_listed(listed)
        for file in found.files:
            if file not in known:
                left.add("not_listed", f"{file.relative_to(root).as_posix()}: generate.json does not name it")
    else:
        entries = [(file, None) for file in found.files]
    for file in found.shards:
        left.add("shard", f"{file.name}: give '{root / '*.tar'}' to measure shards instead of pictures")
    if not entries:
        raise ValueError(
            f"{path} holds no pictures ({', '.join(picture_files.EXTENSIONS)}) and no shards"
            + (f"; there are: {left.said()}" if left.counts else "")
        )

    def key(i: int) -> str:
        return damage.printable(os.fsencode(entries[i][0].relative_to(root)))

    def read(i: int) -> Item:
        return Item(key(i), picture_files.read_bytes(entries[i][0]))

    rows = _readable(read, len(entries), key, _last(path), left, progress)
    keys, texts = [], []
    for i in rows:
        file, text = entries[i]
        fault = ""
        if text is None:
            text, fault = picture_files.caption_beside(file)
        keys.append(key(i) + (f" ({fault})" if fault else ""))
        texts.append(text)
    return _set(path, "folder", rows, read, keys, texts, left)


def _open_npz(path: str) -> PictureSet:
    with _pictures_of_npz(path) as (_, shape):
        count = shape[0]

    def items():
        with _pictures_of_npz(path) as (file, (rows, *shape)):
            size = int(np.prod(shape))
            for i in range(rows):
                data = file.read(size)
                if len(data) != size:
                    raise ValueError(f"{path} ends after {i} of {rows} pictures")
                yield Item(f"{os.path.basename(path)}:{i}", np.frombuffer(data, np.uint8).reshape(shape))

    return PictureSet(_last(path), "npz", count, items)


@contextlib.contextmanager
def array_of_npz(path: str, name: str):
    """(open file that stands at the numbers, shape, whether by columns, type) of an array in an npz.

    Raises ValueError for what is none. The header may lie: nothing is allocated by it.
    """
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0
        reader = reader if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no array {name}: {error}") from None
    with archive, file:
        yield file, shape, fortran, dtype


@contextlib.contextmanager
def _pictures_of_npz(path: str):
    """(open file that stands at the pixels, shape) of `arr_0` in an npz; objects are refused."""
    with array_of_npz(path, "arr_0") as (file, shape, fortran, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or 0 in shape:
            raise ValueError(f"arr_0 of {path} must be uint8 [N, H, W, 3], not {dtype} {list(shape)}")
        if shape[1] * shape[2] > transforms.MAX_PIXELS:  # said by the header alone, which may lie
            raise ValueError(
                f"the pictures of {path} are {shape[2]} x {shape[1]}, above {transforms.MAX_PIXELS}"
            )
        yield file, shape


def of_images(name: str, images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> PictureSet:
    """Pictures uint8 [H, W, 3] that are in memory."""

    def items():
        return (Item(f"{name} {i}", image) for i, image in enumerate(images))

    return PictureSet(name, "memory", len(images), items, tuple(captions))


def rendered(name: str, drawn: Sequence[scenes.Scene], image_size: int) -> PictureSet:
    """These scenes as pictures, without captions."""

    def items():
        for i, scene in enumerate(drawn):
            yield Item(f"scene {i}", scenes.render(scene, image_size))

    return PictureSet(name, "scenes", len(drawn), items)


def scene_pictures(config: scenes.SceneConfig, image_size: int, count: int, seed: int = 0) -> PictureSet:
    """`count` scenes of the splits that training never shows, with captions in a random wording."""
    splits = ("validation", "test_pairs", "test_relations")[: 2 if config.max_objects < 2 else 3]

    def scene(i: int) -> scenes.Scene:
        return scenes.sample_scene(config, splits[i % len(splits)], i // len(splits), seed)

    def items():
        for i in range(count):
            yield Item(f"scene {i}", scenes.render(scene(i), image_size))

    words = np.random.default_rng(seed).integers(1 << 30, size=count)
    texts = tuple(scenes.caption(scene(i), index=int(word)) for i, word in enumerate(words))
    return PictureSet(f"{config.name}_{image_size}", "scenes", count, items, texts)


def samples(pictures: PictureSet, count: int, max_size: int = 256) -> tuple[np.ndarray, list[str]]:
    """(squares uint8 [n, side, side, 3], captions or names) of the first pictures, at most `count`."""
    first = list(itertools.islice(pictures.items(), count))
    images = [item.picture() for item in first]
    side = min(max_size, max(min(image.shape[:2]) for image in images))
    labels = pictures.texts[: len(first)] or [item.key for item in first]
    return np.stack([square_picture(image, side) for image in images]), list(labels)


def chosen(
    pictures: PictureSet, rows: Sequence[int], count: int, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """(pictures uint8 [H, W, 3], their rows, ascending): at most `count` of `rows`, drawn at random."""
    picked = np.sort(np.random.default_rng(seed).permutation(np.asarray(rows))[:count])
    wanted = set(picked.tolist())
    return [item.picture() for row, item in enumerate(pictures.items()) if row in wanted], picked


def write_npz(pictures: PictureSet, path: str | os.PathLike) -> None:
    """Write `arr_0` uint8 [N, H, W, 3], picture by picture, for guided-diffusion's evaluator.

    Raises ValueError unless all pictures have one size.
    """
    shape = None
    with (
        files.whole(path) as partial,
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
    """The set with each picture changed, such as cut to a square."""

    def items():
        for item in pictures.items():
            yield dataclasses.replace(item, data=change(item.picture()))

    return dataclasses.replace(pictures, items=items)


def keep_plan(path: Path, text: str) -> None:
    """Write what is to be drawn into a folder, whole or not at all, or find the same there.

    Raises ValueError where the file says something else.
    """
    if path.exists():
        if files.read_text(path) != text:
            raise ValueError(
                f"{path.parent} holds pictures that were drawn otherwise: choose another folder, or remove it"
            )
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.rename(path)


def _occurrences(captions: Sequence[str]) -> list[int]:
    """How often each caption came before."""
    counted = collections.Counter()
    numbers = []
    for caption in captions:
        numbers.append(counted[caption])
        counted[caption] += 1
    return numbers


def drawn_pictures(
    model,
    captions: Sequence[str],
    folder: str | os.PathLike,
    *,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    progress=None,
) -> PictureSet:
    """One picture a caption, drawn by an `UnCLIP` as PNG files into `folder`; those that are there stay.

    So drawing that was interrupted goes on: a picture depends on its caption, number, seed and settings
    alone. Several processes draw together; the first writes, into a folder that all see.

    numbers: of each picture, which makes those of one caption differ; by default how often its caption came
      before. A model that reads no captions needs numbers of its own for all.

    Raises ValueError where the folder holds pictures of other weights, seed, settings or captions.
    """
    folder, size = Path(folder), max(DRAWN_AT_A_TIME, batch_size or 0) * jax.process_count()
    names = [f"{i:06d}.png" for i in range(len(captions))]
    numbers = _occurrences(captions) if numbers is None else [int(number) for number in numbers]
    listed = [
        {"file": name, "caption": text} | ({"number": number} if number else {})
        for name, text, number in zip(names, captions, numbers, strict=True)
    ]
    weights = {name: model.engine.weights_sha256(name) for name in model.engine.stages}
    plan = {"pictures": listed, "model": model.name, "weights_sha256": weights, "seed": seed}
    text = json.dumps(plan | {"settings": model.settings(**(settings or {}))}, indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    processes.one_then_others("plan", lambda: keep_plan(folder / "generate.json", text))
    missing = np.array([not (folder / name).exists() for name in names])
    missing = np.flatnonzero(processes.from_first(missing))  # the same for all
    for start in sorted({int(i) // size * size for i in missing}):
        part = slice(start, start + size)
        how = dict(seed=seed, batch_size=batch_size, progress=progress) | (settings or {})
        images = model.text_to_image(captions[part], numbers=numbers[part], **how).images
        for name, image, caption in zip(names[part], images, captions[part], strict=True):
            if processes.is_first():
                partial = folder / f".{name}.partial"
                grid.save_png(partial, image, {"caption": caption})
                partial.rename(folder / name)
    processes.sync("drawn")
    return open_pictures(folder)

"""Sets of pictures to measure, streamed: a folder, tar shards, an npz, or drawn scenes; npz files out.

    FOLDER       PNG, JPEG or WebP files, also in folders below, by name; a caption in KEY.txt beside KEY.png.
                 Where generate.json lies, as `dalle2_jax.generate` writes it, the pictures that it lists
    *.tar        img2dataset's shards (a file, a pattern, or a folder of them), see data/find.py
    *.npz        `arr_0` uint8 [N, H, W, 3], as guided-diffusion's evaluator reads it; not loaded whole

A picture that cannot be read is an error: a number of fewer pictures is another number.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import files, grid, processes
from dalle2_jax.data import damage, records, scenes, shards, transforms
from dalle2_jax.pictures import square_picture

MAX_CAPTION_BYTES = 1 << 16
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
            return np.asarray(transforms.decode(self.data))
        except records.BadRecord as error:
            raise ValueError(f"{self.key} cannot be read as a picture: {error}") from None


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures that can be gone through again and again.

    name: the last part of where they come from. kind: 'folder', 'tar', 'npz', 'scenes' or 'memory'.
    count: how many. items: goes through them. texts: the first caption of each, or nothing if any has none.
    refused: members of shards that are no pictures, by reason.
    """

    name: str
    kind: str
    count: int
    items: Callable[[], Iterator[Item]]
    texts: tuple[str, ...] = ()
    refused: dict = dataclasses.field(default_factory=dict)

    def captions(self) -> list[str]:
        """The first caption of each. Raises ValueError where there are none."""
        if not self.texts:
            raise ValueError(
                f"not every picture of {self.name} has a caption: put KEY.txt beside each KEY.png, or give "
                "img2dataset's shards"
            )
        return list(self.texts)


def open_pictures(path: str | os.PathLike) -> PictureSet:
    """The pictures at `path`; see the module. Raises ValueError or OSError that says what is wrong."""
    path = os.path.expanduser(os.fspath(path))
    if path.endswith(".npz") and os.path.isfile(path):
        return _open_npz(path)
    if os.path.isdir(path) and not glob.glob(os.path.join(glob.escape(path), "*.tar")):
        return _open_folder(path)
    if os.path.isfile(path) and not path.endswith(".tar"):
        raise ValueError(f"{path} is neither a folder of pictures nor a .tar or .npz file")
    source = shards.open_tar(path, "")

    def read(i: int, **parts) -> records.Record:
        try:
            return source.read(i, **parts)
        except records.BadRecord as error:
            raise ValueError(f"record {i} of {path} cannot be read: {error}") from None

    def items():
        for i in range(len(source)):
            record = read(i, captions=False)
            yield Item(record.key, record.image)

    found = (read(i, image=False).captions for i in range(len(source)))
    texts = [(of.get("en") or next(iter(of.values()), ("",)))[0] for of in found]
    return PictureSet(_last(path), "tar", len(source), items, _all(texts), dict(source.refused))


def _last(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _all(texts: list[str]) -> tuple[str, ...]:
    return tuple(texts) if all(texts) else ()


def _open_folder(path: str) -> PictureSet:
    root, listed = Path(path), Path(path) / "generate.json"
    if listed.is_file():
        entries = _listed(listed)
    else:
        entries = []
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                file = Path(folder) / name
                if file.suffix[1:].lower() in records.IMAGE_EXTENSIONS and not name.startswith("."):
                    entries.append((file, _beside(file)))
    if not entries:
        raise ValueError(f"{path} holds no pictures ({', '.join(records.IMAGE_EXTENSIONS)}) and no shards")

    def items():
        for file, _ in entries:
            yield Item(damage.printable(os.fsencode(file.relative_to(root))), file.read_bytes())

    return PictureSet(_last(path), "folder", len(entries), items, _all([text for _, text in entries]))


def _listed(path: Path) -> list[tuple[Path, str]]:
    """(file, caption or '') of the pictures in generate.json; a name outside its folder is an error."""
    try:
        pictures = json.loads(path.read_text("utf-8"))["pictures"]
        found = [(str(picture["file"]), picture.get("caption")) for picture in pictures]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as dalle2_jax.generate writes it: {error!r}") from None
    for name, _ in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path} names {name!r}, which lies outside its folder")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path} names {name!r}, which is not there")
    return [(path.parent / name, text if isinstance(text, str) else "") for name, text in found]


def _beside(file: Path) -> str:
    """The first line of KEY.txt, or ''."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ""
    with text.open("rb") as opened:
        lines = opened.read(MAX_CAPTION_BYTES).decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def _open_npz(path: str) -> PictureSet:
    with _array(path) as (_, shape):
        count = shape[0]

    def items():
        with _array(path) as (file, (rows, *shape)):
            size = int(np.prod(shape))
            for i in range(rows):
                data = file.read(size)
                if len(data) != size:
                    raise ValueError(f"{path} ends after {i} of {rows} pictures")
                yield Item(f"{os.path.basename(path)}:{i}", np.frombuffer(data, np.uint8).reshape(shape))

    return PictureSet(_last(path), "npz", count, items)


@contextlib.contextmanager
def _array(path: str):
    """(open file that stands at the pixels, shape) of `arr_0` in an npz; objects are refused."""
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0
        reader = reader if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no array arr_0: {error}") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or 0 in shape:
        raise ValueError(f"arr_0 of {path} must be uint8 [N, H, W, 3], not {dtype} {list(shape)}")
    if shape[1] * shape[2] > transforms.MAX_PIXELS:  # said by the header alone, which may lie
        raise ValueError(f"the pictures of {path} are {shape[2]} x {shape[1]}, above {transforms.MAX_PIXELS}")
    with archive, file:
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
        if path.read_text("utf-8") != text:
            raise ValueError(
                f"{path.parent} holds pictures that were drawn otherwise: choose another folder, or remove it"
            )
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.rename(path)


def drawn_pictures(
    model,
    captions: Sequence[str],
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    progress=None,
) -> PictureSet:
    """One picture a caption, drawn by an `UnCLIP` as PNG files into `folder`; those that are there stay.

    So drawing that was interrupted goes on: a picture depends on its caption, seed and settings alone.
    Several processes draw together; the first writes, into a folder that all see.

    Raises ValueError where the folder holds pictures of other weights, seed, settings or captions.
    """
    folder, size = Path(folder), max(DRAWN_AT_A_TIME, batch_size or 0) * jax.process_count()
    names = [f"{i:06d}.png" for i in range(len(captions))]
    listed = [{"file": name, "caption": text} for name, text in zip(names, captions, strict=True)]
    weights = {name: model.cascade.weights_sha256(name) for name in model.cascade.stages}
    plan = {"pictures": listed, "model": model.name, "weights_sha256": weights, "seed": seed}
    text = json.dumps(plan | {"settings": model.settings(**(settings or {}))}, indent=2, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    processes.one_then_others("plan", lambda: keep_plan(folder / "generate.json", text))
    missing = np.array([not (folder / name).exists() for name in names])
    missing = np.flatnonzero(processes.from_first(missing))  # the same for all
    for start in sorted({int(i) // size * size for i in missing}):
        part = slice(start, start + size)
        images = model.text_to_image(
            captions[part], seed=seed, batch_size=batch_size, progress=progress, **(settings or {})
        ).images
        for name, image, caption in zip(names[part], images, captions[part], strict=True):
            if processes.is_first():
                partial = folder / f".{name}.partial"
                grid.save_png(partial, image, {"caption": caption})
                partial.rename(folder / name)
    processes.sync("drawn")
    return open_pictures(folder)

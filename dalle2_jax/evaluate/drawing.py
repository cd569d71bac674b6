"""Pictures drawn to be measured: their captions, their scenes, and the folder that holds them."""

import collections
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.data.pipeline import label_of
from dalle2_jax.evaluate.picture_sets import PictureSet, open_pictures
from dalle2_jax.evaluate.reference import Stats, pictures_of
from dalle2_jax.runtime import files, grid, processes
from dalle2_jax.systems.cascade import GUIDES

DRAWN_AT_A_TIME = 64  # pictures, before they are written


def scenes_of(model: pipeline.Pipeline, name: str | None = None) -> tuple[scenes.SceneConfig, int]:
    """(grammar, side of the pictures) of the scenes that a model was trained on, or of the grammar `name`.

    Raises ValueError for a model that was not trained on scenes, unless `name` names a grammar.
    """
    configs = model.engine.configs
    names = ("clip", "decoder", "token_model", "tokenizer")
    stored_data = next((configs[name].get("data") or {} for name in names if name in configs), {})
    data = {"path": "", "source": ""} | stored_data  # converted weights have no data settings
    stored, _, side = data["path"].partition("_")
    if name is None and (data["source"] != "scenes" or stored not in scenes.PRESETS):
        raise ValueError(
            f"model {model.name!r} was trained on {data['path']!r} of source {data['source']!r}: choose "
            f"the scenes with --scenes={'|'.join(scenes.PRESETS)}, or give pictures: --reference=SRC to draw "
            "its captions, --images=SRC to measure the model on"
        )
    return scenes.preset(name or stored), int(side) if side.isdigit() else model.image_size


def some_captions(pictures: PictureSet, n: int, seed: int) -> list[str]:
    """Captions of at most `n` pictures, drawn at random, in the order of the pictures."""
    texts = pictures.captions()
    if n < len(texts):
        rows = np.sort(np.random.default_rng(seed).choice(len(texts), n, replace=False))
        texts = [texts[row] for row in rows]
    return texts


def reads_text(model: pipeline.Pipeline) -> bool:
    """Whether the model is conditioned on captions, not on class labels alone."""
    stages = model.engine.stages.items()
    return any(getattr(stage, "context_length", None) for name, stage in stages if name not in GUIDES)


def what_to_draw(
    model: pipeline.Pipeline,
    reference: PictureSet | Stats | None,
    n: int,
    seed: int = 0,
    settings: Mapping | None = None,
) -> tuple[list[str], list[int] | None]:
    """(at most `n` captions to draw, numbers of their pictures) for a comparison with `reference`.

    A model that reads text draws captions of the reference; its numbers are None. A class-conditional model
    draws the names of its classes in turn, unless every caption of the reference names a class; so does an
    unconditional one that `settings` of drawing steer by its classifier. Without, it draws `n` pictures.

    Raises ValueError for a model that reads text and a reference without captions.
    """
    stages, pictures = model.engine.stages, pictures_of(reference)
    if reads_text(model):
        if pictures is None:
            raise ValueError("statistics have no captions: give --images, or pictures with captions")
        return some_captions(pictures, n, seed), None
    texts = some_captions(pictures, n, seed) if pictures is not None and pictures.texts else []
    steered = ["classifier"] if (settings or {}).get("classifier") else []
    labelled = [name for name, stage in stages.items() if getattr(stage, "num_classes", 0)]
    if name := next(iter([name for name in labelled if name not in GUIDES] + steered), ""):
        classes = model.engine.configs[name]["data"]["classes"]
        if min((label_of(text, classes) for text in texts), default=-1) < 0:
            texts = _class_captions(name, classes, n, seed)
    texts = texts or ["a picture"] * n
    return texts, list(range(len(texts)))


def _class_captions(stage: str, names: Sequence[str], n: int, seed: int) -> list[str]:
    """`n` names of a stage's classes; the counts of two classes differ by one at most."""
    usable = [name for i, name in enumerate(names) if label_of(name, names) == i]
    lost = [name for i, name in enumerate(names) if label_of(name, names) != i]
    if not usable:
        raise ValueError(f"no class of the {stage} can be drawn by its name, such as {names[0]!r}")
    if lost:
        print(f"note: {len(lost)} classes have the name of another, such as {lost[0]!r}", flush=True)
    draw = np.random.default_rng(seed)
    turns = np.concatenate([draw.permutation(len(usable)) for _ in range(-(-n // len(usable)))])
    print(f"drawing {n} pictures of the {len(usable)} classes of the {stage}, in turn", flush=True)
    return [usable[i] for i in turns[:n]]


def open_drawn_folder(folder: Path, plans: Mapping[str, str], drawn: Sequence[str]) -> np.ndarray:
    """Prepare a folder of drawn pictures; returns the numbers of the missing files of `drawn`.

    plans: file -> text that describes the pictures; each is written, or compared with the existing file. All
      processes get the numbers that process 0 finds.

    Raises ValueError for a folder with another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def keep(path: Path, text: str) -> None:
        if not path.exists():
            with files.atomic_write(path) as partial:
                partial.write_text(text, "utf-8")
        elif files.read_text(path) != text:
            raise ValueError(f"{folder} holds pictures of another plan: choose another folder, or remove it")

    for name, text in plans.items():
        processes.one_then_others(name, functools.partial(keep, folder / name, text))
    missing = np.array([not (folder / name).exists() for name in drawn])
    return np.flatnonzero(processes.from_first(missing))


def plan_of(model: pipeline.Pipeline) -> dict:
    """The part of a plan that names the model: JSON values."""
    weights = {name: model.engine.weights_sha256(name) for name in model.engine.stages}
    return {"model": model.name, "weights_sha256": weights}


def save_picture(path: Path, image: np.ndarray, caption: str) -> None:
    """Write a PNG with its caption atomically."""
    with files.atomic_write(path) as partial:
        grid.save_png(partial, image, {"caption": caption})


def _occurrences(captions: Sequence[str]) -> list[int]:
    """For each caption the number of equal captions before it."""
    counters: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
    return [next(counters[caption]) for caption in captions]


def drawn_pictures(
    model: pipeline.Pipeline,
    captions: Sequence[str],
    folder: str | os.PathLike,
    *,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    progress=None,
) -> PictureSet:
    """One picture a caption, drawn as PNG files into `folder`; existing files are kept.

    So interrupted drawing resumes: a picture depends on its caption, number, seed and settings alone. Several
    processes share the drawing; the first writes, into a folder that all can read.

    numbers: number of each picture, which makes pictures of one caption differ; by default the number of
      equal captions before it. A model that reads no captions needs distinct numbers.

    Raises ValueError if the folder holds pictures of other weights, seed, settings or captions.
    """
    folder, size = Path(folder), max(DRAWN_AT_A_TIME, batch_size or 0) * jax.process_count()
    names = [f"{i:06d}.png" for i in range(len(captions))]
    numbers = _occurrences(captions) if numbers is None else [int(number) for number in numbers]
    listed = [
        {"file": name, "caption": text} | ({"number": number} if number else {})
        for name, text, number in zip(names, captions, numbers, strict=True)
    ]
    settings = settings or {}
    plan = {"pictures": listed, **plan_of(model), "seed": seed, "settings": model.settings(**settings)}
    text = json.dumps(plan, indent=2, ensure_ascii=False)
    missing = open_drawn_folder(folder, {"generate.json": text}, names)
    for start in sorted({int(i) // size * size for i in missing}):
        part = slice(start, start + size)
        how = dict(seed=seed, batch_size=batch_size, progress=progress) | settings
        images = model.text_to_image(captions[part], numbers=numbers[part], **how).images
        if processes.is_first():
            for name, image, caption in zip(names[part], images, captions[part], strict=True):
                save_picture(folder / name, image, caption)
    processes.sync("drawn")
    return open_pictures(folder)

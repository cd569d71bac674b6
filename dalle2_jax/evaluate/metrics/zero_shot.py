"""Zero-shot classification by CLIP: the class nearest to a picture (arXiv:2103.00020, section 3.1).

A class is the normalised mean of the unit text embeddings of its name in several templates. The pictures are
200 unseen scenes of one object, with a class for each pair of colour and shape, or pictures whose captions
name classes.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.data.pipeline import label_of
from dalle2_jax.evaluate import picture_sets
from dalle2_jax.evaluate.metric import Inputs, ModelMetric, Request
from dalle2_jax.runtime import files

TEMPLATES = ("{}", "a {}", "one {}")
SCENES = 200


def class_embeddings(
    encode_text: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> np.ndarray:
    """[C, E] unit vectors of the classes `names`; encode_text gives [N, E] of N texts."""
    embeds = np.asarray(encode_text([t.format(name) for name in names for t in templates]), np.float64)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    means = embeds.reshape(len(names), len(templates), -1).mean(axis=1)
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def accuracy(
    image_embed: np.ndarray, classes: np.ndarray, labels: Sequence[int], top: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of pictures [N, E] whose label is among the `top` nearest classes [C, E], and the counts."""
    ranked = np.argsort(-(np.asarray(image_embed) @ np.asarray(classes).T), axis=1, kind="stable")
    found = ranked == np.asarray(labels)[:, None]
    return {"n": len(found), "classes": len(classes)} | {
        f"top{k}": float(found[:, :k].any(axis=1).mean()) for k in top if k < len(classes)
    }


def labels(captions: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Class numbers [N] of captions, -1 for a caption that names no class or several; see `label_of`.

    Raises ValueError if no caption names exactly one class.
    """
    found = np.array([label_of(caption, names) for caption in captions])
    if not (found >= 0).any():
        raise ValueError(f"no caption names exactly one of the {len(names)} classes, such as {names[0]!r}")
    return found


def _lines(path: str | os.PathLike) -> list[str]:
    """The non-blank lines of a file."""
    return [line.strip() for line in files.read_text(path).splitlines() if line.strip()]


def read_names(path: str | os.PathLike) -> list[str]:
    """The classes of a file, one a line. Raises ValueError for fewer than two or a repeated one."""
    names = _lines(path)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path} must hold at least two classes, one a line, none twice")
    return names


def read_templates(path: str | os.PathLike) -> list[str]:
    """The templates of a file, one a line, each with {} in the place of the class; ValueError for others."""
    found = _lines(path)
    for template in found:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise ValueError(f"{path}: {template!r} must hold {{}} once, as 'a photo of a {{}}' does")
    if not found:
        raise ValueError(f"{path} holds no template, such as 'a photo of a {{}}'")
    return found


def single_objects(
    config: scenes.SceneConfig, count: int, seed: int = 0
) -> tuple[list[scenes.Scene], list[str], list[int]]:
    """(`count` unseen scenes of one object, all class names 'COLOUR SHAPE', the scenes' class numbers)."""
    names = [f"{colour} {shape}" for colour in config.colours for shape in config.shapes]
    splits = ("validation", "test_pairs")
    found = picture_sets.unseen_scenes(config, count, seed, splits, lambda scene: len(scene.objects) == 1)
    return found, names, [names.index(f"{s.objects[0].colour} {s.objects[0].shape}") for s in found]


def unseen_pictures(config: scenes.SceneConfig, image_size: int, n: int = SCENES, seed: int = 0):
    """(`single_objects` rendered, with their classes as captions, the names of all classes)."""
    found, names, numbers = single_objects(config, n, seed)
    texts = [names[number] for number in numbers]
    return picture_sets.rendered("unseen scenes", found, image_size, texts), names


def measure(
    model: pipeline.Pipeline,
    pictures: picture_sets.PictureSet,
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    n: int = SCENES,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict:
    """`accuracy` of the model's CLIP for at most `n` of `pictures`, drawn at random from those whose caption
    names exactly one of the classes `names`."""
    numbers = labels(pictures.captions(), names)
    images, rows = picture_sets.chosen(pictures, np.flatnonzero(numbers >= 0), n, seed)
    classes = class_embeddings(lambda texts: model.encode_text(texts, batch_size)[0][0], names, templates)
    return accuracy(model.encode_image(images, batch_size), classes, numbers[rows])


def _measure(inputs: Inputs) -> tuple[dict, str]:
    request, pictures, n = inputs.request, inputs.images, inputs.request.n
    templates = read_templates(request.templates) if request.templates else TEMPLATES
    if pictures is None:
        (pictures, names), n = unseen_pictures(*inputs.scenes, seed=request.seed), SCENES
    else:
        names = read_names(request.classes or "")
    common: dict[str, Any] = dict(n=n, seed=request.seed, batch_size=request.batch_size)
    found = measure(inputs.model, pictures, names, templates, **common)
    tops = ", ".join(f"top {key[3:]} {share:.3f}" for key, share in found.items() if key.startswith("top"))
    return found, f"zero-shot among {found['classes']} classes: {tops} of {found['n']}"


def _refuse(request: Request) -> str:
    if request.images and not request.classes:
        return "zero_shot of pictures needs --classes=FILE, the name of a class on each line"
    return ""


METRICS = {"zero_shot": ModelMetric(_measure, needs_clip=True, refuse=_refuse)}

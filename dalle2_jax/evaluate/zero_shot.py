"""Zero-shot classification: which class's prompt does CLIP find nearest to a picture? (arXiv:2103.00020, 3.1)

A class is the mean of the unit text embeddings of its name in several templates, of unit norm again.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data import scenes
from dalle2_jax.runtime import files

TEMPLATES = ("{}", "a {}", "one {}")


def class_embeddings(
    encode_text: Callable[[list[str]], np.ndarray],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> np.ndarray:
    """[C, E] unit vectors of the classes `names`; encode_text gives [N, E] of N texts."""
    embeds = np.asarray(encode_text([t.format(name) for name in names for t in templates]), np.float64)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    means = embeds.reshape(len(names), len(templates), -1).mean(axis=1)
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def accuracy(
    image_embed: np.ndarray, classes: np.ndarray, labels: Sequence[int], top: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of pictures [N, E] whose label is among the `top` nearest of classes [C, E], and their number."""
    ranked = np.argsort(-(np.asarray(image_embed) @ np.asarray(classes).T), axis=1, kind="stable")
    found = ranked == np.asarray(labels)[:, None]
    return {"n": len(found), "classes": len(classes)} | {
        f"top{k}": float(found[:, :k].any(axis=1).mean()) for k in top if k < len(classes)
    }


def labels(captions: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The number [N] of the one class that each caption names, -1 for none or several; see `label_of`.

    Raises ValueError where no caption names exactly one.
    """
    from dalle2_jax.data.pipeline import label_of

    found = np.array([label_of(caption, names) for caption in captions])
    if not (found >= 0).any():
        raise ValueError(f"no caption names exactly one of the {len(names)} classes, such as {names[0]!r}")
    return found


def _lines(path: str | os.PathLike) -> list[str]:
    """The lines of a file that are not blank."""
    return [line.strip() for line in files.read_text(path).splitlines() if line.strip()]


def read_names(path: str | os.PathLike) -> list[str]:
    """The classes of a file, one a line. Raises ValueError for fewer than two, and for a repeated one."""
    names = _lines(path)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path} must hold at least two classes, one a line, none twice")
    return names


def read_templates(path: str | os.PathLike) -> list[str]:
    """The templates of a file, one a line, each with {} where the class goes; ValueError for others."""
    found = _lines(path)
    for template in found:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise ValueError(
                f"template {template!r} of {path} must hold {{}} once, as in 'a photo of a {{}}'"
            )
    if not found:
        raise ValueError(f"{path} holds no template, such as 'a photo of a {{}}'")
    return found


def single_objects(
    config: scenes.SceneConfig, count: int, seed: int = 0
) -> tuple[list[scenes.Scene], list[str], list[int]]:
    """(`count` unseen scenes of one object, the names of all classes 'colour shape', each scene's class)."""
    names = [f"{colour} {shape}" for colour in config.colours for shape in config.shapes]
    splits, chosen = ("validation", "test_pairs"), []
    for i in range(100 * count):
        scene = scenes.sample_scene(config, splits[i % 2], i // 2, seed)
        if len(scene.objects) == 1:
            chosen.append(scene)
        if len(chosen) == count:
            break
    labels = [names.index(f"{s.objects[0].colour} {s.objects[0].shape}") for s in chosen]
    return chosen, names, labels

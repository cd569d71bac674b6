"""Which captions a model draws so that its pictures can be compared with others."""

from collections.abc import Sequence

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.data.pipeline import label_of
from dalle2_jax.evaluate.fidelity import Stats, pictures_of
from dalle2_jax.evaluate.picture_sets import PictureSet
from dalle2_jax.systems.cascade import GUIDES


def some_captions(pictures: PictureSet, n: int, seed: int) -> list[str]:
    """The captions of `n` of the pictures, drawn at random, in their order; of all if there are no more."""
    texts = pictures.captions()
    if n < len(texts):
        rows = np.sort(np.random.default_rng(seed).choice(len(texts), n, replace=False))
        texts = [texts[row] for row in rows]
    return texts


def has_clip(model: pipeline.UnCLIP) -> bool:
    """Whether the model directory holds a CLIP."""
    return "clip" in model.engine.stages


def reads_text(model: pipeline.UnCLIP) -> bool:
    """Whether the model draws what a caption says, and not only the class that it names."""
    stages = model.engine.stages.items()
    return any(getattr(stage, "context_length", None) for name, stage in stages if name not in GUIDES)


def what_to_draw(
    model: pipeline.UnCLIP, target: PictureSet | Stats | None, n: int, seed: int = 0
) -> tuple[list[str], list[int] | None]:
    """(at most `n` captions to draw, the numbers of their pictures) for a comparison with `target`.

    A model that reads text draws captions of the target, and None stands for the numbers. One of classes
    draws their names in turn, unless the target's captions name classes; one of neither draws `n` pictures.

    Raises ValueError for a model that reads text where the target has no captions.
    """
    stages, pictures = model.engine.stages, pictures_of(target)
    if reads_text(model):
        if pictures is None:
            raise ValueError("statistics have no captions: give --images, or pictures with captions")
        return some_captions(pictures, n, seed), None
    texts = some_captions(pictures, n, seed) if pictures is not None and pictures.texts else []
    told = [name for name, stage in stages.items() if getattr(stage, "num_classes", 0) and name not in GUIDES]
    if told:
        classes = model.engine.configs[told[0]]["data"]["classes"]
        if min((label_of(text, classes) for text in texts), default=-1) < 0:
            texts = _class_captions(told[0], classes, n, seed)
    texts = texts or ["a picture"] * n
    return texts, list(range(len(texts)))


def _class_captions(stage: str, names: Sequence[str], n: int, seed: int) -> list[str]:
    """The names of a stage's classes, `n` in all, each as often as the others or once more."""
    known = [name for i, name in enumerate(names) if label_of(name, names) == i]
    if not known:
        raise ValueError(f"no class of the {stage} can be drawn by its name, such as {names[0]!r}")
    if len(known) < len(names):
        lost = next(name for i, name in enumerate(names) if label_of(name, names) != i)
        print(
            f"note: {len(names) - len(known)} classes have the name of another, such as {lost!r}", flush=True
        )
    draw = np.random.default_rng(seed)
    turns = np.concatenate([draw.permutation(len(known)) for _ in range(-(-n // len(known)))])
    print(f"drawing {n} pictures of the {len(known)} classes of the {stage}, in turn", flush=True)
    return [known[i] for i in turns[:n]]

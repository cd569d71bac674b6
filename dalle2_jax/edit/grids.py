"""The grid of an edit: what it began with, then the pictures, each labelled by what sets it apart."""

from collections.abc import Mapping

import numpy as np

from dalle2_jax.generate.output import Source
from dalle2_jax.generate.pictures import square_mask, square_picture, whole_picture
from dalle2_jax.generate.pipeline import Pipeline, Result

TINT = np.array([255, 0, 255])  # of the pixels that inpainting draws anew


def source_of(
    pipe: Pipeline, action: str, inputs: Mapping, result: Result, settings: Mapping, fit: str
) -> Source | None:
    """The first cells of the grid of an action, and labels of its pictures; None for an action on latents.

    inputs: see `actions.INPUTS`. settings: keywords that the action was given, for the labels.
    """
    found = {"first": "from", "picture": "source", "second": "to"}
    pictures = [(label, inputs[name]) for name, label in found.items() if name in inputs]
    pictures += [(f"source {i}", picture) for i, picture in enumerate(inputs.get("pictures", ()), 1)]
    shown = [(label, picture) for label, picture in pictures if not isinstance(picture, str)]
    if not shown:
        return None
    images = [square_picture(picture, pipe.image_size, fit) for _, picture in shown]
    labels = [label for label, _ in shown]
    if "mask" in inputs:
        size = whole_picture(inputs["picture"]).shape[1::-1]
        drawn = square_mask(inputs["mask"], pipe.image_size, size, fit)[..., None]
        images[0] = np.where(drawn, (images[0] // 2 + TINT // 2), images[0]).astype(np.uint8)
        labels[0] = "source; pink is drawn anew"
    if action == "textdiff" and settings.get("source"):
        labels[0] = f"source: {settings['source']}"
    return Source(np.stack(images), labels, _labels(action, inputs, result, settings))


def _labels(action: str, inputs: Mapping, result: Result, settings: Mapping) -> list[str]:
    """What sets each picture of an action apart."""
    captions = list(result.captions)
    if action == "interpolate":
        captions = [f"{caption.removeprefix('theta ')} of the way" for caption in captions]
        for i, name in ((0, "first"), (-1, "second")):
            captions[i] += f": {inputs[name]}" if isinstance(inputs[name], str) else ""
    elif action == "textdiff":
        captions[-1] += f": {inputs['target']}"
    elif action == "invert":
        captions = [f"from the latents of {i}" for i in range(1, len(captions) + 1)]
    elif action != "reconstruct":
        told = [f"{name} {settings[name]}" for name in ("strength", "eta", "resample") if settings.get(name)]
        more = "".join(f", {setting}" for setting in told)
        captions = [f"{number + 1}: {c}{more}" for c, number in zip(captions, result.numbers, strict=True)]
    return captions

"""Named protocols of FID: how pictures are prepared for Inception. FIDs of two protocols are not comparable.

`square` is applied first, to images and reference alike; then `rule`, one of `inception.RULES`, resizes to
299 x 299. Papers' protocols for zero-shot FID-30K on MS-COCO differ in both, and in the compared sets, which
the user chooses: see docs/evaluation.md.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from dalle2_jax.data import transforms

COCO_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Preset:
    """A protocol. what: `square` in words."""

    square: Callable[[np.ndarray], np.ndarray]
    what: str
    rule: str


def _resized(picture: np.ndarray, size: int, filter_: Image.Resampling) -> np.ndarray:
    same = picture.shape[:2] == (size, size)
    return picture if same else np.asarray(Image.fromarray(picture).resize((size, size), filter_))


def _central(picture: np.ndarray, size: int, filter_: Image.Resampling) -> np.ndarray:
    """The central square of the shorter side, resized once."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resized(picture[top : top + side, left : left + side], size, filter_)


PRESETS = {
    "ttur": Preset(lambda picture: picture, "as it is", "tf1"),
    "clean": Preset(lambda picture: picture, "as it is", "clean"),
    "pytorch_fid": Preset(lambda picture: picture, "as it is", "torch"),
    "imagen": Preset(
        lambda picture: _central(picture, COCO_SIZE, Image.Resampling.BICUBIC),
        "central square, bicubic to 256",
        "tf1",
    ),
    "openai": Preset(
        lambda picture: np.asarray(transforms.square(Image.fromarray(picture), COCO_SIZE, round_twice=True)),
        "halved with a box filter, bicubic to 256, central square",
        "tf1",
    ),
    "karlo": Preset(
        lambda picture: np.asarray(transforms.square(Image.fromarray(picture), COCO_SIZE, halve=False)),
        "shorter side bicubic to 256, central square",
        "tf1",
    ),
    "gigagan": Preset(
        lambda picture: _central(picture, COCO_SIZE, Image.Resampling.LANCZOS),
        "central square, Lanczos to 256",
        "clean",
    ),
    "t2ibench": Preset(
        lambda picture: _central(picture, 299, Image.Resampling.BICUBIC),
        "central square, bicubic to 299",
        "torch",
    ),
    "mlperf": Preset(
        lambda picture: _resized(picture, 512, Image.Resampling.BICUBIC),
        "squashed to 512 x 512, bicubic",
        "torch",
    ),
}

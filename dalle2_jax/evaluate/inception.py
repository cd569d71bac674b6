"""How pictures are prepared for FID's Inception, and its features.

A picture of any size is resized to 299 x 299 by one of three different rules: FID is comparable only between
numbers of one rule (arXiv:2104.11222). `convert.inception_weights` has the weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle2_jax.models.nets import inception


def bilinear(picture: np.ndarray, size: int, half_pixel: bool = False) -> np.ndarray:
    """Bilinear resizing without antialiasing, uint8 or float [H, W, C] -> float32 [size, size, C].

    Output position i reads input position i H / size, as in TensorFlow 1; with `half_pixel`
    (i + 1/2) H / size - 1/2, as in torch.
    """
    picture = np.asarray(picture, np.float32)
    for axis in (1, 0):
        low, high, share = _positions(picture.shape[axis], size, half_pixel)
        share = share[:, None] if axis == 1 else share[:, None, None]
        first, second = np.take(picture, low, axis), np.take(picture, high, axis)
        picture = first + (second - first) * share
    return picture


@functools.lru_cache(64)
def _positions(length: int, size: int, half_pixel: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower neighbours, upper neighbours, share of the upper) of `size` positions along `length`."""
    step = np.float32(length) / np.float32(size)
    at = np.arange(size, dtype=np.float32)
    at = np.maximum((at + np.float32(0.5)) * step - np.float32(0.5), 0) if half_pixel else at * step
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)


def bicubic(picture: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic resizing of float channels, unrounded, in 0 .. 255; [size, size, C] float32."""
    if picture.shape[:2] == (size, size):
        return np.asarray(picture, np.float32)
    channels = [Image.fromarray(channel) for channel in np.moveaxis(np.asarray(picture, np.float32), -1, 0)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.clip(np.stack(resized, axis=-1), 0, 255)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Preparation of pixels 0 .. 255: `resize`, then (x - centre) / centre. what: the resizing in words."""

    what: str
    resize: Callable[[np.ndarray, int], np.ndarray]
    centre: float


RULES = {
    "tf1": Rule("TensorFlow 1's bilinear, no antialiasing, grid i * in / out", bilinear, 128.0),
    "clean": Rule("bicubic with antialiasing on float channels, cut to 0 .. 255", bicubic, 128.0),
    "torch": Rule(
        "torch's bilinear, half-pixel grid, no antialiasing",
        functools.partial(bilinear, half_pixel=True),
        127.5,
    ),
}


def prepare(picture: np.ndarray, rule: str = "tf1") -> np.ndarray:
    """uint8 [H, W, 3] -> the network's input float32 [299, 299, 3], by one of RULES."""
    chosen = RULES[rule]
    centre = np.float32(chosen.centre)
    return (chosen.resize(picture, inception.IMAGE_SIZE) - centre) / centre


def features(params: dict, image: jax.Array) -> Any:
    """Features by name of prepared pictures [B, 299, 299, 3]; a function to compile."""
    return inception.Inception().apply({"params": params}, image)

"""The types of metrics: their needs, the function that computes them, the form of their numbers.

A picture metric compares features of pictures with those of a reference or of captions. Its function returns
entries by name,

    {value, standard_error, interval, ...}

with a 95 % interval: value +- 1.96 standard errors, or Wilson's for a share (Wilson 1927). For a share
p = k / n of independent pictures that is the range of q with p within z standard deviations
sqrt(q (1 - q) / n) of q,

    (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),      z = 1.96 for 95 %

A model metric measures a model, or its CLIP, on scenes or on captioned pictures.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import drawing
from dalle2_jax.evaluate.networks import Networks
from dalle2_jax.evaluate.picture_sets import PictureSet
from dalle2_jax.evaluate.reference import Stats


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: the flags of the command.

    Attributes:
      metrics: names in `metrics.METRICS`; empty: those that the other attributes permit.
      images, reference: pictures, see `picture_sets.open_pictures` and `reference.open_reference`.
      inception, preset, aesthetic: see `Networks`.
      classes, templates: files for zero_shot, see `metrics.zero_shot`.
      scenes: grammar of the captions; None: the one that the model was trained on.
      n: captions to draw. seed: of captions and pictures. batch_size: pictures at a time.
      bpd_steps: steps of the bound of bpd; 0: all.
      settings: keywords of `UnCLIP.text_to_image`.
      out: folder that all processes see, for drawn pictures.
      npz_out: npz file for the images after the preset's square crop.
      stats_out: npz file for mean and covariance of the images' Inception features.
    """

    metrics: tuple[str, ...] = ()
    images: str | None = None
    reference: str | None = None
    inception: str | None = None
    preset: str = "ttur"
    aesthetic: str | None = None
    classes: str | None = None
    templates: str | None = None
    scenes: str | None = None
    n: int = 128
    seed: int = 0
    batch_size: int | None = None
    bpd_steps: int = 0
    settings: dict = dataclasses.field(default_factory=dict)
    out: str = "evaluation"
    npz_out: str | None = None
    stats_out: str | None = None


@dataclasses.dataclass
class Inputs:
    """The inputs of a model metric.

    Attributes:
      model: the measured model. networks: they read pictures.
      out: folder for the grids of this process.
      images, reference: the opened `request.images` and `request.reference`.
      drawn: the pictures that a model metric drew.
    """

    model: pipeline.Pipeline
    request: Request
    networks: Networks
    out: epath.Path
    images: PictureSet | None = None
    reference: PictureSet | Stats | None = None
    drawn: PictureSet | None = None

    @functools.cached_property
    def scenes(self) -> tuple[scenes.SceneConfig, int]:
        """(grammar, side of the pictures) of the scenes to measure on; see `drawing.scenes_of`."""
        return drawing.scenes_of(self.model, self.request.scenes)


@dataclasses.dataclass(frozen=True)
class Features:
    """The inputs of a picture metric.

    Attributes:
      images: features [N, D] of the pictures.
      reference: features [M, D] of the reference, or their `Moments`, or None.
      pictures, reference_pictures: the pictures, for their captions. networks: its CLIP embeds them.
      seed: of random choices of the metric.
    """

    images: np.ndarray
    reference: Any
    pictures: PictureSet
    networks: Networks
    seed: int = 0
    reference_pictures: PictureSet | None = None


@dataclasses.dataclass(frozen=True)
class PictureMetric:
    """A metric of pictures.

    Attributes:
      what: a line for reports.
      measure: (name of the metric, Features) -> entries by name.
      features: 'pool', 'spatial' or 'logits_unbiased' of Inception, 'clip', or 'classes' of a classifier.
      reference, captions: whether it needs pictures to compare with, a caption of every picture.
      beside: whether it measures the pictures of a reference, too, if there is one.
      statistics: whether mean and covariance of the reference suffice.
      head: whether it needs the aesthetic head.
      refuse: (name, fewest pictures on either side, number of images) -> why they are too few, or ''.
      write: (entries, images, reference, folder): writes pictures and lists, and takes the lists out of the
        entries; None: nothing.
    """

    what: str
    measure: Callable[[str, Features], dict[str, dict]]
    features: str = "clip"
    reference: bool = True
    captions: bool = False
    beside: bool = False
    statistics: bool = False
    head: bool = False
    refuse: Callable[[str, int, int], str] = lambda name, fewest, images: ""
    write: Callable[[dict[str, dict], PictureSet, PictureSet | None, epath.Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class ModelMetric:
    """A metric of a model.

    Attributes:
      measure: Inputs -> (JSON values, lines of text).
      needs_clip, needs_tokenizer: whether it reads the model's; a judge does not replace the CLIP.
      draws: whether it draws or edits scenes, so that --images cannot replace them.
      reads_reference: whether it measures the pictures of --reference where there are no --images.
      compare_with: Inputs -> (the captions that it draws, reference pictures for picture metrics); None:
        picture metrics do not measure its pictures.
      refuse: Request -> why it cannot be measured, or ''.
    """

    measure: Callable[[Inputs], tuple[dict, str]]
    needs_clip: bool = False
    needs_tokenizer: bool = False
    draws: bool = False
    reads_reference: bool = False
    compare_with: Callable[[Inputs], tuple[list[str], PictureSet]] | None = None
    refuse: Callable[[Request], str] = lambda request: ""


def wilson(right: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share of `right` in `count`, whole or effective numbers; (0, 1) for a count of
    0."""
    if not 0 <= right <= count:
        raise ValueError(f"{right} of {count} cannot be right")
    if count == 0:
        return 0.0, 1.0
    p, spread = right / count, z * z / count
    middle = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def entry(value: float, error: float | None, at_least: float = -math.inf, **more) -> dict:
    """The entry of a number with this standard error (None: unknown) that cannot be below `at_least`."""
    value, error = float(value), None if error is None else float(error)
    interval = None if error is None else [max(at_least, value - 1.96 * error), value + 1.96 * error]
    return {"value": value, "standard_error": error, "interval": interval} | more


def share_entry(value: float, count: int, **more) -> dict:
    """The entry of a share in 0 .. 1 of `count` pictures."""
    interval = list(wilson(round(value * count), count))
    return {"value": value, "standard_error": None, "interval": interval, "share": True} | more


def share_by_caption(right: np.ndarray, captions: Sequence[str], **more) -> dict:
    """The entry of the share of right pictures, whose pictures of one caption are no independent samples.

    right: bool [N]. captions: of each picture. The value is the mean p of the shares p_c of the C captions.
    The interval is Wilson's for the number of independent pictures with the variance of that mean,

        N_eff = C p (1 - p) / mean of (p_c - p)^2,      C for p = 0 or 1, at most N
    """
    _, place, counts = np.unique(captions, return_inverse=True, return_counts=True)
    shares = np.bincount(place, np.asarray(right, np.float64)) / counts
    p, spread, effective = float(shares.mean()), float(shares.var()), float(len(shares))
    if 0 < p < 1:
        effective = min(len(place), len(shares) * p * (1 - p) / spread) if spread else len(place)
    interval = list(wilson(p * effective, effective))
    error = math.sqrt(spread / len(shares))
    found = {"value": p, "standard_error": error, "interval": interval, "share": True}
    return found | {"n": len(place), "captions": len(shares)} | more

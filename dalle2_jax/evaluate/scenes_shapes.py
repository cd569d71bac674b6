"""Which of eight shapes a soft mask shows: matching against masks that this file draws itself, as polygons.

A mask is brought to a standard position and size with its own moments: its centroid goes to the middle of
a GRID x GRID picture and its root-mean-square radius becomes GRID / (2 REACH) pixels. Templates are drawn in
several proportions (thin and fat stars, narrow and wide rings, ...), blurred by several widths and
standardised in the same way, so that a blurred star is compared with blurred stars. The answer is the
template whose mask has the highest cosine with the examined mask.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

GRID = 32
REACH = 2.2  # half the grid's side, in root-mean-square radii; the tips of a star are at about 2
BLURS = (0.0, 0.15, 0.28, 0.4)  # in root-mean-square radii
_CANVAS = 192


def _polygon(points) -> np.ndarray:
    """A filled polygon, float32 mask in [0, 1]; points (x right, y down), the shape's size is about 1."""
    scale, centre = 0.4 * _CANVAS * 4, _CANVAS * 2
    canvas = Image.new("L", (_CANVAS * 4, _CANVAS * 4))
    ImageDraw.Draw(canvas).polygon([(centre + scale * x, centre + scale * y) for x, y in points], fill=255)
    return np.asarray(canvas.resize((_CANVAS, _CANVAS), Image.Resampling.BOX), np.float32) / 255


def _box(width: float, height: float) -> np.ndarray:
    x, y = width / 2, height / 2
    return _polygon([(-x, -y), (x, -y), (x, y), (-x, y)])


def _around(count: int, *radii: float):
    """`count` points around the centre, evenly, from the top clockwise, with these radii in turn."""
    return [
        (radii[k % len(radii)] * math.sin(angle), -radii[k % len(radii)] * math.cos(angle))
        for k, angle in enumerate(2 * math.pi * np.arange(count) / count)
    ]


def _curved_heart():
    """The curve x = 16 sin^3 s, y = 13 cos s - 5 cos 2s - 2 cos 3s - cos 4s (upwards)."""
    s = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    y = 13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)
    return list(zip(0.5 * np.sin(s) ** 3, -y / 32, strict=True))


def _round_heart(depth: float):
    """Half discs on the upper sides of a square on its corner; `depth` stretches its lower half."""
    angle = np.linspace(-0.75 * math.pi, 0.25 * math.pi, 40)
    radius, middle = 0.5 / math.sqrt(2) / 1.2, 0.25 / 1.2
    right = [(middle + radius * math.cos(a), -middle + radius * math.sin(a)) for a in angle]
    right = [(x, y) for x, y in right if x >= 0]
    return [*right, (0, 0.5 / 1.2 * depth), *[(-x, y) for x, y in reversed(right)]]


def _masks():
    """(shape, mask) in several proportions each."""
    disc = _polygon(_around(90, 0.5))
    yield "circle", disc
    yield "square", _box(1, 1)
    for height in (0.8, 0.9, 1.0):
        yield "triangle", _polygon([(0, -height / 2), (0.5, height / 2), (-0.5, height / 2)])
    for notch in (0.39, 0.46, 0.53):
        yield "star", _polygon(_around(10, 0.5, 0.5 * notch))
    for hole in (0.4, 0.5, 0.6, 0.7):
        yield "ring", disc - _polygon(_around(90, 0.5 * hole))
    for arm in (0.27, 0.34, 0.41):
        yield "cross", np.maximum(_box(1, arm), _box(arm, 1))
    yield "heart", _polygon(_curved_heart())
    for depth in (0.95, 1.1):
        yield "heart", _polygon(_round_heart(depth))
    for width in (0.6, 0.72, 0.85, 1.0):
        yield "diamond", _polygon(_around(4, 0.5, width / 2))


def standardise(mask: np.ndarray) -> np.ndarray | None:
    """A mask float [H, W] in [0, 1] at its standard place and size, unit norm [GRID^2]; None if empty."""
    total = mask.sum()
    if total < 1e-3:
        return None
    h, w = mask.shape
    ys, xs = np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32)
    rows, columns = mask.sum(1), mask.sum(0)
    y, x = (rows * ys).sum() / total, (columns * xs).sum() / total
    variance = (rows * (ys - y) ** 2).sum() / total + (columns * (xs - x) ** 2).sum() / total
    step = 2 * REACH * math.sqrt(max(variance, 1e-3)) / GRID
    # Linear interpolation by two small matrices: the grid is axis-parallel, so it is separable.
    offsets = (np.arange(GRID) - (GRID - 1) / 2) * step
    picked = _hat(y + offsets, h) @ mask @ _hat(x + offsets, w).T
    norm = np.linalg.norm(picked)
    return (picked / norm).ravel() if norm > 1e-6 else None


def _hat(positions: np.ndarray, length: int) -> np.ndarray:
    """Rows of linear-interpolation weights at the positions, averaging over a step where that is wider."""
    width = max(1.0, float(positions[1] - positions[0]))
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(length)) / width)
    return (weights / width).astype(np.float32)


@functools.cache
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    names, rows = [], []
    for name, mask in _masks():
        total = mask.sum()
        y, x = np.indices(mask.shape)
        cy, cx = (mask * y).sum() / total, (mask * x).sum() / total
        radius = math.sqrt((mask * ((y - cy) ** 2 + (x - cx) ** 2)).sum() / total)
        for blur in BLURS:
            row = standardise(ndimage.gaussian_filter(mask, blur * radius))
            assert row is not None  # no template is empty
            names.append(name)
            rows.append(row)
    return tuple(names), np.stack(rows)


def classify(mask: np.ndarray) -> tuple[str | None, float, float]:
    """The shape of a mask float [H, W] in [0, 1].

    Returns:
      (shape, match, margin): the shape of the best template, the cosine with it, and by how much the best
      template of any other shape falls short of that. (None, 0.0, 0.0) for an empty mask.
    """
    row = standardise(mask)
    if row is None:
        return None, 0.0, 0.0
    names, rows = _templates()
    scores = rows @ row
    best = int(np.argmax(scores))
    others = max(score for name, score in zip(names, scores, strict=True) if name != names[best])
    return names[best], float(scores[best]), float(scores[best] - others)

"""The checker: whether a picture of a scene matches its caption, from pixels alone.

It shares no code and no table with the renderer: `scenes_parser` reads the caption, this file finds the
objects, and `scenes_shapes` names their shapes. A picture is I = b + a (c - b) at every pixel, with
background b, an object's colour c and its coverage a in [0, 1]; antialiasing, blur and upsampling change a,
not the direction of I - b. So

1. b is the commonest colour of the border;
2. pixels away from b are sorted by the direction of I - b, which separates objects of different colours;
3. each object is a connected region with a > 1/2, c being the colour deep inside it;
4. its colour is the nearest prototype in CIELAB, its shape that of the best-matching template;
5. named objects are matched with those found; relations compare centroids: above means higher, and farther
   apart vertically than horizontally.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from dalle2_jax.evaluate import scenes_parser, scenes_shapes

COLOURS = {
    "red": (222, 36, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 222, 40),
    "green": (36, 160, 60),
    "cyan": (40, 205, 220),
    "blue": (30, 86, 228),
    "purple": (158, 36, 188),
    "pink": (255, 150, 200),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "brown": (104, 70, 44)}

SIDE = 128  # working size
FAINT = 36.0  # pixels nearer to the background in RGB belong to it
# Directions closer than this are one colour; the closest two colours (orange and yellow on black) are 12.6
# degrees apart.
SAME_COLOUR = math.radians(8)
SPECK = 0.0022  # smallest object, fraction of the picture's area
THIN = 2  # working pixels: a region nowhere deeper than this is the fringe between two blurred objects
LARGEST_COLOUR_ERROR = 40.0  # in CIELAB; a colour farther from every prototype has no name
# A shape has a name if it looks almost exactly like a template, or fairly like one and clearly less like any
# other shape: a wobbly cross is a cross, something between a star and a disc is neither.
ALMOST_EXACT = 0.985
LEAST_MATCH, LEAST_MARGIN = 0.92, 0.015
# Weights of the aspects when named objects are matched with those of the picture.
WEIGHTS = {"colour": 1, "shape": 1, "relation": 0.5, "size": 0.1, "place": 0.1}


@dataclasses.dataclass(frozen=True)
class Found:
    """An object in a picture: names (None: nothing fits), centroid, larger side of its box in [0, 1]."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    extent: float
    match: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The aspects of a picture that are right; None for an aspect that the caption does not name.

    Attributes:
      objects_found: every object of the picture.
      background_found: name of the background, or None if the border has no one colour.
      colour, shape: every named object has a partner in the picture of the right colour, of the right shape.
      relation: every relation holds between the partners.
      count: the picture holds exactly the named objects.
      background, size, place: as named.
      correct: all of these at once.
    """

    objects_found: tuple[Found, ...]
    background_found: str | None
    colour: bool
    shape: bool
    relation: bool | None
    count: bool
    background: bool | None
    size: bool | None
    place: bool | None

    @property
    def correct(self) -> bool:
        """Whether every named aspect is right."""
        aspects = (self.colour, self.shape, self.relation, self.count, self.background, self.size, self.place)
        return all(aspect is not False for aspect in aspects)

    @property
    def color(self) -> bool:
        """`colour`, in the other spelling."""
        return self.colour

    @property
    def all(self) -> bool:
        """`correct`, under another name."""
        return self.correct


def _lab(rgb) -> np.ndarray:
    """sRGB [..., 3] in 0..255 to CIELAB (D65)."""
    c = np.clip(np.asarray(rgb, np.float64) / 255, 0, 1)
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@functools.cache
def _prototypes(kind: str) -> tuple[tuple[str, ...], np.ndarray]:
    table = COLOURS if kind == "colour" else BACKGROUNDS
    return tuple(table), _lab(list(table.values()))


def _name(rgb, kind: str) -> str | None:
    """The nearest prototype to any of the colours rgb [..., 3], or None if all are far."""
    names, prototypes = _prototypes(kind)
    distance = np.linalg.norm(_lab(rgb).reshape(-1, 1, 3) - prototypes, axis=-1).min(0)
    best = int(np.argmin(distance))
    return names[best] if distance[best] <= LARGEST_COLOUR_ERROR else None


def _working_picture(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [SIDE, SIDE, 3], noise smoothed away."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 8:
        raise ValueError(f"image must be uint8 [H, W, 3], 8 x 8 or more, not {image.dtype} {image.shape}")
    if image.shape[:2] != (SIDE, SIDE):
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    picture = image.astype(np.float32)
    if _roughness(picture) > 2:
        picture = ndimage.gaussian_filter(picture, (1.2, 1.2, 0))
        if _roughness(picture[:, ::4]) > 6:
            picture = ndimage.gaussian_filter(picture, (1.2, 1.2, 0))
    return picture


def _roughness(picture: np.ndarray) -> float:
    """Median second difference along rows: the level of noise; 0 in a clean drawing, most of it is flat."""
    return float(np.median(np.abs(picture[:, 2:] - 2 * picture[:, 1:-1] + picture[:, :-2])))


def _background(picture: np.ndarray) -> np.ndarray | None:
    """The commonest colour [3] of the border, or None if less than half of it is alike."""
    border = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3)])
    border = np.concatenate([border, picture[3:-3, :3].reshape(-1, 3), picture[3:-3, -3:].reshape(-1, 3)])
    codes = (border // 32).astype(np.int64) @ np.array([64, 8, 1])
    colour = border[codes == np.argmax(np.bincount(codes))].mean(0)
    for _ in range(2):
        close = np.linalg.norm(border - colour, axis=1) < FAINT
        if close.mean() < 0.5:
            return None
        colour = border[close].mean(0)
    return colour


def _directions(offsets: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Unit directions [K, 3] of the colours present among offsets I - b [N, 3] from the background."""
    prototypes = np.array(list(COLOURS.values()), np.float32) - background
    # The background itself may be red: that prototype has no direction, and gets no pixels.
    means = prototypes / np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-3)
    # Strong pixels count for more: weak ones are edges, where noise and neighbours turn the direction.
    weighted = offsets * np.linalg.norm(offsets, axis=1, keepdims=True)
    for _ in range(3):
        label = np.argmax(offsets @ means.T, 1)
        sums = np.stack([weighted[label == k].sum(0) for k in range(len(means))])
        weights = np.linalg.norm(sums, axis=1)
        keep = weights > 1e-3 * weights.sum()
        means, weights = sums[keep] / weights[keep, None], weights[keep]
        # One colour between two prototypes was dealt to both: join the closest two while they are close.
        while len(means) > 1:
            cosine = means @ means.T - 2 * np.eye(len(means))
            i, j = np.unravel_index(np.argmax(cosine), cosine.shape)
            if cosine[i, j] < math.cos(SAME_COLOUR):
                break
            joined = means[i] * weights[i] + means[j] * weights[j]
            means[i], weights[i] = joined / np.linalg.norm(joined), weights[i] + weights[j]
            means, weights = np.delete(means, j, 0), np.delete(weights, j)
    return means


def _measure(picture, background, region, allowed) -> Found:
    """One object in a window: `region` [h, w] is its mask a > 1/2, `allowed` the pixels it may reach."""
    offset = picture - background
    strength = np.sqrt((offset * offset).sum(-1))
    deep = region & (strength >= np.quantile(strength[region], 0.6))
    colour = np.median(picture[deep], 0)
    ray = colour - background
    coverage = np.clip(offset @ ray / (ray @ ray), 0, 1) * allowed
    shape, match, margin = scenes_shapes.classify(coverage)
    clear = match >= ALMOST_EXACT or (match >= LEAST_MATCH and margin >= LEAST_MARGIN)
    ys, xs = np.nonzero(region)
    # A thin object that was blurred never reaches its own colour: the colour may lie farther along the ray.
    candidates = background + ray * np.linspace(1, 1.25, 6)[:, None]
    return Found(
        colour=_name(candidates, "colour"),
        shape=shape if clear else None,
        x=float(xs.mean() + 0.5) / SIDE,
        y=float(ys.mean() + 0.5) / SIDE,
        extent=float(max(np.ptp(xs), np.ptp(ys)) + 1) / SIDE,
        match=match,
    )


def find_objects(image: np.ndarray) -> tuple[tuple[Found, ...], str | None]:
    """Every object in a picture uint8 [H, W, 3], and the name of its background (None if it has none)."""
    picture = _working_picture(image)
    background = _background(picture)
    if background is None:
        return (), None
    background_name = _name(background, "background")
    offset = picture - background
    strength = np.sqrt((offset * offset).sum(-1))
    foreground = strength > FAINT
    if not foreground.any():
        return (), background_name
    means = _directions(offset[foreground], background)
    label = np.argmax(offset @ means.T, -1)
    found = []
    for k in range(len(means)):
        parts, _ = ndimage.label(foreground & (label == k))
        for index, window in enumerate(ndimage.find_objects(parts)):
            part = parts[window] == index + 1
            if part.sum() < SPECK * SIDE**2:
                continue
            for region, allowed in _split(part, strength[window]):
                thing = _measure(picture[window], background, region, allowed)
                rows, columns = window
                thing = dataclasses.replace(
                    thing, x=thing.x + columns.start / SIDE, y=thing.y + rows.start / SIDE
                )
                found.append(thing)
    return tuple(found), background_name


def is_legal(image: np.ndarray) -> bool:
    """Whether a picture uint8 [H, W, 3] is a scene of any caption: one or two objects, all of a named colour
    and shape, on a background with a name."""
    found, background = find_objects(image)
    named = all(thing.colour and thing.shape for thing in found)
    return background is not None and 1 <= len(found) <= 2 and named


def _split(part: np.ndarray, strength: np.ndarray):
    """The objects in one connected part of one colour: (mask a > 1/2, pixels it may reach) of each."""
    top = np.quantile(strength[part], 0.9)
    regions, count = ndimage.label(part & (strength > top / 2))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    keep = [
        r
        for r in range(1, count + 1)
        if sizes[r] >= SPECK * SIDE**2
        and ndimage.distance_transform_cdt(np.pad(regions == r, 1)).max() > THIN
    ]
    if len(keep) < 2:
        return [(regions == r, part) for r in keep]
    # Halos that meet: each pixel goes to the nearest of the objects.
    nearest = ndimage.distance_transform_edt(
        ~np.isin(regions, keep), return_distances=False, return_indices=True
    )
    owner = regions[tuple(nearest)]
    return [(regions == r, part & (owner == r)) for r in keep]


def _holds(a: Found, relation: str, b: Found) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    if relation in ("above", "below"):
        return abs(dy) >= abs(dx) and (dy > 0) == (relation == "above")
    return abs(dx) >= abs(dy) and (dx > 0) == (relation == "left of")


def _in_place(thing: Found, place: str) -> bool:
    tests = {
        "left": thing.x < 0.42,
        "right": thing.x > 0.58,
        "top": thing.y < 0.42,
        "bottom": thing.y > 0.58,
        "centre": max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.14,
    }
    return all(tests[word] for word in place.split())


def _size_name(thing: Found) -> str:
    return "small" if thing.extent < 0.187 else "medium" if thing.extent < 0.274 else "large"


def check(image: np.ndarray, caption: str) -> Verdict:
    """Compare a picture uint8 [H, W, 3] of 16 to 1024 pixels with its English caption.

    Named objects are matched with objects of the picture so that as much as possible is right. With an object
    missing, `colour` and `shape` are false; with one too many, `count` alone is.

    Raises:
      ValueError: the caption has a word or a form that `scenes_parser` does not know.
    """
    facts = scenes_parser.parse(caption)
    found, background = find_objects(image)
    partners = itertools.permutations(found, len(facts.objects)) if len(found) <= 6 else ()
    best = max((_compare(facts, order) for order in partners), key=_score, default=None)
    if best is None:  # no object of the picture matches
        nothing = [Found(None, None, 0, 0, 0, 0)] * len(facts.objects)
        best = {aspect: [False] * len(values) for aspect, values in _compare(facts, nothing).items()}
    verdicts: dict[str, Any] = {aspect: all(right) if right else None for aspect, right in best.items()}
    return Verdict(
        objects_found=found,
        background_found=background,
        count=len(found) == len(facts.objects),
        background=background == facts.background if facts.background else None,
        **verdicts,
    )


def _compare(facts: scenes_parser.Facts, order: Sequence[Found]) -> dict[str, list[bool]]:
    """Aspect -> which are right, with `order` as the objects of the picture that match the named ones."""
    pairs = list(zip(facts.objects, order, strict=True))
    return {
        "colour": [named.colour in (None, thing.colour) for named, thing in pairs],
        "shape": [named.shape == thing.shape for named, thing in pairs],
        "relation": [_holds(order[i], relation, order[j]) for i, relation, j in facts.relations],
        "size": [named.size == _size_name(thing) for named, thing in pairs if named.size],
        "place": [_in_place(thing, named.place) for named, thing in pairs if named.place],
    }


def _score(right: dict[str, list[bool]]) -> float:
    """How well a match of objects fits the caption."""
    return sum(weight * sum(right[aspect]) for aspect, weight in WEIGHTS.items())

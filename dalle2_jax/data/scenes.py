"""Captioned drawings of coloured shapes: the grammar, the splits and the renderer.

A scene holds one to three objects, each with a colour, a shape, a size and a place, on a plain background.
Neighbours in `Scene.objects` stand in a named relation (above, below, left of, right of) that is
geometrically unmistakable: with diameters d_a and d_b in fractions of the picture's side,

    |offset along the relation's axis| >= (d_a + d_b) / 2 + gap,
    |offset across it| <= lean * |offset along it|.

Scene number `index` of a split is a pure function of (config, split, index, seed), drawn with integer
arithmetic (splitmix64): the same on every machine and with every version of numpy. Shapes are signed
distances in relative coordinates, so the 16-pixel and the 256-pixel picture of one scene are the same
picture.

A colour-shape pair is held out if it is in `HELD_OUT_PAIRS`, a triple (shape, relation, shape) by the rule of
`is_held_out_triple`. `train` and `validation` have neither; every scene of `test_pairs` has a held-out pair
(and no held-out triple); every scene of `test_relations` is two objects in a held-out triple (and no held-out
pair).
"""

import dataclasses
import math

import numpy as np

from dalle2_jax.data import scenes_captions
from dalle2_jax.data.scenes_grammar import (  # noqa: F401  (`scenes` has the grammar's names too)
    BACKGROUNDS,
    COLOURS,
    CONVERSE,
    HELD_OUT_PAIRS,
    PRESETS,
    RELATIONS,
    SHAPES,
    SPLITS,
    Scene,
    SceneConfig,
    SceneObject,
    SizeRange,
    canonical_triple,
    check_choice,
    is_held_out_triple,
    pairs,
    preset,
    triples,
)
from dalle2_jax.data.scenes_shapes import SIGNED_DISTANCE
from dalle2_jax.data.splitmix import GAMMA, MASK, mix

KINDS = ("single_seen", "single_heldout", "pair_seen", "pair_heldout_relation")


class Stream:
    """Pseudo-random numbers that are a pure function of a few integers (splitmix64, Steele et al. 2014)."""

    def __init__(self, *keys: int):
        self._state = 0
        for key in keys:
            self._state = self._next() ^ (int(key) & MASK)

    def _next(self) -> int:
        self._state = (self._state + GAMMA) & MASK
        return mix(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (self._next() >> 11) * 2.0**-53

    def choice(self, options):
        """One element of a sequence, uniformly."""
        return options[int(self.uniform() * len(options))]

    def weighted(self, weights) -> int:
        """Index i with probability weights[i] / sum(weights)."""
        left = self.uniform() * sum(weights)
        for i, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return i
        return len(weights) - 1

    def shuffled(self, options) -> list:
        """The options in random order (Fisher and Yates)."""
        out = list(options)
        for i in range(len(out) - 1, 0, -1):
            j = int(self.uniform() * (i + 1))
            out[i], out[j] = out[j], out[i]
        return out


def relations_between(a: SceneObject, b: SceneObject) -> list[str]:
    """Every visible relation of `a` to `b`: their boxes are apart on its axis."""
    apart = (a.diameter + b.diameter) / 2
    out = []
    if abs(b.y - a.y) >= apart:
        out.append("above" if a.y < b.y else "below")
    if abs(b.x - a.x) >= apart:
        out.append("left of" if a.x < b.x else "right of")
    return out


def _place(config: SceneConfig, stream: Stream, names, relations) -> tuple[SceneObject, ...] | None:
    """Draws sizes and places of a chain of objects; None: they do not fit into the picture."""
    drawn = [stream.choice(config.sizes[len(names) - 1]) for _ in names]
    diameters = [stream.uniform(size.low, size.high) for size in drawn]
    room = 1 - 2 * config.margin
    xy = [(0.0, 0.0)]
    for k, relation in enumerate(relations):
        touching = (diameters[k] + diameters[k + 1]) / 2 + config.gap
        slack = max(0.0, room - sum(diameters[k : k + 2]) - config.gap)
        along = touching + stream.uniform() * slack / len(relations)
        across = stream.uniform(-1, 1) * config.lean * along
        dx, dy = (across, along) if relation in ("above", "below") else (along, across)
        sign = 1 if relation in ("above", "left of") else -1
        xy.append((xy[-1][0] + sign * dx, xy[-1][1] + sign * dy))
    shift = []
    for axis in (0, 1):
        low = min(p[axis] - d / 2 for p, d in zip(xy, diameters, strict=True))
        high = max(p[axis] + d / 2 for p, d in zip(xy, diameters, strict=True))
        if high - low > room:
            return None
        middle = 0.5 - (low + high) / 2
        least = max(config.margin - low, middle - config.spread)
        most = min(1 - config.margin - high, middle + config.spread)
        shift.append(stream.uniform(least, most))
    objects = tuple(
        SceneObject(colour, shape, size.name, round(x + shift[0], 5), round(y + shift[1], 5), round(d, 5))
        for (colour, shape), size, (x, y), d in zip(names, drawn, xy, diameters, strict=True)
    )
    for i, a in enumerate(objects):
        for b in objects[i + 1 :]:
            apart = (a.diameter + b.diameter) / 2 + config.gap - 1e-4
            if max(abs(a.x - b.x), abs(a.y - b.y)) < apart:
                return None
    return objects


def _draw_names(config: SceneConfig, split: str, count: int, stream: Stream):
    """Draws (colour, shape) of `count` objects and the relations along the chain, by the rules of the
    split."""
    seen = pairs(config, False)
    if split == "train" and not config.hold_out:
        seen += pairs(config, True)
    if split == "test_relations":
        a, relation, b = stream.choice(triples(config, True))
        if stream.uniform() < 0.5:
            a, relation, b = b, CONVERSE[relation], a
        names = [stream.choice([pair for pair in seen if pair[1] == shape]) for shape in (a, b)]
        return names, (relation,)
    if split == "test_pairs":
        names = [stream.choice(pairs(config, True))]
        names += [stream.choice(seen + pairs(config, True)) for _ in range(count - 1)]
        names = stream.shuffled(names)
    else:
        names = [stream.choice(seen) for _ in range(count)]
    weights = config.relation_weights if split == "train" else (1.0,) * len(RELATIONS)
    return names, tuple(RELATIONS[stream.weighted(weights)] for _ in range(count - 1))


def _has_held_out_triple(objects) -> bool:
    return any(
        is_held_out_triple(a.shape, relation, b.shape)
        for i, a in enumerate(objects)
        for b in objects[i + 1 :]
        for relation in relations_between(a, b)
    )


def _fits(config: SceneConfig, split: str, objects) -> bool:
    """Whether a split may contain the triples of the objects."""
    if split == "train" and not config.hold_out:
        return True
    return _has_held_out_triple(objects) == (split == "test_relations")


def twin(config: SceneConfig, scene: Scene, stream: Stream) -> Scene | None:
    """The scene with one change to its objects; None if training may not contain it.

    Two objects exchange colours and shapes (two in five) or shapes, or one gets another shape or colour; a
    single object gets another shape or colour.
    """
    names = [(thing.colour, thing.shape) for thing in scene.objects]
    ways = ["shape", "shape", "colour"]
    if len(names) == 2:
        ways = ["exchange"] * 4 + ["shapes"] * 2 + ways + ["shape"]
    for way in stream.shuffled(ways):
        changed = list(names)
        k = int(stream.uniform() * len(names))
        if way == "exchange":
            changed = names[::-1]
        elif way == "shapes":
            changed = [(names[0][0], names[1][1]), (names[1][0], names[0][1])]
        elif way == "shape":
            changed[k] = (names[k][0], stream.choice(config.shapes))
        else:
            changed[k] = (stream.choice(config.colours), names[k][1])
        objects = tuple(
            dataclasses.replace(thing, colour=colour, shape=shape)
            for thing, (colour, shape) in zip(scene.objects, changed, strict=True)
        )
        new = changed != names and len(set(changed)) == len(changed)
        if new and set(changed) <= set(pairs(config, False)) and not _has_held_out_triple(objects):
            return dataclasses.replace(scene, objects=objects)
    return None


def sample_scene(config: SceneConfig, split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split: a pure function of its arguments.

    No two objects of a scene share both colour and shape. Held-out triples are excluded between all pairs of
    objects. Raises ValueError if `split` is not one of `SPLITS`, or no scene of `config` satisfies it.
    """
    check_choice(split, SPLITS, "split of scenes")
    if config.twins and split == "train" and index % 2:
        other = sample_scene(config, split, index - 1, seed)
        changed = twin(config, other, Stream(seed, len(SPLITS) + 1, index))
        if changed is not None:
            return changed
    if split == "test_relations" and config.max_objects < 2:
        raise ValueError(
            f"split 'test_relations' needs scenes of two objects; config {config.name!r} has one"
        )
    stream = Stream(seed, SPLITS.index(split) + 1, index)
    # Drawn once: a new draw after every rejected scene would favour scenes of few objects.
    count = 2 if split == "test_relations" else 1 + stream.weighted(config.count_weights)
    for _ in range(10_000):
        names, relations = _draw_names(config, split, count, stream)
        if len(set(names)) < len(names):
            continue
        objects = _place(config, stream, names, relations)
        if objects is None or not _fits(config, split, objects):
            continue
        return Scene(objects, relations, stream.choice(config.backgrounds), config.details)
    raise ValueError(
        f"no scene of split {split!r} fits config {config.name!r}: make the objects smaller, or allow "
        "more shapes and colours"
    )


def render(scene: Scene, image_size: int) -> np.ndarray:
    """Draws a scene, antialiased: uint8 [image_size, image_size, 3] in sRGB, image_size 8..1024.

    Coverage is 1/2 - distance, clipped to [0, 1], with distance in units of 1/256 of the side (or of a pixel,
    if that is smaller), averaged over the pixel's subsamples. So for image_size 16, 32, 64, 128 the picture
    is the area average of the 256-pixel picture up to rounding.
    """
    if not 8 <= image_size <= 1024:
        raise ValueError(f"image_size must lie in 8..1024, got {image_size}")
    sub = -(-256 // image_size)
    fine = image_size * sub
    reach = 3 / 256  # antialiasing at a sharp tip goes a little beyond the object's box
    picture = np.empty((image_size, image_size, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        spans = []
        colour = np.array(COLOURS[thing.colour], np.float32)
        for centre in (thing.x, thing.y):
            low = math.floor((centre - thing.diameter / 2 - reach) * image_size)
            high = math.ceil((centre + thing.diameter / 2 + reach) * image_size)
            spans.append((max(low, 0), min(high, image_size)))
        (x0, x1), (y0, y1) = spans
        u = ((np.arange(x0 * sub, x1 * sub, dtype=np.float32) + 0.5) / fine - thing.x) / thing.diameter
        v = ((np.arange(y0 * sub, y1 * sub, dtype=np.float32) + 0.5) / fine - thing.y) / thing.diameter
        distance = SIGNED_DISTANCE[thing.shape](u[None, :], v[:, None])
        coverage = np.clip(0.5 - distance * np.float32(fine * thing.diameter), 0, 1)
        if sub > 1:
            coverage = coverage.reshape(y1 - y0, sub, x1 - x0, sub).mean((1, 3))
        window = picture[y0:y1, x0:x1].astype(np.float32)
        window += coverage[:, :, None] * (colour - window)
        picture[y0:y1, x0:x1] = np.rint(window)
    return picture


def place_name(thing: SceneObject) -> str | None:
    """The place of an object ('centre', 'top', 'bottom left', ...); None: ambiguous."""

    def third(value, low, high):
        if 0.42 <= value <= 0.58:
            return ""
        return low if value <= 0.36 else high if value >= 0.64 else None

    vertical, horizontal = third(thing.y, "top", "bottom"), third(thing.x, "left", "right")
    if vertical is None or horizontal is None:
        return None
    return " ".join(word for word in (vertical, horizontal) if word) or "centre"


def captions(scene: Scene, language: str = "en") -> list[str]:
    """Every caption of a scene, all true of it; the first is the plain one ("a red star above a blue ring").

    Args:
      scene: the drawing; `scene.details` has the facts in captions besides objects and relations.
      language: 'en' or 'zh'.
    """
    names: list[tuple[str, str, str | None]] = [(thing.colour, thing.shape, None) for thing in scene.objects]
    background = scene.background if "background" in scene.details else None
    out = scenes_captions.phrases(names, scene.relations, background, None, language)
    sized = "size" in scene.details
    place = place_name(scene.objects[0]) if "place" in scene.details and not scene.relations else None
    if sized or place:
        names = [(thing.colour, thing.shape, thing.size if sized else None) for thing in scene.objects]
        out += scenes_captions.phrases(names, scene.relations, None, place, language)
    return list(dict.fromkeys(out))


def caption(scene: Scene, language: str = "en", index: int = 0) -> str:
    """Caption number `index` of a scene, modulo their number."""
    every = captions(scene, language)
    return every[index % len(every)]


def evaluation_captions(config: SceneConfig, kind: str, n: int, seed: int = 0) -> list[str]:
    """`n` English captions to draw for an evaluation.

    Args:
      kind: 'single_seen' (one object, its colour-shape pair occurs in training), 'single_heldout' (a held-out
        pair), 'pair_seen' (two objects; pairs and triple occur in training), 'pair_heldout_relation' (a
        held-out triple of seen pairs).
      n: every combination is used once, in random order and wording, before any is used twice; of two objects
        there are thousands. Captions repeat only when the grammar has no more.
      seed: of the order.
    """
    facts = _evaluation_facts(config, kind, n, seed)
    out, used = [], set()
    for k in range(n):
        texts = facts[k % len(facts)][-1]
        fresh = [text for text in texts if text not in used]
        out.append(fresh[0] if fresh else texts[(k // len(facts)) % len(texts)])
        used.add(out[-1])
    return out


def evaluation_scenes(config: SceneConfig, kind: str, n: int, copies: int, seed: int = 0) -> list[Scene]:
    """`copies` scenes of each caption of `evaluation_captions` with these arguments.

    Facts that a caption does not name (sizes, places, perhaps the background) are drawn as in the splits.
    """
    facts, found = _evaluation_facts(config, kind, n, seed), []
    for k in range(n):
        names, relations, background, _ = facts[k % len(facts)]
        for copy in range(copies):
            stream = Stream(seed, 2000 + KINDS.index(kind), k, copy)
            placed = (_place(config, stream, names, relations) for _ in range(10_000))
            objects = next((objects for objects in placed if objects is not None), None)
            if objects is None:
                raise ValueError(f"no scene of {names} fits config {config.name!r}: make the objects smaller")
            shown = background or stream.choice(config.backgrounds)
            found.append(Scene(objects, relations, shown, config.details))
    return found


def _evaluation_facts(config: SceneConfig, kind: str, n: int, seed: int) -> list[tuple]:
    """At most `n` different ((colour, shape) of the objects, relations, background or None, captions)."""
    check_choice(kind, KINDS, "kind of evaluation captions")
    stream = Stream(seed, 1000 + KINDS.index(kind))
    seen = pairs(config, False)
    combos: list[tuple[tuple, tuple]]
    if kind.startswith("single"):
        combos = [((pair,), ()) for pair in pairs(config, kind == "single_heldout")]
    else:
        held_out = kind == "pair_heldout_relation"
        combos = [
            ((a, b), (relation,))
            for a in seen
            for b in seen
            for relation in RELATIONS
            if a != b and is_held_out_triple(a[1], relation, b[1]) == held_out
        ]
    facts = []
    for names, relations in stream.shuffled(combos)[:n]:
        background = stream.choice(config.backgrounds) if "background" in config.details else None
        texts = scenes_captions.phrases([(*name, None) for name in names], relations, background)
        facts.append((names, relations, background, stream.shuffled(texts)))
    return facts

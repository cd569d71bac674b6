"""The grammar of `scenes`: colours, shapes, relations, presets, and the combinations held out of training."""

import dataclasses
import functools
import json

from dalle2_jax.runtime.names import nearest

# RGB of objects. Every two colours are more than 38 apart in CIELAB (the closest: blue and purple; then red,
# orange and yellow at 47), and every colour is more than 45 from every background.
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
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "brown": (104, 70, 44)}
RELATIONS = ("above", "below", "left of", "right of")
CONVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
DETAILS = ("background", "size", "place")
SPLITS = ("train", "validation", "test_pairs", "test_relations")

# One pair for each colour and one for each shape, an eighth of all 64; five of them are among the 36 of the
# preset 'quickstart'.
_HELD_OUT_SHAPES = ("ring", "heart", "star", "square", "circle", "triangle", "cross", "diamond")
HELD_OUT_PAIRS = tuple(zip(COLOURS, _HELD_OUT_SHAPES, strict=True))


def canonical_triple(shape_a: str, relation: str, shape_b: str) -> tuple[str, str, str]:
    """The same fact with `above` or `left of`: (a, below, b) is (b, above, a)."""
    if relation in ("below", "right of"):
        return shape_b, CONVERSE[relation], shape_a
    return shape_a, relation, shape_b


def is_held_out_triple(shape_a: str, relation: str, shape_b: str) -> bool:
    """Whether a relation between two shapes is held out of training.

    With i and j the places of the two shapes in `SHAPES` and r = 0 for above, 1 for left of (after
    `canonical_triple`), a triple is held out when 3 i + 7 j + 5 r = 4 (mod 10).
    """
    a, relation, b = canonical_triple(shape_a, relation, shape_b)
    code = 3 * SHAPES.index(a) + 7 * SHAPES.index(b) + 5 * (relation == "left of")
    return code % 10 == 4


def check_choice(value: str, choices, what: str) -> str:
    """`value` if it is one of `choices`, else a ValueError that names the closest one."""
    if value in choices:
        return value
    near = nearest(value, choices)
    hint = f"; did you mean {near}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}{hint} (choose from {', '.join(choices)})")


@dataclasses.dataclass(frozen=True)
class SizeRange:
    """A named range of diameters, in fractions of the picture's side."""

    name: str
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """The contents of scenes.

    Attributes:
      name: of the preset; part of the dataset's identity.
      count_weights: probability of 1, 2, 3 objects; its length is the largest number of objects.
      colours, shapes, backgrounds: names from `COLOURS`, `SHAPES`, `BACKGROUNDS`.
      sizes: for 1, 2, 3 objects the ranges a diameter is drawn from (one of them at random, then uniformly).
      details: the `DETAILS` that captions may name besides objects and relations.
      margin: least distance of an object's box from the picture's edge, fraction of the side.
      gap: least distance between two objects' boxes along the axis of their relation, fraction of the side.
      lean: largest offset across a relation's axis, as a fraction of the offset along it.
      spread: largest distance of the objects' common box from the middle of the picture along an axis,
        fraction of the side.
      twins: whether every second scene of `train` is, if possible, a `twin` of the one before it: a hard
        negative, without which a contrastive model hardly learns the order of objects.
      relation_weights: in `train`, the weight of each of `RELATIONS`. If all are equal, neither the order of
        the objects' words nor the word of their relation tells alone which object is where, and a network
        that reads captions by its own loss (GLIDE) does not learn it.
      hold_out: whether `train` leaves out held-out pairs and triples. Without, its captions are text for a
        text encoder (Imagen's T5 has read of everything); no picture of it belongs in training.
    """

    name: str
    count_weights: tuple[float, ...]
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    backgrounds: tuple[str, ...]
    sizes: tuple[tuple[SizeRange, ...], ...]
    details: tuple[str, ...] = ("background",)
    margin: float = 0.02
    gap: float = 0.06
    lean: float = 0.4
    spread: float = 1.0
    twins: bool = False
    relation_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    hold_out: bool = True

    def __post_init__(self):
        fields = dict(colours=COLOURS, shapes=SHAPES, backgrounds=BACKGROUNDS, details=DETAILS)
        for field, choices in fields.items():
            for value in getattr(self, field):
                check_choice(value, choices, f"{field} entry")
        count = len(self.count_weights)
        if not 1 <= count <= 3:
            raise ValueError(f"count_weights must have 1 to 3 entries, got {count}")
        if len(self.sizes) != count:
            raise ValueError(f"sizes must have one entry for each of {count} weights, got {len(self.sizes)}")

    @property
    def max_objects(self) -> int:
        """The largest number of objects in a scene."""
        return len(self.count_weights)


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object: names, centre (x right, y down) and diameter in fractions of the picture's side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    diameter: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A drawing: `relations[k]` says how `objects[k]` stands to `objects[k + 1]`.

    `details` are the `DETAILS` that its captions may name.
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[str, ...]
    background: str
    details: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The scene as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Scene":
        """The scene that `to_json` wrote."""
        fields = json.loads(text)
        objects = tuple(SceneObject(**entry) for entry in fields["objects"])
        return Scene(objects, tuple(fields["relations"]), fields["background"], tuple(fields["details"]))


# Objects are large and central, because the smallest cascade's base picture has 16 x 16 pixels (a ring of
# diameter 0.4 has a hole of three) and is learned in minutes.
_QUICKSTART = SceneConfig(
    name="quickstart",
    count_weights=(0.35, 0.65),
    colours=("red", "orange", "yellow", "green", "blue", "purple"),
    shapes=("circle", "square", "triangle", "star", "ring", "cross"),
    backgrounds=("white", "black", "grey"),
    sizes=((SizeRange("large", 0.6, 0.7),), (SizeRange("large", 0.42, 0.45),)),
    lean=0.1,
    spread=0.05,
    twins=True,
)
_UNEVEN = dataclasses.replace(_QUICKSTART, name="uneven", relation_weights=(0.85, 0.15, 0.85, 0.15))
_COMPLETE = dataclasses.replace(_QUICKSTART, name="complete", twins=False, hold_out=False)
_FULL_SIZES = SizeRange("small", 0.14, 0.18), SizeRange("medium", 0.22, 0.27), SizeRange("large", 0.32, 0.38)
_FULL = SceneConfig(
    name="full",
    count_weights=(0.3, 0.4, 0.3),
    colours=tuple(COLOURS),
    shapes=SHAPES,
    backgrounds=tuple(BACKGROUNDS),
    sizes=(_FULL_SIZES,) * 3,
    details=DETAILS,
    gap=0.05,
)
PRESETS = {config.name: config for config in (_QUICKSTART, _UNEVEN, _COMPLETE, _FULL)}


def preset(name: str) -> SceneConfig:
    """The named `SceneConfig`, one of `PRESETS`."""
    return PRESETS[check_choice(name, PRESETS, "preset of scenes")]


@functools.cache
def pairs(config: SceneConfig, held_out: bool) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) pairs of `config` that are held out, or the others."""
    every = [(colour, shape) for colour in config.colours for shape in config.shapes]
    return tuple(pair for pair in every if (pair in HELD_OUT_PAIRS) == held_out)


@functools.cache
def triples(config: SceneConfig, held_out: bool) -> tuple[tuple[str, str, str], ...]:
    """The canonical (shape, relation, shape) triples of `config` that are held out, or the others."""
    every = [
        (a, relation, b) for a in config.shapes for relation in ("above", "left of") for b in config.shapes
    ]
    return tuple(triple for triple in every if is_held_out_triple(*triple) == held_out)

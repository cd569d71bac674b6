"""What a caption of a scene says: a parser for English, written apart from the code that writes the captions.

It reads the wordings of the data set ("a red star above a blue ring", "red star over blue ring on white",
"a picture of a red star with a blue ring below it", ...) and what people type in that manner, with a few
synonyms (gray, disc, plus, big, underneath, ...). A word it does not know is an error, so that nothing is
judged by half of its caption.

A caption becomes a row of items: objects, relations, "it" relations ("below it", "to its left"), "and",
backgrounds and places. A relation holds between the object before it and the object after it; after "and" its
subject is that of the relation before ("a star above a ring and left of a cross"). "A with B below it" and "A
and below it B" both say that B is below A.
"""

import dataclasses
import re

from dalle2_jax.runtime.names import nearest

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
BACKGROUNDS = ("white", "black", "grey", "brown")
SIZES = ("small", "medium", "large")
CONVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

_SYNONYMS = {
    "gray": "grey",
    "turquoise": "cyan",
    "violet": "purple",
    "disc": "circle",
    "disk": "circle",
    "dot": "circle",
    "donut": "ring",
    "doughnut": "ring",
    "plus": "cross",
    "rhombus": "diamond",
    "big": "large",
    "little": "small",
    "tiny": "small",
    "backdrop": "background",
    "center": "centre",
    "middle": "centre",
    "upper": "top",
    "lower": "bottom",
    "over": "above",
    "atop": "above",
    "under": "below",
    "beneath": "below",
    "underneath": "below",
}
_FILLERS = (
    *(
        "a",
        "an",
        "the",
        "one",
        "single",
        "is",
        "are",
        "there",
        "there's",
        "of",
        "with",
        "which",
        "that",
        "its",
    ),
    *(
        "picture",
        "drawing",
        "image",
        "photo",
        "painting",
        "shows",
        "showing",
        "contains",
        "to",
        "at",
        "in",
        "on",
    ),
    *("sits", "placed", "located", "side", "coloured", "colored", "shape"),
)
_SIDES = ("left", "right", "top", "bottom", "centre")
_KNOWN = {*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES, *_SIDES, *_FILLERS, *_SYNONYMS}
_KNOWN |= {"above", "below", "it", "and", "background", "corner"}


@dataclasses.dataclass(frozen=True)
class Named:
    """An object as a caption names it; None where it does not say."""

    colour: str | None
    shape: str
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a caption says: its objects, (i, relation, j) between them, and the background if it is named."""

    objects: tuple[Named, ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str | None


def _words(caption: str) -> list[str]:
    out = []
    for word in re.findall(r"[\w']+", caption.lower().replace("-", " ")):
        if word not in _KNOWN:
            near = nearest(word, sorted(_KNOWN))
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(
                f"caption {caption!r}: the checker of scenes does not know the word {word!r}{hint}"
            )
        out.append(_SYNONYMS.get(word, word))
    return out


def _items(caption: str) -> list[tuple[str, object]]:
    """The caption as (kind, value): ('object', Named), ('relation', r), ('it', r), ('and', None), ..."""
    words = _words(caption)

    def word(i):
        return words[i] if i < len(words) else ""

    items, i, size = [], 0, None
    while i < len(words):
        w = words[i]
        if w in SIZES:
            size, i = w, i + 1
            continue
        if w in COLOURS or w in BACKGROUNDS:
            after = word(i + 2) if word(i + 1) in ("coloured", "colored") else word(i + 1)
            if w in COLOURS and after in SHAPES:
                items.append(("object", Named(w, after, size)))
                size = None
                i += 2 + (after != word(i + 1))
            elif w in BACKGROUNDS and (after == "background" or word(i - 1) == "on"):
                items.append(("background", w))
                i += 1 + (after == "background")
            elif w in BACKGROUNDS and i >= 2 and words[i - 2 : i] == ["background", "is"]:
                items.append(("background", w))
                i += 1
            else:
                raise ValueError(
                    f"caption {caption!r}: {w!r} must come before the name of a shape, or be a background "
                    f"({', '.join(BACKGROUNDS)})"
                )
            continue
        if w in SHAPES:
            items.append(("object", Named(None, w, size)))
            size, i = None, i + 1
        elif w in ("above", "below"):
            items.append(("it" if word(i + 1) == "it" else "relation", w))
            i += 1 + (word(i + 1) == "it")
        elif w in _SIDES:
            i = _side(words, i, items)
        elif w == "and":
            items.append(("and", None))
            i += 1
        elif w == "background":
            if word(i + 1) != "is":
                raise ValueError(
                    f"caption {caption!r}: 'background' needs its colour ({', '.join(BACKGROUNDS)})"
                )
            i += 1
        else:
            i += 1
    return items


def _side(words: list[str], i: int, items: list) -> int:
    """Reads 'left of', 'on top of', 'its right', 'top left corner', 'centre' at words[i]; where it ends."""
    w = words[i]
    rest = words[i + 1 : i + 3]
    if w == "top" and rest[:1] == ["of"]:
        items.append(("it", "above") if rest[1:] == ["it"] else ("relation", "above"))
        return i + 2 + (rest[1:] == ["it"])
    if w in ("left", "right") and i and words[i - 1] == "its":
        items.append(("it", f"{w} of"))
        return i + 1
    if w in ("left", "right") and rest[:1] == ["of"]:
        items.append(("it", f"{w} of") if rest[1:] == ["it"] else ("relation", f"{w} of"))
        return i + 2 + (rest[1:] == ["it"])
    if w in ("top", "bottom") and rest[:1] in (["left"], ["right"]) and rest[1:] != ["of"]:
        items.append(("place", f"{w} {rest[0]}"))
        return i + 2
    items.append(("place", w))
    return i + 1


def parse(caption: str) -> Facts:
    """Reads a caption.

    Raises:
      ValueError: an unknown word, no object, or a relation that lacks one of its two objects.
    """
    items = _items(caption)
    objects, relations, background = [], [], None
    numbers = []  # of the object at each item, or None

    def number(named):
        for k, other in enumerate(objects):
            if (other.colour, other.shape) == (named.colour, named.shape):
                return k
        objects.append(named)
        return len(objects) - 1

    for kind, value in items:
        numbers.append(number(value) if kind == "object" else None)
        if kind == "background":
            background = value
    subject = None  # of the last relation
    for at, (kind, value) in enumerate(items):
        before = [k for k in numbers[:at] if k is not None]
        after = [k for k in numbers[at + 1 :] if k is not None]
        if kind == "place":
            if not before:
                raise ValueError(f"caption {caption!r}: a place ({value}) must follow the object it is for")
            objects[before[-1]] = dataclasses.replace(objects[before[-1]], place=value)
        elif kind == "relation":
            if not before or not after:
                raise ValueError(f"caption {caption!r}: {value!r} needs an object on either side")
            joined = at > 0 and items[at - 1][0] == "and" and subject is not None
            subject = subject if joined else before[-1]
            relations.append((subject, value, after[0]))
        elif kind == "it":
            if at + 1 < len(items) and items[at + 1][0] == "object" and before:
                relations.append((after[0], value, before[-1]))
            elif len(before) >= 2:
                relations.append((before[-1], value, before[0]))
            else:
                raise ValueError(f"caption {caption!r}: '{value} it' needs two objects")
    if not objects:
        raise ValueError(f"caption {caption!r} names no object; shapes are {', '.join(SHAPES)}")
    for i, relation, j in relations:
        if i == j:
            raise ValueError(f"caption {caption!r}: an object cannot be {relation} itself")
    return Facts(tuple(objects), tuple(relations), background)

"""A parser of English captions of scenes, independent of the code that writes these captions.

It reads the wordings of the data set ("a red star above a blue ring", "red star over blue ring on white",
"a picture of a red star with a blue ring below it", ...) and similar captions that people type, with a few
synonyms (gray, disc, plus, big, underneath, ...). An unknown word is an error, so that no picture is judged
by half of its caption.

A caption becomes a row of items: objects, relations, "it" relations ("below it", "to its left"), "and",
backgrounds and places. A relation holds between the object before it and the object after it; after "and" its
subject is that of the relation before ("a star above a ring and left of a cross"). "A with B below it" and "A
and below it B" both mean that B is below A.
"""

import dataclasses
import re

from dalle2_jax.runtime.names import nearest

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
BACKGROUNDS = ("white", "black", "grey", "brown")
SIZES = ("small", "medium", "large")

# Word -> its synonyms.
_SAME = {
    "grey": "gray",
    "cyan": "turquoise",
    "purple": "violet",
    "circle": "disc disk dot",
    "ring": "donut doughnut",
    "cross": "plus",
    "diamond": "rhombus",
    "large": "big",
    "small": "little tiny",
    "background": "backdrop",
    "centre": "center middle",
    "top": "upper",
    "bottom": "lower",
    "above": "over atop",
    "below": "under beneath underneath",
}
_SYNONYMS = {other: word for word, others in _SAME.items() for other in others.split()}
_FILLERS = (
    "a an the one single is are there there's of with which that its picture drawing image photo painting "
    "shows showing contains to at in on sits placed located side coloured colored shape corner it"
).split()
_SIDES = ("left", "right", "top", "bottom", "centre")
_VOCABULARY = {*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES, *_SIDES, *_FILLERS, *_SYNONYMS}
_VOCABULARY |= {"above", "below", "and", "background"}
_COLOUR, _SHAPE, _BACKGROUND = ("|".join(names) for names in (COLOURS, SHAPES, BACKGROUNDS))
# The items of a caption, with fillers between them. `stray`: a colour without an object.
_ITEM = re.compile(
    rf"""(?<!\S)(?:
        (?P<size>{"|".join(SIZES)})
        | (?:(?P<colour>{_COLOUR})\ (?:colou?red\ )?)?(?P<shape>{_SHAPE})
        | on\ (?P<on>{_BACKGROUND})(?:\ background)? | (?P<before>{_BACKGROUND})\ background
        | background\ is(?:\ (?P<after>{_BACKGROUND})(?:\ background)?)?
        | (?P<relation>above|below|(?:left|right|top)\ of)(?P<it>\ it)?
        | its\ (?P<side>left|right)
        | (?P<place>(?:top|bottom)\ (?:left|right)(?!\ of(?!\S))|{"|".join(_SIDES)})
        | (?P<and>and)
        | (?P<stray>{_COLOUR}|{_BACKGROUND}|background)
    )(?!\S)""",
    re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Named:
    """An object of a caption; None for an aspect that the caption does not name."""

    colour: str | None
    shape: str
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of a caption: objects, relations (i, relation, j) between them, background or None."""

    objects: tuple[Named, ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str | None


Item = tuple[str, Named | str]


def _words(caption: str) -> list[str]:
    out = []
    for word in re.findall(r"[\w']+", caption.lower().replace("-", " ")):
        if word not in _VOCABULARY:
            near = nearest(word, sorted(_VOCABULARY))
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"caption {caption!r}: the checker does not know the word {word!r}{hint}")
        out.append(_SYNONYMS.get(word, word))
    return out


def _items(caption: str) -> list[Item]:
    """The caption as (kind, value): ('object', Named), ('relation', r), ('it', r), ('and', ''), ..."""
    items: list[Item] = []
    size = None
    for match in _ITEM.finditer(" ".join(_words(caption))):
        found = {name: text for name, text in match.groupdict().items() if text}
        if "stray" in found:
            word, backgrounds = found["stray"], ", ".join(BACKGROUNDS)
            why = f"{word!r} must come before the name of a shape, or be a background ({backgrounds})"
            if word == "background":
                why = f"'background' needs its colour ({backgrounds})"
            raise ValueError(f"caption {caption!r}: {why}")
        if "size" in found:
            size = found["size"]
        elif "shape" in found:
            items.append(("object", Named(found.get("colour"), found["shape"], size)))
            size = None
        elif "relation" in found or "side" in found:
            relation = found.get("relation") or f"{found['side']} of"
            kind = "it" if found.keys() & {"it", "side"} else "relation"
            items.append((kind, "above" if relation == "top of" else relation))
        elif background := found.get("on") or found.get("before") or found.get("after"):
            items.append(("background", background))
        elif "place" in found or "and" in found:
            items.append(("place", found["place"]) if "place" in found else ("and", ""))
    return items


def parse(caption: str) -> Facts:
    """Read a caption.

    Raises:
      ValueError: an unknown word, no object, or a relation that lacks one of its two objects.
    """
    items = _items(caption)
    objects: list[Named] = []
    relations: list[tuple[int, str, int]] = []
    background: str | None = None
    numbers: list[int | None] = []  # of the object at each item

    def number(named: Named) -> int:
        for k, other in enumerate(objects):
            if (other.colour, other.shape) == (named.colour, named.shape):
                return k
        objects.append(named)
        return len(objects) - 1

    for kind, value in items:
        numbers.append(number(value) if isinstance(value, Named) else None)
        if kind == "background":
            background = str(value)
    subject: int | None = None  # of the last relation
    for at, (kind, value) in enumerate(items):
        if isinstance(value, Named):
            continue
        before = [k for k in numbers[:at] if k is not None]
        after = [k for k in numbers[at + 1 :] if k is not None]
        if kind == "place":
            if not before:
                raise ValueError(f"caption {caption!r}: a place ({value}) must follow the object it is for")
            objects[before[-1]] = dataclasses.replace(objects[before[-1]], place=value)
        elif kind == "relation":
            if not before or not after:
                raise ValueError(f"caption {caption!r}: {value!r} needs an object on either side")
            if subject is None or items[at - 1][0] != "and":
                subject = before[-1]
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

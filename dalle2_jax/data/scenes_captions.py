"""The captions of `scenes`, in English and Chinese.

`phrases` lists every wording of the same facts: the plain one, other wordings of objects and relations, then
those with the background (about a third). Every wording names every object and every relation. In a chain of
three, A r B s C, the relations are r between A and B, s between B and C.
"""

from dalle2_jax.data.scenes_grammar import BACKGROUNDS, COLOURS, CONVERSE, SHAPES

LANGUAGES = ("en", "zh")

_COLOURS_ZH = dict(zip(COLOURS, "红色 橙色 黄色 绿色 青色 蓝色 紫色 粉色".split(), strict=True))
_COLOURS_ZH |= dict(zip(BACKGROUNDS, "白色 黑色 灰色 棕色".split(), strict=True))
_SHAPES_ZH = dict(zip(SHAPES, "圆形 正方形 三角形 五角星 圆环 十字 心形 菱形".split(), strict=True))
_SIZES_ZH = {"small": "小的", "medium": "中等大小的", "large": "大的"}
# Where B is, seen from A, if A <relation> B.
_ITS_SIDE = {"above": "below it", "below": "above it", "left of": "to its right", "right of": "to its left"}
_LONG = {"above": "above", "below": "below", "left of": "to the left of", "right of": "to the right of"}
_SHORT = {"above": "over", "below": "under", "left of": "left of", "right of": "right of"}
_SIDE_ZH = {"above": "上方", "below": "下方", "left of": "左边", "right of": "右边"}
_SIDE_ZH_2 = {"above": "上面", "below": "下面", "left of": "左侧", "right of": "右侧"}
_PLACES = {
    "centre": ("in the centre", "中央"),
    "top": ("at the top", "顶部"),
    "bottom": ("at the bottom", "底部"),
    "left": ("on the left", "左边"),
    "right": ("on the right", "右边"),
    "top left": ("in the top left corner", "左上角"),
    "top right": ("in the top right corner", "右上角"),
    "bottom left": ("in the bottom left corner", "左下角"),
    "bottom right": ("in the bottom right corner", "右下角"),
}


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _english(nouns, relations, background, place):
    a = [_with_article(noun) for noun in nouns]
    if not relations:
        plain = [
            a[0],
            nouns[0],
            f"a picture of {a[0]}",
            f"one {nouns[0]}",
            f"a drawing of {a[0]}",
            f"there is {a[0]}",
            f"the picture shows {a[0]}",
            f"an image of {a[0]}",
        ]
        if place:
            plain += [f"{a[0]} {_PLACES[place][0]}", f"{nouns[0]} {_PLACES[place][0]}"]
    elif len(relations) == 1:
        r = relations[0]
        plain = [
            f"{a[0]} {_LONG[r]} {a[1]}",
            f"{nouns[0]} {_SHORT[r]} {nouns[1]}",
            f"a picture of {a[0]} with {a[1]} {_ITS_SIDE[r]}",
            f"{a[1]} {_LONG[CONVERSE[r]]} {a[0]}",
            f"{a[0]} is {_SHORT[r]} {a[1]}",
            f"a drawing of {a[0]} {_LONG[r]} {a[1]}",
            f"there is {a[0]} and {_ITS_SIDE[r]} {a[1]}",
            f"the {nouns[0]} is {_LONG[r]} the {nouns[1]}",
        ]
    else:
        r, s = relations
        plain = [
            f"{a[0]} {_LONG[r]} {a[1]}, and {a[2]} {_LONG[CONVERSE[s]]} the {nouns[1]}",
            f"{a[0]} {_LONG[r]} {a[1]} which is {_LONG[s]} {a[2]}",
            f"{nouns[0]} {_SHORT[r]} {nouns[1]}, {nouns[1]} {_SHORT[s]} {nouns[2]}",
            f"a picture of {a[0]} {_LONG[r]} {a[1]}, with {a[2]} {_LONG[CONVERSE[s]]} the {nouns[1]}",
            f"the {nouns[0]} is {_LONG[r]} the {nouns[1]} and the {nouns[1]} is {_LONG[s]} the {nouns[2]}",
        ]
    if background is None:
        return plain
    described = [
        f"{plain[0]} on a {background} background",
        f"{plain[1]} on {background}",
        f"a {background} background with {plain[0]}",
    ]
    if not relations:
        described.append(f"a picture of {a[0]} on a {background} background")
    elif len(relations) == 1:
        described.append(f"a drawing of {plain[0]} on a {background} background")
    return plain + described


def _chinese(nouns, relations, background, place):
    one = ["一个" + noun for noun in nouns]
    if not relations:
        plain = [
            one[0],
            nouns[0],
            f"一张{nouns[0]}的图",
            f"图中有{one[0]}",
            f"画着{one[0]}",
            f"这里有{one[0]}",
        ]
        if place:
            plain += [f"{one[0]}在画面{_PLACES[place][1]}", f"画面{_PLACES[place][1]}有{one[0]}"]
    elif len(relations) == 1:
        r = relations[0]
        plain = [
            f"{one[0]}在{one[1]}的{_SIDE_ZH[r]}",
            f"{nouns[0]}在{nouns[1]}{_SIDE_ZH[r]}",
            f"{nouns[1]}的{_SIDE_ZH[r]}有{one[0]}",
            f"{one[1]}在{one[0]}的{_SIDE_ZH_2[CONVERSE[r]]}",
            f"图中有{one[0]},它的{_SIDE_ZH[CONVERSE[r]]}是{one[1]}",
            f"画着{one[0]},位于{one[1]}{_SIDE_ZH_2[r]}",
        ]
    else:
        r, s = relations
        plain = [
            f"{one[0]}在{one[1]}的{_SIDE_ZH[r]},{one[2]}在{nouns[1]}的{_SIDE_ZH[CONVERSE[s]]}",
            f"{nouns[0]}在{nouns[1]}{_SIDE_ZH[r]},{nouns[1]}在{nouns[2]}{_SIDE_ZH[s]}",
            f"图中有{one[1]},{nouns[1]}的{_SIDE_ZH_2[r]}是{one[0]},{nouns[1]}的{_SIDE_ZH_2[CONVERSE[s]]}是{one[2]}",
        ]
    if background is None:
        return plain
    described = [f"{_COLOURS_ZH[background]}背景上,{plain[0]}", f"{plain[1]},{_COLOURS_ZH[background]}背景"]
    if len(relations) < 2:
        described.append(f"{plain[3]},背景是{_COLOURS_ZH[background]}")
    return plain + described


def phrases(objects, relations, background=None, place=None, language="en") -> list[str]:
    """Every wording of one set of facts, the plain one first.

    Args:
      objects: (colour, shape, size or None) of one to three objects.
      relations: one entry fewer than objects: how object k stands to object k + 1.
      background: its name; None: no caption names it.
      place: of a single object ('top left', 'centre', ...); None: no caption names it.
      language: 'en' or 'zh'.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}: captions of scenes are in 'en' or 'zh'")
    if len(relations) != len(objects) - 1:
        raise ValueError(f"{len(objects)} objects need {len(objects) - 1} relations, got {len(relations)}")
    if language == "en":
        nouns = [" ".join(word for word in (size, colour, shape) if word) for colour, shape, size in objects]
        return _english(nouns, relations, background, place)
    nouns = [
        _SIZES_ZH.get(size, "") + _COLOURS_ZH[colour] + _SHAPES_ZH[shape] for colour, shape, size in objects
    ]
    return [text.replace(",", "，") for text in _chinese(nouns, relations, background, place)]

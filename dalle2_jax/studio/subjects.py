"""What a model can draw, by the data that it was trained on: a sentence, and captions to try."""

from dalle2_jax.data.scenes_captions import phrases
from dalle2_jax.data.scenes_grammar import PRESETS
from dalle2_jax.generate.pipeline import Pipeline

MOST = 12  # classes that are named
# Objects, relations and background of scenes whose combinations are trained in every preset.
_SCENES = (
    ([("red", "star", None), ("blue", "ring", None)], ["above"], None),
    ([("green", "cross", None)], [], "black"),
    ([("yellow", "circle", None), ("purple", "square", None)], ["left of"], None),
    ([("orange", "triangle", None)], [], None),
)


def subjects(model: Pipeline) -> tuple[str, list[str]]:
    """(a sentence about what a model draws, captions to try)."""
    drawn = next(step.stage for step in model.steps("draw") if "image" in step.writes)
    data = model.engine.configs[drawn].get("data") or {}
    if not model.reads_captions:
        return "It reads no captions: it draws what its training pictures show.", []
    if classes := list(data.get("classes") or ()):
        more = f" and {len(classes) - MOST} more" if len(classes) > MOST else ""
        return f"A caption names what it draws: {', '.join(classes[:MOST])}{more}.", classes[:4]
    grammar = PRESETS.get(data.get("path", "").rpartition("_")[0])
    if data.get("source") != "scenes" or grammar is None:
        return "It draws what its training pictures show.", []
    language = data.get("language", "en")
    captions = [phrases(*facts, language=language)[-1 if facts[2] else 0] for facts in _SCENES]
    count = ("one", "two", "three")[grammar.max_objects - 1]
    return (
        f"It draws one to {count} shapes ({', '.join(grammar.shapes)}) in {', '.join(grammar.colours)}, "
        f"above, below, left of or right of each other, on {', '.join(grammar.backgrounds)}."
    ), captions

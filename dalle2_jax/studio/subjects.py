"""What a model can draw, by the data that it was trained on: a sentence, and captions to try.

The captions are the `sample_captions` of its training; else its classes, or some of the built-in scenes.
"""

from collections.abc import Mapping

from dalle2_jax.data.scenes_captions import phrases
from dalle2_jax.data.scenes_grammar import PRESETS
from dalle2_jax.generate.captions import trained_on
from dalle2_jax.generate.pipeline import Pipeline

MOST = 12  # classes that are named
# Objects, relations and background of scenes whose combinations are trained in every preset.
_SCENES: tuple[tuple[list, list, str | None], ...] = (
    ([("red", "star", None), ("blue", "ring", None)], ["above"], None),
    ([("green", "cross", None)], [], "black"),
    ([("yellow", "circle", None), ("purple", "square", None)], ["left of"], None),
    ([("orange", "triangle", None)], [], None),
)


def subjects(model: Pipeline) -> tuple[str, list[str]]:
    """(a sentence about what a model draws, captions to try)."""
    drawn = next(step.stage for step in model.steps("draw") if "image" in step.writes)
    config = model.engine.configs[drawn]
    data, tries = config.get("data") or {}, list(config.get("sample_captions") or ())
    if not model.reads_captions:
        return "It reads no captions: it draws what its training pictures show.", []
    if classes := list(data.get("classes") or ()):
        more = f" and {len(classes) - MOST} more" if len(classes) > MOST else ""
        return f"A caption names what it draws: {', '.join(classes[:MOST])}{more}.", tries or classes[:4]
    grammar = PRESETS.get(data.get("path", "").rpartition("_")[0])
    if data.get("source") != "scenes" or grammar is None:
        trained = trained_on(model.engine)
        said = f"It was trained on {trained}." if trained else "It draws what its training pictures show."
        return said, tries
    language = data.get("language", "en")
    tries = tries or [
        phrases(objects, relations, background, language=language)[-1 if background else 0]
        for objects, relations, background in _SCENES
    ]
    count = ("one", "two", "three")[grammar.max_objects - 1]
    return (
        f"It draws one to {count} shapes ({', '.join(grammar.shapes)}) in {', '.join(grammar.colours)}, "
        f"above, below, left of or right of each other, on {', '.join(grammar.backgrounds)}."
    ), tries


def welcome(models: Mapping[str, Pipeline]) -> str:
    """The page's title, and what each model draws, as Markdown; models: name -> model."""
    names = list(models) if len(models) > 1 else [model.name for model in models.values()]
    lines = [
        f"Model **{name}**, {model.image_size} x {model.image_size} pixels. {subjects(model)[0]}"
        for name, model in zip(names, models.values(), strict=True)
    ]
    return "\n\n".join(["# dalle2_jax studio", *lines])

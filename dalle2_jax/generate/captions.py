"""Captions: which are valid, and the fields that stages read from them."""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.generate.engine import Engine

MAX_CAPTION = 1000
# Fields made from captions: tokens by the stage's tokenizer, CLIP's embedding and states, classes.
FIELDS = ("tokens", "token_mask", "text_embed", "text_states", "label")


def check_captions(captions: Sequence[str]) -> None:
    """Raise ValueError for no captions, an empty one, or one of more than MAX_CAPTION characters."""
    if isinstance(captions, str):
        raise ValueError("captions must be a list of texts, not one text")
    if not len(captions):
        raise ValueError("give at least one caption")
    for i, caption in enumerate(captions, 1):
        if not isinstance(caption, str):
            raise ValueError(f"caption {i} is {caption!r}: captions must be texts")
        if not caption.strip():
            raise ValueError(f"caption {i} is empty: say what to draw")
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError(f"caption {i}, {caption!r}, holds half a character: write it in UTF-8")
        if len(caption) > MAX_CAPTION:
            raise ValueError(f"caption {i} has {len(caption)} characters: at most {MAX_CAPTION} are allowed")


def cut_captions(engine: Engine, names: Sequence[str], captions: Sequence[str]) -> list[str]:
    """A line for each caption with more tokens than the `context_length` of one of these stages."""
    limits = {name: getattr(engine.stages[name], "context_length", None) for name in names}
    lines = []
    for i, caption in enumerate(captions, 1):
        surplus: dict[str, int] = {}
        for name, limit in limits.items():
            if limit:
                # A token stands for at least one byte, a character for at most four.
                tokens = engine.tokenizer(name, 4 * MAX_CAPTION + 2)([caption])[1].sum()
                surplus |= {name: tokens - limit} if tokens > limit else {}
        if surplus:
            name = max(surplus, key=lambda name: surplus[name])
            tokenizer = engine.tokenizer(name)
            read = tokenizer.decode(tokenizer([caption])[0][0])
            lines.append(f"caption {i} is too long by {surplus[name]} tokens: {name} reads only {read!r}")
    return lines


def labels(engine: Engine, captions: Sequence[str], name: str) -> np.ndarray:
    """The class int32 [N] of stage `name` that each caption names.

    -1 where a caption does not name exactly one: the null label of a stage trained with `label_drop`.
    ValueError for other stages.
    """
    from dalle2_jax.data.pipeline import label_of

    classes = engine.configs[name]["data"]["classes"]
    found = [label_of(caption, classes) for caption in captions]
    for caption, label in zip(captions, found, strict=True):
        if label < 0 and not getattr(engine.stage(name), "label_drop", False):
            leave = ", or leave classifier out" if name == "classifier" else ""
            raise ValueError(
                f"caption {caption!r} does not name exactly one class of the {name}, such as "
                f"{', '.join(map(repr, classes[:3]))}: name one{leave}"
            )
    return np.array(found, np.int32)

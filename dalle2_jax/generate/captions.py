"""Captions: which are allowed, and what a stage reads of them."""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.generate.engine import Engine

MAX_CAPTION = 1000
# Fields that come from captions: tokens of the stage's own tokenizer, CLIP's embedding and states, classes.
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
    """A line for each caption that is longer than one of these stages reads, with the part that it reads."""
    reads = {name: getattr(engine.stages[name], "context_length", None) for name in names}
    lines = []
    for i, caption in enumerate(captions, 1):
        short = {}  # stage -> surplus tokens
        for name, limit in reads.items():
            if limit:
                # A token stands for at least one byte, a character for at most four.
                tokens = engine.tokenizer(name, 4 * MAX_CAPTION + 2)([caption])[1].sum()
                short |= {name: tokens - limit} if tokens > limit else {}
        if short:
            name = max(short, key=short.get)
            tokenizer = engine.tokenizer(name)
            read = tokenizer.decode(tokenizer([caption])[0][0])
            lines.append(f"caption {i} is too long by {short[name]} tokens: {name} reads only {read!r}")
    return lines


def labels(engine: Engine, captions: Sequence[str], name: str = "classifier") -> np.ndarray:
    """The class [N] int32 of the classifier, or of stage `name`, that each caption names.

    -1 where a caption names not one, for a stage that was trained without classes, too; ValueError for
    others.
    """
    from dalle2_jax.data.pipeline import label_of

    classes = engine.configs[name]["data"]["classes"]
    found = [label_of(caption, classes) for caption in captions]
    for caption, label in zip(captions, found, strict=True):
        if label < 0 and not getattr(engine.stage(name), "label_drop", 0):
            leave = ", or leave classifier out" if name == "classifier" else ""
            raise ValueError(
                f"caption {caption!r} does not name exactly one class of the {name}, such as "
                f"{', '.join(map(repr, classes[:3]))}: name one{leave}"
            )
    return np.array(found, np.int32)

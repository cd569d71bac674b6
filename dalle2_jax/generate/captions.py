"""Captions: which are valid, and the fields that stages read from them."""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.data import words
from dalle2_jax.generate.engine import Engine
from dalle2_jax.runtime.names import nearest

MAX_CAPTION = 1000
# Fields made from captions: tokens by the stage's tokenizer, CLIP's embedding and states, classes.
FIELDS = ("tokens", "token_mask", "text_embed", "text_states", "label")
LANGUAGES = {"en": "English", "zh": "Chinese", "any": "several languages"}
# Words that no caption consists of.
GLUE = frozenset(
    "a an the of in on at with and or to is above below under over left right near by from".split()
)


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


def check_quotes(captions: Sequence[str]) -> None:
    """Raise ValueError for a sentence that a shell has split into captions of one word each."""
    single = all(len(caption.split()) == 1 for caption in captions)
    if len(captions) > 2 and single and {caption.lower() for caption in captions} & GLUE:
        raise ValueError(
            f"these are {len(captions)} captions of one word each. If you mean one caption, put it in "
            f'quotes: "{" ".join(captions)}"'
        )


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


def trained_on(engine: Engine) -> str:
    """Language and commonest words of the captions of the training; '' if they are unknown."""
    if (seen := words.read(engine.directory)) is None:
        return ""
    common = ", ".join([word for word in seen.counts if word not in GLUE][:8])
    languages = " and ".join(LANGUAGES.get(code, code) for code in seen.languages)
    return f"captions in {languages} with words such as {common}"


def unseen_words(engine: Engine, captions: Sequence[str]) -> list[str]:
    """A line for each caption with words that no caption of the training had; none if they are unknown."""
    seen = words.read(engine.directory)
    if seen is None:
        return []
    lines = []
    for i, caption in enumerate(captions, 1):
        found = words.split(caption)
        unseen = [word for word in dict.fromkeys(found) if word not in seen.counts]
        if not unseen:
            continue
        if len(unseen) == len(set(found)):
            lines.append(
                f"caption {i}: the model has seen none of its words; it was trained on {trained_on(engine)}"
            )
            continue
        near = {word: nearest(word, seen.counts) for word in unseen}
        shown = ", ".join(repr(w) + (f" (did you mean {near[w]}?)" if near[w] else "") for w in unseen)
        lines.append(f"caption {i}: the model has {'hardly' if seen.cut else 'never'} seen {shown}")
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

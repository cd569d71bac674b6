"""The choice of a record's caption, and the check that a dataset has captions in a language."""

from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data import shards
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.data.records import BadRecord, Record, RecordSource
from dalle2_jax.data.transforms import CAPTION, LANGUAGE

ANY_LANGUAGE = "any"
MAX_CAPTION_BYTES = 64 << 10
_FIRST, _SPREAD = 16, 64  # records checked for captions: the first ones, and some of all
_SHOWN_FIELDS, _SHOWN_NAME = 12, 40  # names in a message, characters of each


def choose(record: Record, language: str, draws: np.ndarray, note: Callable[[str], None]) -> str:
    """One of a record's captions in a language, or in any, by its draws [8] (`transforms.uniforms`).

    note: called with the name of a flaw of a usable caption. Raises BadRecord.
    """
    captions, chosen = record.captions, language
    if language == ANY_LANGUAGE:
        languages = sorted(captions)
        chosen = languages[int(draws[LANGUAGE] * len(languages))] if languages else ""
    texts = captions.get(chosen, ())
    if not texts:
        others = f"captions in {', '.join(sorted(captions))}" if captions else "no caption"
        found = f"it has {others}{_named(record.fields)}"
        raise BadRecord("no_caption", f"language {language}; {found}")
    text = texts[int(draws[CAPTION] * len(texts))]
    if "\ufffd" in text:
        note("unreadable_character")
    return cut(text, note)


def cut(text: str, note: Callable[[str], None] = lambda reason: None) -> str:
    """The first MAX_CAPTION_BYTES of a caption, in whole characters; `note` is called for a longer one."""
    if len(text) * 4 <= MAX_CAPTION_BYTES or len(text.encode("utf-8", "ignore")) <= MAX_CAPTION_BYTES:
        return text
    note("caption_cut")
    return text.encode("utf-8", "ignore")[:MAX_CAPTION_BYTES].decode("utf-8", "ignore")


def in_any_language(record: Record, language: str) -> Sequence[str]:
    """A record's captions in the language, else in another one."""
    of_all = record.captions
    return of_all.get(language) or next((texts for _, texts in sorted(of_all.items()) if texts), ())


def check(source: RecordSource, path: str, language: str) -> None:
    """Raise ValueError if the first records, and others spread over the source, have no caption in the
    language.

    Unreadable records are skipped.
    """
    spread = np.linspace(0, len(source) - 1, min(len(source), _SPREAD)).astype(int).tolist()
    found: set[str] = set()
    fields: dict[str, None] = {}
    read = 0
    for number, index in enumerate(dict.fromkeys([*range(min(len(source), _FIRST)), *spread])):
        if number >= _FIRST and (language in found or (found and language == ANY_LANGUAGE)):
            break
        try:
            record = source.read(index, image=False)
        except BadRecord:
            continue
        found |= record.captions.keys()
        fields |= dict.fromkeys(record.fields[:_SHOWN_FIELDS])
        read += 1
    if read and not found:
        mend = "put KEY.txt beside each KEY.jpg, set --config.data.class_captions=True for folders by class"
        if fields:
            mend = "rename the field that holds the captions, or name it by --config.data.caption_field"
        mend += ", or train a stage that reads none (model.text=None)"
        raise ValueError(
            f"no captions in {path}: none of {read} records has one in KEY.txt or in a field caption, text, "
            f"txt, or caption_zh for Chinese and so on{_named(list(fields))}; {mend}"
        )
    if found and language not in (found | {ANY_LANGUAGE}):
        raise ValueError(
            f"data.language {language!r}: the first records have no such captions"
            + did_you_mean(language, found | {ANY_LANGUAGE})
        )


def _named(fields: Sequence[str]) -> str:
    """'; fields: alt, url' with the first few names, or ''."""
    shown = [shards.encodable(name[:_SHOWN_NAME]) for name in fields[:_SHOWN_FIELDS]]
    return f"; fields: {', '.join(shown)}{', ...' if len(fields) > len(shown) else ''}" if shown else ""

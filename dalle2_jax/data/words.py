"""The words of the captions that a model was trained on, and their counts: words.json of a workdir or model.

    {"captions": 160000, "languages": ["en"], "cut": false, "words": {"a": 210034, "red": 40112, ...}}

Words are in lower case, the most frequent first; of Chinese and Japanese each character is one.
"""

import collections
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Sequence

from absl import logging
from etils import epath

from dalle2_jax.runtime import files

FILE = "words.json"
MOST = 50_000  # words that are kept, the most frequent
_ALONE = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+(?:['’][^\W_{_ALONE}]+)*")


def split(text: str) -> list[str]:
    """The words of a caption."""
    return _WORD.findall(text.lower())


@dataclasses.dataclass(frozen=True)
class Words:
    """Words of captions.

    Attributes:
      counts: word -> how often it was read, the most frequent first.
      captions: how many captions were read.
      languages: of the captions, as in data.language.
      cut: whether rarer words were left out.
    """

    counts: dict[str, int]
    captions: int
    languages: Sequence[str]
    cut: bool = False


def read(folder: epath.Path) -> Words | None:
    """The words of a workdir or a model directory; None: it has none, or a damaged file."""
    path = epath.Path(folder) / FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(files.read_text(path))
        counts = {str(word): int(count) for word, count in stored["words"].items()}
        return Words(
            counts, int(stored["captions"]), list(map(str, stored["languages"])), bool(stored["cut"])
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s is damaged and is not read: %r", path, error)
        return None


def write(folder: epath.Path, words: Words) -> None:
    """Writes the file of a folder."""
    kept = sorted(words.counts.items(), key=lambda item: (-item[1], item[0]))[:MOST]
    stored = {"captions": words.captions, "languages": sorted(words.languages)}
    stored |= {"cut": words.cut or len(kept) < len(words.counts), "words": dict(kept)}
    with files.atomic_write(epath.Path(folder) / FILE) as partial:
        partial.write_text(json.dumps(stored, ensure_ascii=False, indent=0) + "\n", "utf-8")


def merged(several: Iterable[Words]) -> Words | None:
    """The words of stages of one model: of each word the largest count; None: no stage has words."""
    found = list(several)
    if not found:
        return None
    counts: collections.Counter = collections.Counter()
    for words in found:
        counts |= collections.Counter(words.counts)
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    languages = sorted({language for words in found for language in words.languages})
    return Words(
        ordered, max(words.captions for words in found), languages, any(words.cut for words in found)
    )


class WordCounter:
    """Counts the words of the captions that a run reads; its threads may share it."""

    def __init__(self, language: str):
        self._language, self._lock = language, threading.Lock()
        self._counts: collections.Counter = collections.Counter()
        self._captions, self._cut = 0, False

    def add(self, captions: Sequence[str]) -> None:
        """Counts the words of captions."""
        found = [word for caption in captions for word in split(caption)]
        with self._lock:
            self._captions += len(captions)
            self._counts.update(found)
            if len(self._counts) > 4 * MOST:
                self._counts, self._cut = collections.Counter(dict(self._counts.most_common(2 * MOST))), True

    def so_far(self, before: Words | None = None) -> Words:
        """The words so far, with those `before`, of the part of the run that this one goes on from."""
        with self._lock:
            counts, captions = self._counts.copy(), self._captions
        languages = {self._language, *(before.languages if before else ())}
        if before:
            counts.update(before.counts)
            captions += before.captions
        return Words(dict(counts), captions, sorted(languages), self._cut or bool(before and before.cut))

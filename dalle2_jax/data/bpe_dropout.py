"""BPE dropout: captions cut into tokens in another way each time (arXiv 1910.13267).

Before each merge of a byte-pair encoding every pair that could be merged is left out with a probability; the
best of the others is merged; a word is done when none is left. The draws follow from a seed alone.
"""

import functools
import json
import random
from collections.abc import Iterable, Mapping

_WORDS = 1 << 15  # of the cache of words as symbols


class Dropout:
    """Tokens of captions with dropout, for a `tokenizers.Tokenizer` of a byte-pair encoding.

    Raises ValueError for another model.
    """

    def __init__(self, encoder, rate: float):
        """rate: how often a merge is left out, in [0, 1)."""
        model = json.loads(encoder.to_str())["model"]
        if model["type"] != "BPE":
            raise ValueError(
                f"bpe_dropout needs a byte-pair encoding, and this tokenizer is a {model['type']}"
            )
        if not 0 <= rate < 1:
            raise ValueError(f"bpe_dropout {rate} must be in [0, 1)")
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        self._ranks: Mapping = {(first, second): i for i, (first, second) in enumerate(pairs)}
        self._ids, self._end = model["vocab"], model.get("end_of_word_suffix") or ""
        self._encoder, self._rate = encoder, rate
        self._symbols = functools.lru_cache(maxsize=_WORDS)(self._split)

    def _split(self, word: str) -> tuple[str, ...]:
        """The symbols of a word before any merge."""
        return (*word[:-1], word[-1] + self._end)

    def encode(self, text: str, seed: Iterable[int]) -> list[int]:
        """The ids of a cleaned text; seed: whole numbers, of this text's draws."""
        if self._encoder.normalizer is not None:
            text = self._encoder.normalizer.normalize_str(text)
        draw = random.Random(repr(tuple(seed))).random  # of a text, so that it is the same on any machine
        words = self._encoder.pre_tokenizer.pre_tokenize_str(text)
        return [self._ids[symbol] for word, _ in words for symbol in self._merged(word, draw)]

    def _merged(self, word: str, draw) -> list[str]:
        symbols = list(self._symbols(word))
        while len(symbols) > 1:
            pairs = enumerate(zip(symbols, symbols[1:], strict=False))
            ranked = [(self._ranks[pair], i) for i, pair in pairs if pair in self._ranks]
            left = [entry for entry in ranked if draw() >= self._rate]
            if not left:
                break
            _, i = min(left)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return symbols

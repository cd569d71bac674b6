"""Captions to token ids: OpenAI CLIP's byte-pair encoding, GLIDE's, or a byte-level one trained on captions.

A row is SOT, the caption's tokens, EOT, then zeros; a caption that is too long is cut so that EOT stays.
SOT and EOT are the two highest ids, EOT the highest, so `tokens.argmax(-1)` is the position of EOT, as
CLIP pools. The id 0 is also an ordinary token: `token_mask` says which positions are real. Text is cleaned
alike for all kinds (`clean`), which makes the ids of Hugging Face's CLIP tokenizer equal to OpenAI's.
GLIDE's, of GPT-2's layout, has neither SOT nor EOT: a row is the caption's tokens, then zeros.

Saved as tokenizer.json (the `tokenizers` library's format, without SOT and EOT) and tokenizer_config.json.
"""

import functools
import gzip
import html
import json
import os
import re
from collections.abc import Iterable

import numpy as np

from dalle2_jax.runtime import files

KINDS = ("clip", "bpe", "gpt2")
_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"
_SPACES = re.compile(r"\s+")
_PADDING = re.compile(r"[ \t\r\n]{2,}")  # not \s, some of which are letters until they are repaired
_LONG_WORD = re.compile(r"\S{1000,}")
_MIN_VOCAB = 256 + 2
# Characters of a caption that are read for each token of a row: more than a token stands for, but for those
# of words of many hundred letters.
_A_TOKEN = 64
_TRAINED_ON = 8192  # characters of a caption that a vocabulary is trained on


def clean(text: str, most: int | None = None) -> str:
    """Repair, unescape twice, squeeze white space, lower, as OpenAI's CLIP; a literal SOT or EOT goes.

    Of a text of more than `most` characters these are cleaned alone: the time to repair grows with the
    square of the length where '&amp;amp;amp;...' has to be unescaped.
    """
    if most is not None and len(text) > most:
        text = _PADDING.sub(" ", text)[:most]
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else there is nothing to repair
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = _SPACES.sub(" ", text).strip().lower()
    return text.replace(_SOT, " ").replace(_EOT, " ") if "<|" in text else text


class Tokenizer:
    """A tokenizer with a fixed context length; call it with a list of captions."""

    def __init__(self, encoder, kind: str, vocab_size: int, context_length: int):
        """encoder: a `tokenizers.Tokenizer`; the ids vocab_size - 2 and vocab_size - 1 are SOT and EOT, but
        of kind 'gpt2', which has neither."""
        if context_length < 3:
            raise ValueError(
                f"context_length {context_length} leaves no room between SOT and EOT; give 3 or more"
            )
        self.kind, self.vocab_size, self.context_length = kind, vocab_size, context_length
        self.sot, self.eot = vocab_size - 2, vocab_size - 1
        self.has_ends = kind != "gpt2"
        self._encoder = encoder
        self._cached = functools.lru_cache(maxsize=1 << 15)(self._encode)

    def _encode(self, caption: str) -> tuple[int, ...]:
        text = clean(caption, _A_TOKEN * self.context_length)
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        return tuple(ids[: self.context_length - 2 * self.has_ends])

    def _ids(self, caption: str) -> tuple[int, ...]:
        return self._cached(caption) if len(caption) < 1000 else self._encode(caption)

    def __call__(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [B, L], token_mask bool [B, L]) of B captions, cut after L - 2 tokens, or after L
        where there is neither SOT nor EOT."""
        tokens = np.zeros((len(captions), self.context_length), np.int32)
        token_mask = np.zeros(tokens.shape, bool)
        for row, caption in enumerate(captions):
            ids = self._ids(caption)
            if self.has_ends:
                tokens[row, : len(ids) + 2] = (self.sot, *ids, self.eot)
            else:
                tokens[row, : len(ids)] = ids
            token_mask[row, : len(ids) + 2 * self.has_ends] = True
        return tokens, token_mask

    def decode(self, ids) -> str:
        """The cleaned caption of one row of ids, up to EOT."""
        kept = []
        for number in np.asarray(ids).tolist():
            if number == self.eot and self.has_ends:
                break
            if number != self.sot or not self.has_ends:
                kept.append(number)
        if self.kind == "clip":  # the end-of-word mark stands for the space
            pieces = "".join(self._encoder.id_to_token(number) for number in kept)
            return _bytes_of(pieces).decode("utf-8", "replace").replace("</w>", " ").strip()
        return self._encoder.decode(kept, skip_special_tokens=False).strip()

    def save(self, directory) -> None:
        """Write tokenizer.json into `directory`, then tokenizer_config.json, which says that it is whole."""
        os.makedirs(directory, exist_ok=True)
        self._encoder.save(os.path.join(directory, "tokenizer.json"))
        settings = dict(kind=self.kind, vocab_size=self.vocab_size, context_length=self.context_length)
        path = os.path.join(directory, "tokenizer_config.json")
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            json.dump({"dalle2_jax": settings}, file, indent=2)
        os.replace(f"{path}.partial", path)


@functools.cache
def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of(pieces: str) -> bytes:
    table = _byte_characters()
    return bytes(table[character] for character in pieces)


def load_tokenizer(path, context_length: int | None = None) -> Tokenizer:
    """Load a saved tokenizer, or a CLIP tokenizer in Hugging Face's layout.

    Args:
        path: a folder that `Tokenizer.save` wrote; a folder with vocab.json and merges.txt (or
            tokenizer.json); one with GLIDE's encoder.json and vocab.bpe, perhaps with .gz behind; or a name
            on the Hugging Face Hub, such as 'openai/clip-vit-large-patch14'.
        context_length: tokens a row; None for the saved one, 77 for CLIP, 128 for GLIDE.

    Raises:
        ValueError: the path is neither, or the vocabulary is not laid out as CLIP's.
    """
    path = files.expand(path)
    settings_path = os.path.join(path, "tokenizer_config.json")
    if os.path.isfile(settings_path):
        settings = json.loads(files.read_text(settings_path)).get("dalle2_jax")
        if settings:
            import tokenizers

            encoder = tokenizers.Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
            return Tokenizer(
                encoder,
                settings["kind"],
                settings["vocab_size"],
                context_length or settings["context_length"],
            )
    if any(os.path.isfile(os.path.join(path, f"encoder.json{end}")) for end in ("", ".gz")):
        return _load_gpt2(path, context_length or 128)
    return _load_clip(path, context_length or 77)


def _load_gpt2(path: str, context_length: int) -> Tokenizer:
    """The tokenizer of encoder.json (token -> id) and vocab.bpe (a line of version, then a merge a line)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def text(name: str) -> str:
        for end, opened in (("", open), (".gz", gzip.open)):
            if os.path.isfile(os.path.join(path, name + end)):
                with opened(os.path.join(path, name + end), "rt", encoding="utf-8") as file:
                    return file.read()
        raise ValueError(f"{path} holds no {name} beside its encoder.json")

    vocab = json.loads(text("encoder.json"))
    lines = text("vocab.bpe").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if len(line.split()) == 2]
    encoder = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    return Tokenizer(encoder, "gpt2", max(vocab.values()) + 1, context_length)


def _load_clip(path: str, context_length: int) -> Tokenizer:
    if os.path.isdir(path) and not {"vocab.json", "tokenizer.json"} & set(os.listdir(path)):
        raise ValueError(f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"tokenizer folder {path} does not exist")
    import tokenizers
    import transformers

    fast = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
    loaded = fast.from_pretrained(path)
    ids = loaded.convert_tokens_to_ids([_SOT, _EOT])
    size = max(loaded.get_vocab().values()) + 1
    if ids != [size - 2, size - 1]:
        raise ValueError(
            f"{path}: SOT and EOT have ids {ids}; in CLIP's vocabulary of {size} they are the two highest"
        )
    # A copy: transformers wraps methods of the one that it holds.
    encoder = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    return Tokenizer(encoder, "clip", size, context_length)


def train_bpe(captions: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Train a byte-level BPE on captions; the same captions give the same tokenizer.

    Any text can be encoded, for every byte is a token. Where the captions yield fewer merges than asked
    for, the ids in between stay unused, so that `vocab_size` is what was asked for. Nothing is learnt from
    what comes after 8192 characters of a caption, or 1000 of a word: merging within a word takes the square
    of its length, and such a word is data in base64 or the like.

    Raises:
        ValueError: vocab_size below 258 (bytes, SOT, EOT), or no captions.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < _MIN_VOCAB:
        raise ValueError(f"vocab_size {vocab_size} is below {_MIN_VOCAB}: 256 bytes, SOT and EOT")
    whole = (clean(caption, _TRAINED_ON) for caption in captions)
    cleaned = [_LONG_WORD.sub(lambda word: word[0][:1000], text) for text in whole]
    if not cleaned:
        raise ValueError("there are no captions to train the tokenizer on")
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    encoder.train_from_iterator(cleaned, trainer)
    return Tokenizer(encoder, "bpe", vocab_size, context_length)

"""Captions to token ids: OpenAI CLIP's byte-pair encoding, GLIDE's, or a byte-level one trained on captions.

A row is SOT, the caption's tokens (cut so that EOT fits), EOT, then zeros. SOT and EOT are the two highest
ids, so `tokens.argmax(-1)` is the position of EOT, where CLIP pools. The id 0 is also an ordinary token:
`token_mask` marks the real positions. Text is cleaned alike for all kinds (`clean`), which makes the ids of
Hugging Face's CLIP tokenizer equal to OpenAI's. GLIDE's tokenizer, in GPT-2's layout, has neither SOT nor
EOT.

Saved as tokenizer.json (the `tokenizers` library's format, without SOT and EOT) and tokenizer_config.json.
"""

import functools
import gzip
import html
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from dalle2_jax.data.bpe_dropout import Dropout
from dalle2_jax.runtime import extras, files, hub

KINDS = ("clip", "bpe", "gpt2", "t5", "bart")
_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"
_SPACES = re.compile(r"\s+")
_PADDING = re.compile(r"[ \t\r\n]{2,}")  # not \s, which has parts of broken letters that `clean` repairs
_LONG_WORD = re.compile(r"\S{1000,}")
_MIN_VOCAB = 256 + 2
_A_TOKEN = 64  # characters read for each token of a row: more than almost any token has
_TRAINED_ON = 8192  # characters of a caption for training


def clean(text: str, most: int | None = None) -> str:
    """Repair, unescape twice, squeeze white space, lower, as OpenAI's CLIP; remove a literal SOT or EOT.

    most: longer texts are cut first, since the time to unescape '&amp;amp;amp;...' is quadratic.
    """
    if most is not None and len(text) > most:
        text = _PADDING.sub(" ", text)[:most]
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = _SPACES.sub(" ", text).strip().lower()
    return text.replace(_SOT, " ").replace(_EOT, " ") if "<|" in text else text


class Tokenizer:
    """A tokenizer with a fixed context length; call it with a list of captions."""

    def __init__(self, encoder, kind: str, vocab_size: int, context_length: int):
        """encoder: a `tokenizers.Tokenizer`. SOT and EOT are vocab_size - 2 and vocab_size - 1; 'gpt2' has
        neither."""
        if context_length < 3:
            raise ValueError(
                f"context_length {context_length} leaves no room between SOT and EOT; give 3 or more"
            )
        self.kind, self.vocab_size, self.context_length = kind, vocab_size, context_length
        ends: dict[str, tuple[int | None, int | None]] = {
            "gpt2": (None, None),
            "t5": (None, 1),
            "bart": (0, 2),
        }
        self.sot, self.eot = ends.get(kind, (vocab_size - 2, vocab_size - 1))
        self._ends = (self.sot is not None) + (self.eot is not None)
        self._encoder = encoder
        self._dropouts: dict[float, Dropout] = {}  # by their rate
        self._cached = functools.lru_cache(maxsize=1 << 15)(self._encode)

    def _clean(self, caption: str) -> str:
        most = _A_TOKEN * self.context_length
        if self.kind in ("clip", "bpe"):
            return clean(caption, most)
        if self.kind == "bart":  # as min-dalle
            return caption[:most].lower().encode("ascii", "ignore").decode()
        # GLIDE's captions are lowered alone, those of T5 stay as they are
        return caption[:most].lower() if self.kind == "gpt2" else caption[:most]

    def _encode(self, caption: str) -> tuple[int, ...]:
        ids = self._encoder.encode(self._clean(caption), add_special_tokens=False).ids
        return tuple(ids[: self.context_length - self._ends])

    def _ids(self, caption: str) -> tuple[int, ...]:
        return self._cached(caption) if len(caption) < 1000 else self._encode(caption)

    def with_dropout(
        self, captions: Sequence[str], rate: float, seeds: Iterable[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As a call, but merges are left out at this rate (see `bpe_dropout`); seeds: one a caption."""
        if rate not in self._dropouts:
            self._dropouts[rate] = Dropout(self._encoder, rate)
        most, encode = self.context_length - self._ends, self._dropouts[rate].encode
        pairs = zip(captions, seeds, strict=True)
        return self._rows([encode(self._clean(caption), seed)[:most] for caption, seed in pairs])

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [B, L], token_mask bool [B, L]) of B captions, cut to L tokens with SOT and EOT."""
        return self._rows([self._ids(caption) for caption in captions])

    def _rows(self, encoded: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((len(encoded), self.context_length), np.int32)
        token_mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(encoded):
            ends = [() if end is None else (end,) for end in (self.sot, self.eot)]
            tokens[row, : len(ids) + self._ends] = (*ends[0], *ids, *ends[1])
            token_mask[row, : len(ids) + self._ends] = True
        return tokens, token_mask

    def decode(self, ids) -> str:
        """The cleaned caption of one row of ids, up to EOT."""
        kept = []
        for number in np.asarray(ids).tolist():
            if number == self.eot:
                break
            if number != self.sot:
                kept.append(number)
        if self.kind == "clip":  # the end-of-word mark stands for the space
            pieces = "".join(self._encoder.id_to_token(number) for number in kept)
            decoded = bytes(_BYTES[character] for character in pieces).decode("utf-8", "replace")
            return decoded.replace("</w>", " ").strip()
        return self._encoder.decode(kept, skip_special_tokens=False).strip()

    def save(self, directory) -> None:
        """Write tokenizer.json, then tokenizer_config.json, which marks the folder as complete."""
        os.makedirs(directory, exist_ok=True)
        self._encoder.save(os.path.join(directory, "tokenizer.json"))
        settings = dict(kind=self.kind, vocab_size=self.vocab_size, context_length=self.context_length)
        path = os.path.join(directory, "tokenizer_config.json")
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            json.dump({"dalle2_jax": settings}, file, indent=2)
        os.replace(f"{path}.partial", path)


# Byte-level BPE writes a printable byte as its character, the others as U+0100 and following.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


def load_tokenizer(path, context_length: int | None = None) -> Tokenizer:
    """Load a saved tokenizer, or a CLIP tokenizer in Hugging Face's layout.

    Args:
        path: a folder of `Tokenizer.save`; one with vocab.json and merges.txt (or tokenizer.json); one with
            GLIDE's encoder.json and vocab.bpe, or these with .gz; or a name on the Hugging Face Hub, such as
            'openai/clip-vit-large-patch14'.
        context_length: tokens a row; None: the saved one, 77 for CLIP, 128 for GLIDE.

    Raises:
        ValueError: no such tokenizer, or a vocabulary without CLIP's layout.
    """
    path = files.expand(path)
    settings_path = os.path.join(path, "tokenizer_config.json")
    if os.path.isfile(settings_path):
        settings = json.loads(files.read_text(settings_path)).get("dalle2_jax")
        if settings:
            import tokenizers

            encoder = tokenizers.Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
            length = context_length or settings["context_length"]
            return Tokenizer(encoder, settings["kind"], settings["vocab_size"], length)
    if any(os.path.isfile(os.path.join(path, f"encoder.json{end}")) for end in ("", ".gz")):
        return _load_gpt2(path, context_length or 128)
    return _load_clip(path, context_length or 77)


def _load_gpt2(path: str, context_length: int) -> Tokenizer:
    """The tokenizer of encoder.json (token -> id) and vocab.bpe (its version, then a merge a line)."""
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
    merges = [(pair[0], pair[1]) for pair in map(str.split, lines) if len(pair) == 2]
    encoder = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    return Tokenizer(encoder, "gpt2", max(vocab.values()) + 1, context_length)


def load_bart(path: str | os.PathLike, context_length: int) -> Tokenizer:
    """dalle-mini's tokenizer in a folder with vocab.json and merges.txt: 0 as SOT, 2 as EOT, then zeros.

    Raises ValueError for a folder without them.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    names = [os.path.join(path, name) for name in ("vocab.json", "merges.txt")]
    if not all(map(os.path.isfile, names)):
        raise ValueError(f"{path} holds no tokenizer: expected vocab.json and merges.txt")
    vocab = json.loads(files.read_text(names[0]))
    lines = files.read_text(names[1]).split("\n")[1:]
    merges = [(pair[0], pair[1]) for pair in map(str.split, lines) if len(pair) == 2]
    if [vocab.get(token) for token in ("<s>", "</s>")] != [0, 2]:
        raise ValueError(f"{path}: <s> and </s> must have the ids 0 and 2, as BART's have")
    encoder = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoder.decoder = decoders.ByteLevel()
    return Tokenizer(encoder, "bart", max(vocab.values()) + 1, context_length)


def _load_clip(path: str, context_length: int) -> Tokenizer:
    if os.path.isdir(path) and not {"vocab.json", "tokenizer.json"} & set(os.listdir(path)):
        raise ValueError(f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"tokenizer folder {path} does not exist")
    extras.check(f"reading the tokenizer {path}", "transformers")
    import tokenizers
    import transformers

    fast = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
    offline = "" if os.path.isdir(path) else hub.unreachable()
    try:
        loaded = fast.from_pretrained(path, local_files_only=bool(offline))
    except (OSError, ValueError) as error:
        if offline:
            raise ValueError(hub.what_to_download(path, offline)) from error
        raise
    ids = loaded.convert_tokens_to_ids([_SOT, _EOT])
    size = max(loaded.get_vocab().values()) + 1
    if ids != [size - 2, size - 1]:
        raise ValueError(
            f"{path}: SOT and EOT have ids {ids}; in CLIP's vocabulary of {size} they are the two highest"
        )
    # A copy: transformers wraps methods of its own. `clean` is the whole normalization. Theirs would also
    # compose the letters of "e&#769; <", which OpenAI's leaves apart. Tokenizers that were saved with theirs
    # keep it, so that no run's tokens change.
    state = json.loads(loaded.backend_tokenizer.to_str()) | {"normalizer": None}
    encoder = tokenizers.Tokenizer.from_str(json.dumps(state))
    encoder.no_padding()
    encoder.no_truncation()
    return Tokenizer(encoder, "clip", size, context_length)


def train_bpe(captions: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Train a byte-level BPE on captions; the same captions give the same tokenizer.

    Every byte is a token, so any text can be encoded. If the captions yield few merges, some ids stay unused.
    Captions are cut at 8192 characters and words at 1000, because merging takes quadratic time in the length
    of a word, and such words are base64 or similar. Raises ValueError for a vocab_size below 258 (bytes, SOT,
    EOT), or without captions.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < _MIN_VOCAB:
        raise ValueError(f"vocab_size {vocab_size} is below {_MIN_VOCAB}: 256 bytes, SOT and EOT")
    texts = (clean(caption, _TRAINED_ON) for caption in captions)
    cleaned = [_LONG_WORD.sub(lambda word: word[0][:1000], text) for text in texts]
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


def load_t5(path: str | os.PathLike, context_length: int) -> Tokenizer:
    """T5's tokenizer in a folder with tokenizer.json or spiece.model: no SOT, the id 1 as EOT, then zeros.

    Raises ValueError for a folder without either, or without what reads spiece.model.
    """
    import tokenizers

    if not {"tokenizer.json", "spiece.model"} & set(os.listdir(path)):
        raise ValueError(f"{path} holds no tokenizer: expected tokenizer.json or spiece.model")
    try:
        import transformers

        kind = getattr(transformers, "T5TokenizerFast", None) or transformers.T5Tokenizer
        loaded = kind.from_pretrained(path)
    except ImportError as error:
        needed = extras.how_to_install("sentencepiece")
        raise ValueError(f"reading spiece.model needs more: {needed} ({error})") from None
    if (loaded.pad_token_id, loaded.eos_token_id) != (0, 1):
        raise ValueError(f"{path}: the ids of padding and end must be 0 and 1, as T5's are")
    # A copy: transformers wraps methods of the one that it holds.
    encoder = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    return Tokenizer(encoder, "t5", max(loaded.get_vocab().values()) + 1, context_length)

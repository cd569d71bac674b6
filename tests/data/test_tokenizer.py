"""Token ids equal OpenAI's, rows are well formed, and a saved tokenizer needs no transformers."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from dalle2_jax.data import tokenizer as tokenizer_module
from dalle2_jax.data.tokenizer import clean, load_tokenizer, train_bpe

MERGES = "clip_bpe/bpe_simple_vocab_16e6.txt.gz"
CAPTIONS = [
    "a red star above a blue ring",
    "a small green circle",
    "红色的星形在蓝色的圆环上面",
    "一个绿色的小圆",
] * 20


def data_dir() -> pathlib.Path:
    """Where the shared test data lies: $DALLE2_JAX_TEST_DATA, or ../shared/data beside the repository."""
    default = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
    return pathlib.Path(os.environ.get("DALLE2_JAX_TEST_DATA") or default)


def byte_characters() -> dict[int, str]:
    """OpenAI's printable stand-in for each byte, in the order of its vocabulary."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + place) for place, byte in enumerate(rest)}


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    """The 48,894 merges that OpenAI's vocabulary of 49,408 uses."""
    path = data_dir() / MERGES
    if not path.exists():
        pytest.skip(f"{path} is absent; set DALLE2_JAX_TEST_DATA to the folder that holds {MERGES}")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:]
    return [tuple(line.split()) for line in lines[: 49408 - 2 - 512]]


@pytest.fixture(scope="module")
def vocabulary(merges) -> dict[str, int]:
    """Bytes, bytes at a word's end, merges in order, SOT, EOT."""
    letters = list(byte_characters().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    return {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


@pytest.fixture(scope="module")
def clip_folder(merges, vocabulary, tmp_path_factory) -> pathlib.Path:
    """A folder in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    pytest.importorskip("transformers", reason="loading Hugging Face's layout needs transformers")
    return load_tokenizer(clip_folder, 77)


def reference_ids(text: str, merges, vocabulary) -> list[int]:
    """Byte-pair encoding spelled out: split into words, join the pair of lowest rank until none is left."""
    regex = pytest.importorskip("regex", reason="the reference needs \\p classes")
    rank = {pair: number for number, pair in enumerate(merges)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    ids = []
    for word in regex.findall(pattern, text, regex.IGNORECASE):
        parts = [byte_characters()[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [vocabulary[part] for part in parts]
    return ids


def test_clip_vocabulary_has_openai_size_and_ends(vocabulary):
    assert len(vocabulary) == 49408
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)


def test_ids_published_for_openai_clip(clip):
    """The ids that OpenAI's CLIP and its users document: SOT and EOT 49406 and 49407, zeros after."""
    tokens, token_mask = clip(["a photo of a cat", "hello world", ""])
    assert tokens.shape == (3, 77) and tokens.dtype == np.int32 and token_mask.dtype == bool
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert tokens[1, :5].tolist() == [49406, 3306, 1002, 49407, 0]
    assert tokens[2, :3].tolist() == [49406, 49407, 0]
    assert token_mask.sum(1).tolist() == [7, 4, 2] and not tokens[~token_mask].any()


def test_clip_ids_equal_the_spelled_out_encoding(clip, merges, vocabulary):
    """Text, and what OpenAI's cleaning makes of it, written by hand."""
    cases = {
        "A RED  cube,\non a\tblue cube!": "a red cube, on a blue cube!",
        "“curly” ‘quotes’ — it’s": "\"curly\" 'quotes' — it's",
        "fish &amp; chips &amp;amp; peas &lt;3": "fish & chips & peas <3",
        "ﬁne ﬂag": "fine flag",
        "schÃ¶n": "schön",
        "ΟΔΥΣΣΕΥΣ": "οδυσσευς",  # the final sigma is its own letter
        "1234 people in 2024": "1234 people in 2024",
        "樱花 and 🌸🌸": "樱花 and 🌸🌸",
        "naïve café": "naïve café",
        "they'll've don't I'M": "they'll've don't i'm",
        "unbelievablyantidisestablishmentarian": "unbelievablyantidisestablishmentarian",
        "e\u0301t\u00e9": "été",
        "ＦＵＬＬ　ＷＩＤＴＨ": "full width",
        "a <|endoftext|> b": "a b",  # taken out: a row has one EOT
        "###@@!!~~": "###@@!!~~",
        "don&#39;t stop": "don't stop",
        "cafe&#769; <3": "cafe\u0301 <3",  # apart: beside a < ftfy leaves entities to html.unescape
        "cafe&#769; ne\u0301": "café né",
        "x² + y² = z²": "x² + y² = z²",
    }
    for text, cleaned in cases.items():
        assert " ".join(clean(text).split()) == cleaned
        tokens, token_mask = clip([text])
        expected = [49406, *reference_ids(cleaned, merges, vocabulary), 49407]
        assert tokens[0][token_mask[0]].tolist() == expected, text


def long_words():
    """Captions of 64 KiB without a space, whose cost grows with the square of their length or faster."""
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice(list("abcdefgh"), 65536)) for _ in range(4)]
    return [*letters, "&" + "amp;" * 16000, "ab" * 32768, "a" + "\u0301" * 30000, "星" * 21845]


def test_captions_of_64_kibibytes_without_a_space_are_read_soon():
    """Where all of it were merged and unescaped, this would take a minute or two."""
    began = time.monotonic()
    made = train_bpe(long_words(), 512, 77)
    tokens, token_mask = made(long_words())
    assert time.monotonic() - began < 20
    assert (tokens[:, 0] == made.sot).all() and (tokens.max(axis=1) == made.eot).all()
    assert token_mask[:4].all()  # cut, and ending in EOT
    assert made.decode(tokens[4]) == "&"  # unescaped to the end, as far as it was read


def test_what_a_row_cannot_hold_changes_nothing():
    """The rest of a long caption is not read; white space in front of it does not count."""
    caption = "A “red” cube &amp; a café, on it a schÃ¶n star. " * 300
    made = train_bpe([*CAPTIONS, caption[:48]], 600, 77)
    whole = made._encoder.encode(clean(caption), add_special_tokens=False).ids[:75]
    for text in (caption, " \n" * 8000 + caption, caption[:4000]):
        assert made([text])[0][0].tolist() == [made.sot, *whole, made.eot]


def test_clean_shortcut_equals_the_whole_way():
    """Plain ASCII skips ftfy; the result must not depend on it."""
    import html

    import ftfy

    rng = np.random.default_rng(0)
    characters = [*map(chr, range(32, 127)), "\n", "\t", "\x1b[31m", "&amp;", "é", "“"]
    for _ in range(500):
        text = "".join(rng.choice(characters, 12))
        whole = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        assert clean(text) == whole


@pytest.mark.parametrize("kind", ["clip", "bpe"])
def test_rows_are_well_formed_and_cut_rows_keep_eot(kind, request):
    if kind == "clip":
        made = load_tokenizer(request.getfixturevalue("clip_folder"), 8)
    else:
        made = train_bpe(CAPTIONS, 300, 8)
    texts = ["", "a", "word " * 30, "x" * 100_000, "a <|endoftext|><|startoftext|> b", "红" * 50]
    tokens, token_mask = made(texts)
    assert tokens.shape == (6, 8) and made.context_length == 8
    assert ((tokens == made.eot) & token_mask).sum(1).tolist() == [1] * 6
    assert (tokens[:, 0] == made.sot).all() and tokens.max() == made.eot == made.vocab_size - 1
    last = token_mask.sum(1) - 1
    assert (tokens[np.arange(6), last] == made.eot).all() and (tokens.argmax(1) == last).all()
    assert last.tolist()[2:4] == [7, 7]
    assert (np.diff(token_mask.astype(int)) <= 0).all()  # real tokens first


@pytest.fixture
def t5():
    """T5's kind of rows, on a table of words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "Red": 6, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer_module.Tokenizer(words, "t5", 32_128, 4)


def test_rows_of_t5_end_in_1_and_keep_it_where_they_are_cut(t5):
    made = t5
    tokens, mask = made(["a Red", "", "a a a Red Red"])  # T5's captions are not lowered
    assert tokens.tolist() == [[5, 6, 1, 0], [1, 0, 0, 0], [5, 5, 5, 1]]
    assert mask.sum(axis=1).tolist() == [3, 1, 4]


@pytest.mark.parametrize("kind", ["clip", "bpe"])
def test_round_trip(kind, request):
    made = request.getfixturevalue("clip") if kind == "clip" else train_bpe(CAPTIONS, 400, 77)
    for text in ["a red star above a blue ring", "红色的星形在蓝色的圆环上面", "never seen: ñ 🌸 ω"]:
        decoded = made.decode(made([text])[0][0])
        # CLIP's tokens do not say whether a space stood between a word and punctuation.
        assert decoded.replace(" ", "") == text.replace(" ", "")
        if kind == "bpe":
            assert decoded == text


def test_bpe_learns_words_in_both_languages():
    made = train_bpe(CAPTIONS, 500, 32)
    assert made.vocab_size == 500 and made.eot == 499
    _, token_mask = made(["a red star above a blue ring", "红色的星形在蓝色的圆环上面"])
    assert (token_mask.sum(1) - 2 <= [7, 10]).all()  # 28 and 39 bytes
    assert made([CAPTIONS[0]])[0].tolist() == train_bpe(iter(CAPTIONS), 500, 32)([CAPTIONS[0]])[0].tolist()
    with pytest.raises(ValueError, match="below 258"):
        train_bpe(CAPTIONS, 257, 32)
    with pytest.raises(ValueError, match="no captions"):
        train_bpe([], 300, 32)


@pytest.mark.parametrize("kind", ["clip", "bpe", "t5"])
def test_saved_tokenizer_needs_tokenizers_alone(kind, request, tmp_path):
    made = train_bpe(CAPTIONS, 400, 16) if kind == "bpe" else request.getfixturevalue(kind)
    made.save(tmp_path / "saved")
    texts = ["A red star", "红色的星形", "schÃ¶n &amp; “new”"]
    program = (
        "import sys\n"
        "absent = 'transformers', 'tensorflow', 'torch', 'sentencepiece'\n"  # importing them fails
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from dalle2_jax.data.tokenizer import load_tokenizer\n"
        f"made = load_tokenizer({str(tmp_path / 'saved')!r})\n"
        f"print(made.kind, made.vocab_size, made.context_length, made({texts!r})[0].tolist())"
    )
    root = pathlib.Path(tokenizer_module.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    expected = f"{kind} {made.vocab_size} {made.context_length} {made(texts)[0].tolist()}"
    assert run.stdout.strip() == expected
    assert load_tokenizer(tmp_path / "saved", 5).context_length == 5


def test_what_is_no_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected tokenizer.json, or vocab.json and merges.txt"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="no room"):
        train_bpe(CAPTIONS, 300, 2)

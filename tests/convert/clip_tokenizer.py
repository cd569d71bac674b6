"""A CLIP tokenizer in Hugging Face's layout with a small vocabulary: bytes, a few merges, SOT, EOT."""

import json

MERGES = ["r e", "re d</w>", "s t", "st a", "sta r</w>", "b l", "bl u", "blu e</w>"]


def write(folder, length: int = 8) -> int:
    """Writes vocab.json and merges.txt, for `length` tokens; returns the size of the vocabulary."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in own] + [chr(256 + i) for i in range(256 - len(own))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class="CLIPTokenizer",
                model_max_length=length,
                bos_token="<|startoftext|>",
                eos_token="<|endoftext|>",
                unk_token="<|endoftext|>",
                pad_token="!",
            )
        )
    )
    return len(words)

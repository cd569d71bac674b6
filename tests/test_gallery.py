"""benchmarks.gallery: what it chooses, the commands that it runs, and what it writes of them."""

import json
import shlex
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gallery
from dalle2_jax.runtime.grid import save_png
from tests.data import shards_for_tests as made

STYLES = ("3d", "flat")
HELD_OUT = {("fox", "3d"): "pair", ("zebra", "flat"): "concept"}
WORDS = {"3d": "3D", "flat": "flat"}


@pytest.fixture
def shards(tmp_path):
    """Three concepts in two styles, one pair held out, and a new concept."""
    pairs = [(concept, style) for concept in ("fox", "owl", "axe") for style in STYLES] + [("zebra", "flat")]
    for split in ("train", "val"):
        members = []
        for number, (concept, style) in enumerate(pairs):
            if ((concept, style) in HELD_OUT) != (split == "val"):
                continue
            caption = f"a {concept} in {WORDS[style]} style"
            fields = dict(concept=concept, style=style, heldout=HELD_OUT.get((concept, style)))
            fields["caption_zh"] = f"{concept}之{style}"
            members += made.sample(number, caption, made.flat_png(number), **fields)
        made.write_tar(tmp_path / f"{split}-00000.tar", members)
    return tmp_path


def fake(monkeypatch, actions):
    """Commands that write a picture for each caption, or two for an edit; the list of those that ran."""
    ran = []

    def run(words):
        ran.append(words)
        command = words[1].removeprefix("dalle2_jax.")
        positional = [word for word in words[2:] if not word.startswith("--")]
        out = Path(words[-1].removeprefix("--out="))
        names = positional if command == "generate" else ["one", "two"]
        files = [f"{i:04d}.png" for i in range(len(names))]
        for i, name in enumerate(files):
            save_png(out / name, np.full((16, 16, 3), 5 * i, np.uint8))
        (out / f"{command}.json").write_text(json.dumps({"pictures": [{"file": name} for name in files]}))

    monkeypatch.setattr(gallery.systems, "run", run)
    load = types.SimpleNamespace(load=lambda _: types.SimpleNamespace(actions=dict.fromkeys(actions)))
    monkeypatch.setattr(gallery, "Pipeline", load)
    return ran


def test_every_picture_has_its_command(tmp_path, shards, monkeypatch):
    ran = fake(monkeypatch, ("draw", "variations", "interpolate", "textdiff", "inpaint"))
    arguments = ["--model=M", f"--shards={shards}", f"--out={tmp_path / 'out'}", "--styles=3d,flat"]
    gallery.main(arguments)
    text = (tmp_path / "out/commands.md").read_text("utf-8")
    blocks = [part.split("```")[0] for part in text.split("```bash\n")[1:]]
    typed = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    assert typed == [["python", *words] for words in ran]
    shown = [part.split(")")[0] for part in text.split("](")[1:]]
    folders = [words[-1].removeprefix(f"--out={tmp_path}/out/") for words in ran]
    assert [name.split("/")[0] for name in shown] == folders and len(ran) == 12
    assert (tmp_path / "out/concepts/table.png").exists() and (tmp_path / "out/validation/table.png").exists()
    assert shown[folders.index("chinese")] == "chinese/table.png"
    first = ran[0][2:8]  # the concept with a held-out pair comes first
    assert first[:2] == ["a fox in 3D style", "a fox in flat style"]
    assert set(first[2:]) == {
        f"a {name} in {word} style" for name in ("owl", "axe") for word in WORDS.values()
    }
    assert {"fox之3d", "zebra之flat"} <= set(ran[folders.index("chinese")])
    drawn, edited = (ran[folders.index(name)] for name in ("textdiff", "textdiff-2"))
    source, target = gallery.DIFFS[1]
    assert drawn[3] == source
    assert edited[2:6] == ["textdiff", f"{tmp_path}/out/textdiff/0001.png", target, f"--source={source}"]
    gallery.main([*arguments[:2], f"--out={tmp_path / 'again'}", *arguments[3:]])
    again = (tmp_path / "again/commands.md").read_text("utf-8")
    assert again == text.replace(f"{tmp_path}/out", f"{tmp_path}/again")


def test_an_action_that_the_model_lacks_is_said(tmp_path, shards, monkeypatch):
    ran = fake(monkeypatch, ("draw", "inpaint"))
    gallery.main(["--model=M", f"--shards={shards}", f"--out={tmp_path / 'out'}", "--styles=3d,flat"])
    text = (tmp_path / "out/commands.md").read_text("utf-8")
    assert text.count("The model cannot do this: it has draw, inpaint.") == 3 and len(ran) == 6


def test_marks_and_names(shards):
    records = gallery.read_records(shards, STYLES)
    held_out = [record for record in records if record["heldout"]]
    assert gallery.marks_of(held_out, records) == ["held out, twin in training", "new concept, new words"]
    assert set(gallery.marks_of(records, records)) == {"", *gallery.marks_of(held_out, records)}
    for caption, style, name in (
        ("3D emoji of a dog face", "3d", "a dog face"),
        ("a twemoji icon of an owl", "twemoji", "an owl"),
        ("the Leo zodiac sign, noto emoji", "noto", "the Leo zodiac sign"),
        ("a black and white sketch of rain", "sketch", "rain"),
        ("in words of its own", "flat", "an elf with dark skin tone"),
    ):
        record = dict(caption=caption, style=style, concept="elf: dark skin tone")
        assert gallery.name_of(record) == name
    with pytest.raises(SystemExit, match="no records of the styles noto"):
        gallery.read_records(shards, ("noto",))

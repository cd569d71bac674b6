"""Emoji in styles: the suite of captions by which drawings are judged, and the program that builds shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.emoji_styles import shards, suite
from dalle2_jax.evaluate import picture_sets, prompts
from tests.data import shards_for_tests as made

STYLES = ("3d", "flat", "noto")
HELD_OUT = {("red fox", "3d"): "pair", ("red fox", "noto"): "pair", ("blue hat", "noto"): "concept"}
HELD_OUT |= {("green zebra", "flat"): "concept"}
CONCEPTS = ("red fox", "blue fox", "red hat", "green cup")


def write_shards(folder):
    """Four concepts in three styles but for what is held out, and two new ones; "zebra" is a new word."""
    train = [(concept, style) for concept in CONCEPTS for style in STYLES if (concept, style) not in HELD_OUT]
    for split, records in (("train", train), ("val", list(HELD_OUT))):
        members = []
        for number, (concept, style) in enumerate(records):
            fields = dict(concept=concept, style=style, heldout=HELD_OUT.get((concept, style)))
            image = made.flat_png(number + 50 * (split == "val"))
            members += made.sample(100 * (split == "val") + number, f"a {concept}, {style}", image, **fields)
        made.write_tar(folder / f"{split}-00000.tar", members)


def test_kinds_distractors_and_real_pictures(tmp_path, capsys):
    write_shards(tmp_path)
    suite.main([str(tmp_path), str(tmp_path / "suite"), "--train=3"])
    assert capsys.readouterr().out == "3 train, 1 pair_twin, 1 pair, 1 concept, 1 concept_new_word\n"
    lines = prompts.read_prompts(tmp_path / "suite/prompts.jsonl")
    kinds = {(line["concept"], line["style"]): line["kind"] for line in lines[3:]}
    assert kinds == {
        ("red fox", "3d"): "pair_twin",  # flat has the same design
        ("red fox", "noto"): "pair",
        ("blue hat", "noto"): "concept",
        ("green zebra", "flat"): "concept_new_word",
    }
    for line in lines:
        assert line["class"] == ("3D" if line["style"] == "3d" else line["style"])
        assert line["prompt"] not in line["others"] and len(line["others"]) >= 2
        assert all(text.endswith(line["style"]) for text in line["others"])
    opened = picture_sets.open_pictures(tmp_path / "suite")
    assert opened.count == len(lines) == 7 and opened.captions() == [line["prompt"] for line in lines]
    pixels = [tuple(item.picture()[0, 0]) for item in opened.items()][3:]
    assert pixels == [made.colour_of(50 + number) for number in range(4)]


def test_styles_and_seed_choose(tmp_path, capsys):
    write_shards(tmp_path)
    for name, more in (("a", []), ("b", []), ("c", ["--seed=1"])):
        suite.main([str(tmp_path), str(tmp_path / name), "--styles=noto", "--train=2", *more])
    texts = [(tmp_path / name / "prompts.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert {json.loads(line)["style"] for line in texts[0].splitlines()} == {"noto"}
    assert capsys.readouterr().out.splitlines()[0] == "2 train, 1 pair, 1 concept"


def package(folder, name, files):
    """A package as `npm pack` writes it."""
    with tarfile.open(folder / f"{name}.tgz", "w:gz") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_shards_are_built_from_packages(tmp_path):
    """Of a style without SVG: drawings are cut and centred, a small square stays small; captions, splits."""
    labels = {"1F98A": "fox", "25AB-FE0F": "white small square", "2B1C": "white large square"}
    labels["1F469-1F3FD-200D-1F373"] = "woman cook: medium skin tone"
    entries = [dict(label=label, hexcode=code, group=0, tags=["x"]) for code, label in labels.items()]
    entries[3] = dict(label="woman cook", hexcode="1F469", group=1, skins=[entries[3]])
    files = {f"{language}/data.json": json.dumps(entries).encode() for language in ("en", "zh")}
    groups = [dict(order=0, key="animals-nature"), dict(order=1, key="people-body")]
    files["en/messages.json"] = json.dumps({"groups": groups}).encode()
    package(tmp_path, "emojibase-data-17.0.0", files)
    drawn = Image.new("RGBA", (100, 100))
    drawn.paste((255, 0, 0, 255), (20, 40, 60, 60))  # 40 x 20, off the centre
    webp = made.encode(drawn, "WEBP", lossless=True)
    assets = {f"assets/{code.lower()}.webp": webp for code in labels}
    large = Image.new("RGBA", (100, 100), (255, 0, 0, 255))
    assets["assets/2b1c.webp"] = made.encode(large, "WEBP", lossless=True)
    package(tmp_path, "lobehub-fluent-emoji-3d-1.1.0", assets)
    (tmp_path / "records.txt").write_text("1f98a 3\ta red fox\n1f469_1f3fd_200d_1f373 3\n25ab f/3\n")
    arguments = [str(tmp_path), str(tmp_path / "out"), f"--records={tmp_path / 'records.txt'}", "--styles=3d"]
    shards.main(arguments)
    train, val = suite.read(tmp_path / "out", "train"), suite.read(tmp_path / "out", "val")
    assert set(train) == {"1f98a-3d", "1f469_1f3fd_200d_1f373-3d"} and set(val) == {"25ab-3d"}
    assert "a red fox" in train["1f98a-3d"]["caption"] and "3D" in train["1f98a-3d"]["caption"]
    cook = train["1f469_1f3fd_200d_1f373-3d"]
    assert "woman cook with medium skin tone" in cook["caption"] and cook["group"] == "people-body"
    assert cook["license"] == "MIT" and cook["heldout"] is None and val["25ab-3d"]["heldout"] == "pair"
    red = {}
    for key, record in (train | val).items():
        pixels = np.asarray(Image.open(io.BytesIO(record["png"])))
        assert pixels.shape == (128, 128, 3) and (pixels[0, 0] == 255).all()
        rows, columns = np.nonzero(pixels[..., 1] < 128)
        red[key] = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    assert red["1f98a-3d"] == (35, 93, 6, 122)  # 116 x 58
    assert red["25ab-3d"][3] - red["25ab-3d"][2] == pytest.approx(0.4 * 116, abs=1)  # 40 of 100
    again = tmp_path / "again"
    shards.main([arguments[0], str(again), *arguments[2:]])
    assert (again / "train-00000.tar").read_bytes() == (tmp_path / "out/train-00000.tar").read_bytes()


def test_every_line_of_the_list_is_read():
    entries = shards.read_records(Path(shards.__file__).with_name("records.txt"))
    keys = [f"{code}-{style}" for code, style, *_ in entries]
    assert len(set(keys)) == len(keys) == 10004
    assert sum(split == "val" for _, _, split, _ in entries) == 231

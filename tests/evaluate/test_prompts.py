"""Suites of prompts: their files, and pictures where GenEval's evaluator looks for them."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.evaluate import prompts


def test_the_files_of_three_suites_are_read(tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text(
        '{"tag": "one", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
    )
    (tmp_path / "drawbench.csv").write_text('Prompts,Category\n"A red car, parked.",Colors\nA cat,Counting\n')
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\tChallenge\tNote\na bear\tAnimals\tBasic\t\n")
    (tmp_path / "own.txt").write_text("a star\n\n一个红色的圆\n", "utf-8")
    (first,) = prompts.read_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert first["prompt"] == "a photo of a bench" and first["include"] == [{"class": "bench", "count": 1}]
    found = prompts.read_prompts(tmp_path / "drawbench.csv")
    assert found[0] == {"Category": "Colors", "prompt": "A red car, parked."} and len(found) == 2
    assert prompts.read_prompts(tmp_path / "parti.tsv")[0]["prompt"] == "a bear"
    assert [row["prompt"] for row in prompts.read_prompts(tmp_path / "own.txt")] == ["a star", "一个红色的圆"]
    (tmp_path / "half.json").write_text('["\\ud83d a cat"]')
    assert prompts.read_prompts(tmp_path / "half.json")[0]["prompt"] == "\ufffd a cat"
    for name, text, message in (
        ("none.csv", "Text,Kind\na cat,x\n", "none.csv: its first line has none .*it has 'Text', 'Kind'"),
        ("none.jsonl", '{"text": "a cat"}', "none.jsonl: entry 1 has none of 'prompt'.* it has 'text'"),
        ("number.jsonl", '"a cat"\n{"prompt": 3}', "entry 2 has 3 for 'prompt': give a text"),
        ("line.jsonl", '"a cat"\n\n{', "line.jsonl: line 3 cannot be read as JSON"),
        ("object.json", '{"a": 1}', "object.json: the file cannot be read as JSON: it must be a list"),
        (
            "comma.csv",
            "Prompts,Kind\na cat, a dog,x\n",
            "line 2 has more cells than the first line, such as 'x'",
        ),
        ("empty.txt", "\n", "at least one caption"),
        ("long.txt", "x" * 1001, "1001 characters"),
        ("list.json", "[]", "at least one caption"),
        ("list.xml", "", "ends in"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts.read_prompts(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "Prompts,Category\r\na red star,Colors\r\n,\r\nein grüner Kreis,Colors\r\n"),
        ("b.CSV", "Prompts;Category\r\na red star;Colors\r\nein grüner Kreis;Colors\r\n"),
        ("c.csv", ",PROMPT\r\n0,a red star\r\n1,ein grüner Kreis\r\n"),
        ("d.tsv", "Prompt\tCategory\r\na red star\t\r\nein grüner Kreis\t\r\n"),
        ("e.txt", "a red star\r\n\r\nein grüner Kreis\r\n"),
        ("f.json", '["a red star", {"prompt": "ein grüner Kreis"}]'),
        ("g.jsonl", '{"prompt": "a red star"}\n\n"ein grüner Kreis"\n'),
    ],
    ids="abcdefg",
)
def test_files_of_spreadsheets_and_editors_are_read(tmp_path, name, text, encoding):
    """With the byte-order marks that they write, which belong to no prompt and no column."""
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = prompts.read_prompts(tmp_path / name)
    assert [row["prompt"] for row in found] == ["a red star", "ein grüner Kreis"]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.json", "a.jsonl"])
def test_a_file_in_another_encoding_is_named(tmp_path, name):
    (tmp_path / name).write_bytes("Prompts\nein grüner Kreis\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}: line 2 holds the byte 0xfc, .* save the file as UTF-8"):
        prompts.read_prompts(tmp_path / name)


class Model:
    """An `UnCLIP` that draws the number of the caption's letters, and counts what it is asked for."""

    name = "letters"

    def __init__(self):
        self.drawn = []
        stages = {"clip": None}
        self.engine = types.SimpleNamespace(stages=stages, weights_sha256=lambda name: "ab")

    def settings(self, **asked):
        return asked

    def text_to_image(self, captions, *, n, **_):
        if len(self.drawn) + len(captions) > getattr(self, "dies_after", 99):
            raise KeyboardInterrupt
        self.drawn += captions
        shades = [np.full((8, 8, 3), len(caption), np.uint8) for caption in captions for _ in range(n)]
        return types.SimpleNamespace(images=np.stack(shades))


def test_pictures_lie_as_geneval_wants_them_and_drawing_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "AT_A_TIME", 4)  # two prompts of two
    rows = [{"tag": "x", "prompt": "a" * (i + 1)} for i in range(5)]
    model = Model()
    model.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        prompts.draw(model, rows, tmp_path / "out", n=2)
    assert model.drawn == ["a", "aa"]
    (tmp_path / "out/00001/grid.png").unlink()  # as if it had been stopped in between
    model = Model()
    out = prompts.draw(model, rows, tmp_path / "out", n=2)
    assert model.drawn == ["aa", "aaa", "aaaa", "aaaaa"]
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{i:05d}" for i in range(5)),
        "plan.json",
        "prompts.jsonl",
    ]
    for i in range(5):
        assert json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) == rows[i]
        assert sorted(p.name for p in (out / f"{i:05d}/samples").iterdir()) == ["0000.png", "0001.png"]
        assert np.asarray(Image.open(out / f"{i:05d}/samples/0001.png")).max() == i + 1
    with pytest.raises(ValueError, match="of another plan"):
        prompts.draw(model, rows, tmp_path / "out", n=2, seed=1)

"""Drawings of a suite judged by another model: ranks, classes, intervals by caption; what is memorised."""

import json
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.evaluate import evaluate, networks, picture_sets
from dalle2_jax.evaluate.metric import Features, Request, share_by_caption, wilson
from dalle2_jax.evaluate.metrics import memorised, suites
from tests.tiny_model import make_class_model, make_model

TEXTS = {"east": (1, 0), "north": (0, 1), "west": (-1, 0), "south": (0, -1)}
CLASSES = ("red star", "blue ring")


class Clip:
    """Captions as directions, and the number of texts that it was asked for."""

    asked = 0

    def encode_text(self, texts, batch_size):
        self.asked += len(texts)
        return (np.array([TEXTS[text] for text in texts], np.float32), None), None


def set_of(texts, fields=(), name="set"):
    return picture_sets.PictureSet(name, "memory", len(texts), lambda: iter(()), tuple(texts), fields=fields)


def features(images, pictures, reference=None, beside=None, **nets):
    nets = networks.Networks(clip=Clip(), **nets)
    images, reference = (None if x is None else np.array(x, np.float32) for x in (images, reference))
    return Features(images, reference, pictures, nets, 0, beside)


def test_pictures_of_one_caption_are_one_sample_of_captions():
    """Alone they have Wilson's interval; copies of a picture add nothing, independent ones do."""
    right = np.array([1, 1, 1, 0, 1, 0], bool)
    alone = share_by_caption(right, list("abcdef"))
    assert alone["value"] == 4 / 6 and alone["interval"] == pytest.approx(wilson(4, 6))
    copies = share_by_caption(np.repeat(right, 8), list(np.repeat(list("abcdef"), 8)))
    assert copies["interval"] == pytest.approx(alone["interval"])
    assert (copies["n"], copies["captions"]) == (48, 6)
    equal = share_by_caption(np.tile([True, False], 6), list(np.repeat(list("abcdef"), 2)))
    assert equal["interval"] == pytest.approx(wilson(6, 12))  # each caption has the same share
    assert share_by_caption(np.ones(16, bool), list("ab") * 8)["interval"] == pytest.approx(wilson(2, 2))
    unequal = share_by_caption(np.array([1, 1, 1, 0], bool), ["a", "a", "a", "b"])
    assert unequal["value"] == 0.5  # the mean of 1 and 0


def test_a_prompt_is_ranked_among_its_others(monkeypatch):
    lines = (
        {"kind": "near", "others": ["north", "east", "north"]},  # its own text and a repeated one
        {"kind": "near", "others": ["north"]},
        {"kind": "far", "others": ["north", "east", "west", "south"]},
    )
    pictures = set_of(["east", "east", "east"], lines)
    assert suites.choices(pictures, 0) == {"east": ["north"]}  # the first line of a caption decides
    pictures = set_of(["east", "west", "south"], lines)
    assert suites.choices(pictures, 0)["east"] == ["north"]
    images = [(3, 1), (1, 1), (1, 0)]  # of any norm
    found = suites._top("clip_top", features(images, pictures))
    assert suites.ranks(np.float32(images), pictures, networks.Networks(clip=Clip()), 0).tolist() == [0, 1, 2]
    assert found["clip_top1/near"]["value"] == 0.5 and found["clip_top1/far"]["value"] == 0
    assert found["clip_top5/far"]["value"] == 1 and found["clip_top1/near"]["n"] == 2
    plain = set_of(["east", "east", "west", "north"])
    assert {text: sorted(others) for text, others in suites.choices(plain, 0).items()} == {
        text: sorted({"east", "west", "north"} - {text}) for text in ("east", "west", "north")
    }
    monkeypatch.setattr(suites, "OTHERS", 1)
    drawn = [suites.choices(plain, seed)["east"][0] for seed in range(20)]
    assert set(drawn) == {"west", "north"} and drawn[0] == suites.choices(plain, 0)["east"][0]
    for others, message in (("north", "must be a list of texts"), (["east"], "needs other captions")):
        with pytest.raises(ValueError, match=message):
            suites.choices(set_of(["east"], ({"others": others},)), 0)


def test_the_reference_has_its_numbers_beside():
    lines = ({"kind": "a"}, {"kind": "b"})
    drawn, real = set_of(["east", "west"], lines, "drawn"), set_of(["east", "west"], lines[:1] * 2, "real")
    x = features([(1, 0), (1, 0)], drawn, [(1, 0), (0, 1)], real)
    found = suites._top("clip_top", x)
    assert list(found)[:2] == ["clip_top1/a", "clip_top1/a of the reference"]
    assert found["clip_top1/a"]["of_reference"] == 2.0 and found["clip_top1/a"]["images"] == "drawn"
    assert found["clip_top1/a of the reference"]["value"] == 0.5
    assert "of_reference" not in found["clip_top1/b"]  # a kind that the reference does not have


def test_classes_are_those_of_lines_or_captions():
    configs = {"classifier": {"data": {"classes": CLASSES}}}
    judge = types.SimpleNamespace(engine=types.SimpleNamespace(configs=configs))
    log_p = np.log([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    texts = ["a red star", "two red stars", "one blue ring", "a red star beside a blue ring"]
    pictures = set_of(texts, ({}, {"class": "blue ring"}, {}, {}))
    found = suites._class_accuracy("class_accuracy", features(log_p, pictures, classifier=judge))
    assert found["class_accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["class_accuracy"]["without_class"] == 1 and found["class_accuracy"]["n"] == 3
    with pytest.raises(ValueError, match="no caption names exactly one class of red star, blue ring"):
        suites._class_accuracy("class_accuracy", features(log_p, set_of(["x"] * 4), classifier=judge))


def test_nearer_to_a_training_picture_than_that_one_to_another(monkeypatch):
    monkeypatch.setattr(memorised, "_CHUNK", 5)
    draw = np.random.default_rng(0)
    y = draw.normal(size=(23, 4)).astype(np.float32)
    x = np.concatenate([draw.normal(size=(9, 4)), y[:2] * 3 + 1e-3]).astype(np.float32)
    rows, cosines = memorised.nearest(x, y)
    units = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    between = units[0] @ units[1].T
    np.testing.assert_array_equal(rows, between.argmax(axis=1))
    np.testing.assert_allclose(cosines, between.max(axis=1), atol=1e-6)
    own = units[1] @ units[1].T - 3 * np.eye(23)
    expected = between.max(axis=1) > own[rows].max(axis=1)
    entry = memorised._memorised("memorised", features(x, set_of(["a"] * 11), y))["memorised"]
    assert entry["value"] == expected.mean() and expected[-2:].all() and 0 < expected.mean() < 1
    assert entry["cosine_quantiles"]["drawings"]["1"] == pytest.approx(1, abs=1e-4)
    assert [pair[2] for pair in entry["pairs"]] == expected.tolist()


def write_suite(folder, lines, pictures, seed):
    """A drawn suite of noise in the layout of `prompts`, with a grid beside the samples."""
    draw = np.random.default_rng(seed)
    for number in range(len(lines)):
        samples = folder / f"{number:05d}/samples"
        samples.mkdir(parents=True)
        for i in range(pictures):
            image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
            image.save(samples / f"{i:04d}.png")
        image.save(folder / f"{number:05d}/grid.png")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_drawn_suite_is_judged_by_a_model_with_both(tmp_path):
    """Folder to report: samples alone are pictures, lines give kinds, the page shows the nearest pairs."""
    lines = [
        {"prompt": f"a {colour}", "kind": kind, "others": ["a green cross", "a circle"]}
        for colour, kind in (("red star", "seen"), ("blue ring", "seen"), ("yellow circle", "unseen"))
    ]
    drawn = write_suite(tmp_path / "drawn", lines, 2, 0)
    real = write_suite(tmp_path / "real", lines, 1, 1)
    opened = picture_sets.open_pictures(drawn)
    assert opened.count == 6 and opened.captions()[:3] == ["a red star", "a red star", "a blue ring"]
    assert [line["kind"] for line in opened.fields] == ["seen"] * 4 + ["unseen"] * 2
    assert not opened.refused and "6 pictures of 6 files" in opened.describe()
    model = pipeline.UnCLIP.load(make_class_model(tmp_path / "classes", CLASSES))
    names = ("clip_top", "class_accuracy", "memorised", "clip_mmd_unbiased")
    request = Request(names, images=str(drawn), reference=str(real), batch_size=8, out=str(tmp_path / "out"))
    with networks.open_judge(str(make_model(tmp_path / "judge", extended=True))) as judge:
        report, text = evaluate.evaluate(model, request, epath.Path(tmp_path / "out"), judge)
        images = np.stack([item.picture() for item in opened.items()])
        embeds = judge.encode_image(images)
        sha256 = [judge.engine.weights_sha256(name) for name in ("clip", "classifier")]
    assert (
        report["judge"]["weights_sha256"] == sha256[0] and report["judge"]["classifier_sha256"] == sha256[1]
    )
    assert text[0] == f"judge: CLIP and classifier of tiny, sha256 {', '.join(sha256)}"
    for kind, count in (("seen", 4), ("unseen", 2)):
        for name in (f"clip_top1/{kind}", f"class_accuracy/{kind}"):
            assert report[name]["n"] == count and report[f"{name} of the reference"]["n"] == count // 2
            assert report[name]["features"].endswith("of the judge tiny")
        assert report[f"clip_top5/{kind}"]["value"] == 1  # of three choices
    assert "pairs" not in report["memorised"] and report["memorised"]["n_reference"] == 3
    found = [json.loads(line) for line in (tmp_path / "out/memorised.jsonl").read_text().splitlines()]
    assert [x["cosine"] for x in found] == sorted((x["cosine"] for x in found), reverse=True)
    assert found[0]["nearest"].endswith("samples/0000.png") and found[0]["nearest_caption"] in str(lines)
    assert {x["picture"] for x in found} == {item.key for item in opened.items()}
    with Image.open(tmp_path / "out/memorised_pairs.png") as sheet:
        assert sheet.width > 8 * memorised.SIDE and len(json.loads(sheet.text["pairs"])) == 6
    assert np.isfinite(embeds).all() and "clip_top1/seen of the reference" in text[-1]
    evaluate.write_report(epath.Path(tmp_path / "out"), report, text, str(tmp_path / "page.html"))
    assert "memorised pairs" in (tmp_path / "page.html").read_text()


def test_a_suite_that_is_not_drawn_or_a_model_without_classifier_is_refused(tmp_path):
    folder = write_suite(tmp_path / "drawn", [{"prompt": "a red star"}] * 2, 1, 0)
    model = pipeline.UnCLIP.load(make_class_model(tmp_path / "classes", CLASSES))
    request = Request(("class_accuracy",), images=str(folder), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="class_accuracy needs a classifier: give --judge=DIR"):
        evaluate.evaluate(model, request, epath.Path(tmp_path / "out"))
    (folder / "00001/samples/0000.png").unlink()
    with pytest.raises(ValueError, match="00001 has no samples of 'a red star': draw the suite again"):
        picture_sets.open_pictures(folder)
    (folder / "prompts.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl is not as dalle2_jax.evaluate writes it"):
        picture_sets.open_pictures(folder)

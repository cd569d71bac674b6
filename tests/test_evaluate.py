"""Measuring a model: counts and intervals, captions, and what a model with random weights scores."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import comparison, drawing, metric, networks, picture_sets
from dalle2_jax.evaluate.metric import Request
from dalle2_jax.evaluate.metrics import loss, retrieval, zero_shot
from dalle2_jax.evaluate.metrics import scenes as scenes_metric
from dalle2_jax.generate.flags import define_sampling_flags
from tests.tiny_model import make_class_model, make_model

CONFIG = scenes.preset("quickstart")
FLAGS = flags.FLAGS
if "guidance_scale" not in FLAGS:
    define_sampling_flags()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the checker returns, as far as it is counted."""

    colour: bool = True
    shape: bool = True
    relation: bool | None = None
    count: bool = True
    background: bool | None = None

    @property
    def correct(self) -> bool:
        return all(value is not False for value in dataclasses.astuple(self))


def test_wilson_solves_its_own_equation():
    """At its ends the observed share is exactly z standard deviations away."""
    z = 1.959964
    for right, count in ((26, 32), (1, 10), (500, 1000)):
        for end in metric.wilson(right, count):
            assert abs(right / count - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count))
    assert metric.wilson(0, 10)[0] == 0 and metric.wilson(10, 10)[1] == pytest.approx(1)
    assert metric.wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="11 of 10"):
        metric.wilson(11, 10)


def test_scores_are_counted_by_kind():
    single = [Verdict(), Verdict(colour=False), Verdict(shape=False, background=True), Verdict(count=False)]
    pair = [Verdict(relation=True), Verdict(relation=False)]
    scores = scenes_metric.score(single + pair, ["single"] * 4 + ["pair"] * 2)
    assert scores["single"]["n"] == 4
    assert [scores["single"][a] for a in ("colour", "shape", "named", "count", "correct")] == [
        0.75,
        0.75,
        0.5,
        0.75,
        0.25,
    ]
    assert scores["single"]["relation"] is None and scores["single"]["background"] == 1.0
    assert scores["pair"]["relation"] == 0.5 and scores["pair"]["named"] == 0.5
    assert "relation" not in scores["single"]["interval"]
    low, high = scores["single"]["interval"]["named"]
    assert low < 0.5 < high
    lines = scenes_metric.table(scores).splitlines()
    assert len(lines) == 3 and "-" in lines[1] and "0.500" in lines[2]


def test_captions_are_split_over_the_kinds():
    captions, kinds = scenes_metric.draw_captions(CONFIG, 130, seed=3)
    assert [kinds.count(kind) for kind in scenes.KINDS] == [33, 33, 32, 32]
    assert captions == scenes_metric.draw_captions(CONFIG, 130, seed=3)[0]
    assert captions != scenes_metric.draw_captions(CONFIG, 130, seed=4)[0]


def test_scenes_of_captions_show_what_they_say():
    """The checker finds every caption right of each of its scenes, which are not all alike."""
    check = pytest.importorskip("dalle2_jax.evaluate.scenes", reason="the checker needs scipy").check
    captions, _ = scenes_metric.draw_captions(CONFIG, 24, seed=3)
    drawn = scenes_metric.draw_scenes(CONFIG, 24, 2, seed=3)
    pictures = [item.picture() for item in picture_sets.rendered("scenes", drawn, 64).items()]
    for i, caption in enumerate(captions):
        assert check(pictures[2 * i], caption).correct and check(pictures[2 * i + 1], caption).correct
        assert (pictures[2 * i] != pictures[2 * i + 1]).any()
    assert not check(pictures[0], captions[1]).correct
    assert len(drawn) == 48 and drawn == scenes_metric.draw_scenes(CONFIG, 24, 2, seed=3)


def test_a_model_without_captions_is_measured_by_its_legal_scenes(tmp_path):
    drawn = [scenes.render(scene, 32) for scene in scenes_metric.draw_scenes(CONFIG, 6, 1, seed=3)]
    images = np.stack([*drawn, np.zeros_like(drawn[0])])

    class Model:
        reads_captions = False

        def text_to_image(self, *, n, seed, **_):
            assert (n, seed) == (7, 5)
            return SimpleNamespace(images=images)

    scores, pictures = scenes_metric.measure(Model(), tmp_path, config=CONFIG, n=7, seed=5)
    assert scores["uncaptioned"]["n"] == 7 and scores["uncaptioned"]["legal"] == 6 / 7
    low, high = scores["uncaptioned"]["interval"]["legal"]
    assert low < 6 / 7 < high and "legal scenes: 0.857 of 7" in scenes_metric.table(scores)
    assert pictures.count == 7 and (tmp_path / "scenes_uncaptioned.png").exists()


def test_retrieval_asks_for_different_facts():
    chosen, captions = retrieval.unseen_scenes(CONFIG, 100, seed=1)
    assert len(set(captions)) == 100
    assert len({retrieval.facts(scene) for scene in chosen}) == 100
    counts = {len(scene.objects) for scene in chosen}
    assert counts == {1, 2}
    with pytest.raises(ValueError, match="distinct facts"):
        retrieval.unseen_scenes(dataclasses.replace(CONFIG, count_weights=(1.0,), sizes=CONFIG.sizes[:1]), 60)


def test_one_fact_said_twice_is_one_fact():
    def thing(colour, shape):
        return scenes.SceneObject(colour, shape, "large", 0.5, 0.5, 0.4)

    star, ring = thing("red", "star"), thing("blue", "ring")
    first = scenes.Scene((star, ring), ("above",), "white")
    assert retrieval.facts(first) == retrieval.facts(scenes.Scene((ring, star), ("below",), "black"))
    assert retrieval.facts(first) != retrieval.facts(scenes.Scene((star, ring), ("below",), "white"))
    assert retrieval.facts(first) != retrieval.facts(scenes.Scene((star, ring), ("left of",), "white"))


def test_retrieval_counts_both_ways():
    image = np.eye(4, dtype=np.float32)
    text = image[[0, 1, 1, 3]] * 5 + 0.01  # the third text is the second's
    found = retrieval.retrieval(image, text)
    assert found["text_to_image"] == 0.75 and found["n"] == 4
    assert found["image_to_text"] == 0.75  # nothing matches the third picture: its first is taken


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipeline.UnCLIP.load(make_model(tmp_path_factory.mktemp("tiny")))


def test_perfect_pictures_score_one(model, monkeypatch, tmp_path):
    """With the renderer in place of the model, the judge finds everything right."""
    pytest.importorskip("scipy", reason="the checker needs scipy")

    def draw(captions, **_):
        drawn = []
        for caption in captions:
            words = caption.split()
            colour, shape = next(p for p in zip(words, words[1:], strict=False) if p[1] in scenes.SHAPES)
            background = next((word for word in words if word in scenes.BACKGROUNDS), "white")
            thing = scenes.SceneObject(colour, shape, "large", 0.5, 0.5, 0.55)
            drawn.append(scenes.render(scenes.Scene((thing,), (), background), 64))
        images = np.stack(drawn)
        embeds = np.zeros((len(images), 4), np.float32)
        return pipeline.Result(tuple(captions), (0,) * len(images), 0, embeds, images, images, {}, {})

    monkeypatch.setattr(model, "text_to_image", draw)
    one_object = dataclasses.replace(CONFIG, count_weights=(1.0,), sizes=CONFIG.sizes[:1])
    scores, _ = scenes_metric.measure(model, tmp_path, config=one_object, n=12)
    assert {kind: entry["correct"] for kind, entry in scores.items()} == dict(
        single_seen=1.0, single_heldout=1.0
    )
    grid = Image.open(tmp_path / "scenes_single_seen.png")
    assert all(label.startswith("right: ") for label in json.loads(grid.text["captions"]))
    assert len((tmp_path / "scenes.jsonl").read_text().splitlines()) == 12


def test_random_weights_draw_nothing_right(model, tmp_path):
    pytest.importorskip("scipy", reason="the checker needs scipy")
    scores, drawn = scenes_metric.measure(
        model, tmp_path, config=CONFIG, n=8, settings=dict(guidance_scale=2.0)
    )
    assert drawn.count == 8 and len(drawn.captions()) == 8
    assert list(scores) == list(scenes.KINDS)
    assert all(entry["named"] == 0 and entry["n"] == 2 for entry in scores.values())
    found = retrieval.measure(model, retrieval.unseen_pictures(CONFIG, 64, n=20))
    assert found["n"] == 20 and found["image_to_text"] < 0.5


def test_the_scenes_of_a_model_are_known_or_asked_for(model):
    with pytest.raises(ValueError, match="trained on 'debug_64' of source 'scenes'.*--scenes=quickstart"):
        drawing.scenes_of(model)
    config, side = drawing.scenes_of(model, "full")
    assert config.name == "full" and side == 64
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        drawing.scenes_of(model, "quickstrat")


# Zero-shot classification


def test_a_class_is_the_mean_of_its_templates():
    table = {"a": [2.0, 0, 0], "the a": [0, 1.0, 0], "b": [0, 0, 1.0], "the b": [0, 0, 3.0]}
    classes = zero_shot.class_embeddings(
        lambda texts: np.array([table[t] for t in texts]), ["a", "b"], ("{}", "the {}")
    )
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], atol=1e-6)


def test_the_label_is_looked_for_among_the_nearest():
    classes = np.eye(6, dtype=np.float32)
    images = np.array([[0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]])
    assert zero_shot.accuracy(images, classes, [0, 5]) == {"n": 2, "classes": 6, "top1": 0.5, "top5": 0.5}
    assert zero_shot.accuracy(images, classes, [4, 1])["top5"] == 1.0
    assert "top5" not in zero_shot.accuracy(images[:, :3], classes[:3, :3], [0, 1])


def test_scenes_to_classify_have_one_object_and_cover_held_out_pairs():
    chosen, names, labels = zero_shot.single_objects(CONFIG, 40)
    assert len(chosen) == len(labels) == 40 and len(names) == 36
    for scene, label in zip(chosen, labels, strict=True):
        (thing,) = scene.objects
        assert names[label] == f"{thing.colour} {thing.shape}"
    assert len(set(labels)) > 15


def test_the_bundled_clip_classifies_what_it_never_saw():
    found = zero_shot.measure(pipeline.UnCLIP.load(), *zero_shot.unseen_pictures(CONFIG, 64, n=60))
    assert found["n"] == 60 and found["classes"] == 36 and found["top1"] > 0.8


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A folder of unseen scenes of one object with captions, two of each caption."""
    folder = tmp_path_factory.mktemp("captioned")
    found, names, labels = zero_shot.single_objects(CONFIG, 30)
    for i, (scene, label) in enumerate(zip(found + found[:5], labels + labels[:5], strict=True)):
        Image.fromarray(scenes.render(scene, 64)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {names[label]}")
    return picture_sets.open_pictures(folder), names


def test_clip_is_measured_on_pictures_with_captions(captioned):
    pictures, names = captioned
    model = pipeline.UnCLIP.load()
    found = retrieval.measure(model, pictures, n=100)
    assert found["n"] == len(set(pictures.texts)) < 35  # one of each caption
    assert found["image_to_text"] > 0.7
    found = zero_shot.measure(model, pictures, names, n=20)
    assert found["n"] == 20 and found["classes"] == 36 and found["top1"] > 0.7
    turned = names[1:] + names[:1]  # the same classes, otherwise numbered
    assert zero_shot.measure(model, pictures, turned, n=20)["top1"] == found["top1"]


def test_classes_and_templates_are_read_from_files(tmp_path):
    (tmp_path / "names").write_bytes("\ufeffred star\r\n\r\nblue ring\r\n".encode())  # as editors write it
    assert zero_shot.read_names(tmp_path / "names") == ["red star", "blue ring"]
    assert zero_shot.labels(["a blue ring", "a red star over a blue ring"], ["red star", "blue ring"])[0] == 1
    (tmp_path / "templates").write_text("a photo of a {}\n")
    assert zero_shot.read_templates(tmp_path / "templates") == ["a photo of a {}"]
    for name, text, read, message in (
        ("one", "red star\n", zero_shot.read_names, "at least two"),
        ("bad", "a photo of {0}\n", zero_shot.read_templates, "must hold {} once"),
        ("none", "\n", zero_shot.read_templates, "holds no template"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="names exactly one of the 1 classes"):
        zero_shot.labels(["a dog"], ["cat"])


def test_a_model_without_a_clip_is_asked_for_none(tmp_path):
    """What needs one says so before anything is read; a loss and captions to draw do not."""
    alone = pipeline.UnCLIP.load(make_class_model(tmp_path / "model", ("red star", "blue ring")))
    assert not networks.has_clip(alone) and not drawing.reads_text(alone)
    texts = ["a red star", "a blue ring"] * 8
    captioned = dataclasses.replace(picture_sets.scene_pictures(CONFIG, 32, 16), texts=tuple(texts))
    assert drawing.what_to_draw(alone, captioned, 4)[1] == [0, 1, 2, 3]
    assert set(drawing.what_to_draw(alone, captioned, 4)[0]) <= set(texts)
    other = dataclasses.replace(captioned, texts=("a photograph",) * 16)
    assert sorted(drawing.what_to_draw(alone, other, 4)[0]) == ["blue ring"] * 2 + ["red star"] * 2
    found = loss.measure(alone.engine, captioned, n=16, batch_size=8)
    assert found.keys() == {"decoder"} and np.isfinite(found["decoder"]["value"])
    with flagsaver.flagsaver(), pytest.raises(ValueError, match="--compare needs a CLIP"):
        FLAGS(["evaluate"])
        compare([""], tmp_path, os.fspath(tmp_path / "model"), n=4)


# Ways of drawing, compared


def compare(ways, out, model_dir, judge=None, **request):
    request = Request(scenes="quickstart", **request)
    return comparison.compare(ways, request, out, model_dir=model_dir, pictures=2, judge=judge)


def test_diversity_is_the_mean_over_pairs():
    draw = np.random.default_rng(0)
    z = draw.normal(size=(3, 4, 5))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    pairs = [1 - z[c, i] @ z[c, j] for c in range(3) for i in range(4) for j in range(4) if i != j]
    assert comparison.diversity(z) == pytest.approx(np.mean(pairs))
    assert comparison.diversity(np.repeat(z[:, :1], 4, axis=1)) == pytest.approx(0)
    with pytest.raises(ValueError, match="2 or more"):
        comparison.diversity(z[:, :1])


def test_ways_of_drawing_are_compared(model, tmp_path):
    """On a model of random weights: what is written, and that the settings of each way are used."""
    pytest.importorskip("scipy", reason="the checker needs scipy")
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    ways = ["", "guidance_scale=3 upsampler_steps=2", "other: model=" + os.fspath(model.engine.directory)]
    with flagsaver.flagsaver():
        FLAGS(["evaluate"])
        rows = compare(ways, tmp_path, os.fspath(model.engine.directory), n=4)
    assert [row.name for row in rows] == ["as it is", ways[1], "other"]
    assert all(row.pictures == 8 and row.named == 0 and row.seconds > 0 for row in rows)
    first, last = (dataclasses.replace(rows[i], name="", seconds=0, fidelity={}) for i in (0, 2))
    assert first == last
    for row in rows:
        assert row.fidelity.keys() == {
            f"clip_{n}" for n in ("frechet", "precision", "recall", "density", "coverage")
        }
        assert row.frechet()[1]["n"] == 8 and row.frechet()[1]["n_reference"] == 8
    assert rows[0].frechet()[1]["value"] == rows[2].frechet()[1]["value"] > 0
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert report["rows"][1]["settings"]["decoder"]["guidance_scale"] == 3
    assert report["rows"][0]["settings"] == report["rows"][2]["settings"] != report["rows"][1]["settings"]
    assert (tmp_path / "comparison.md").read_text().count("\n") == 5
    assert Image.open(tmp_path / "comparison.png").width > 300
    assert Image.open(tmp_path / "comparison_3.png").text["way"] == "other"


def test_ways_are_compared_with_pictures_of_ones_own(model, tmp_path):
    """Without a checker; the set that is compared with itself is at no distance."""
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    directory = os.fspath(model.engine.directory)
    config = scenes.preset("quickstart")
    texts = list(picture_sets.scene_pictures(config, 32, 8).texts)
    folder = tmp_path / "drawn"
    drawing.drawn_pictures(model, texts, folder, settings=dict(upsampler_steps=[2]))
    with flagsaver.flagsaver():
        FLAGS(["evaluate"])
        ways = ["same: upsampler_steps=2", "others: guidance_scale=5"]
        rows = compare(ways, tmp_path, directory, n=8, reference=os.fspath(folder))
    assert all(row.named is None and row.pictures == 16 for row in rows)
    assert rows[0].neighbours("recall")["value"] == 1  # the first picture of each caption is the reference's
    table = comparison.table(rows)
    assert "named" not in table and "Frechet distance (CLIP)" in table and "recall" in table
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["rows"][1]["fidelity"]["clip_recall"]["n_reference"] == 8


def test_points_of_a_comparison_are_its_rows(tmp_path):
    """The plot's panels, by what was measured; a recall or a distance in the wrong place would show."""
    matplotlib = pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    drawn = []

    def errorbar(axes, x, y, spread=None, **_):
        drawn.append((axes, list(x), list(y), None if spread is None else np.array(spread).tolist()))

    def row(i, judged=True):
        entries = {
            "fid": dict(value=10.0 + i, interval=[9.0 + i, 12.0 + i]),
            "precision": dict(value=0.5, interval=[0.4, 0.7]),
            "recall": dict(value=0.1 * i, interval=[0.0, 1.0]),
        }
        named = (
            dict(named=0.25, interval=(0.2, 0.5), correct=0.2)
            if judged
            else dict.fromkeys(("named", "interval", "correct"))
        )
        return comparison.Row(
            name=f"way {i}", pictures=4, **named, diversity=0.3, clip=0.8 + i, seconds=1.0, fidelity=entries
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "errorbar", errorbar)
        comparison.plot([row(1), row(2)], tmp_path / "a.png")
        comparison.plot([row(1, False)], tmp_path / "b.png")
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes, *_ in drawn]
    assert [y for _, y in labels] == [
        "share with all that is named",
        *["FID", "FID", "precision"],
        *["FID", "FID", "precision"],
    ]
    assert [x for x, _ in labels[1:4]] == ["CLIP cosine of picture and caption", "recall", "recall"]
    assert drawn[1][1:] == ([1.8, 2.8], [11.0, 12.0], [[1.0, 1.0], [2.0, 2.0]])
    assert drawn[2][1] == [0.1, 0.2] and drawn[3][2] == [0.5, 0.5]
    lines = comparison.table([row(1), row(2)]).splitlines()
    assert (
        lines[0].startswith("| | pictures | all named (95 %)")
        and "| 11 (10 .. 13) | 0.50 | 0.10 |" in lines[2]
    )


# The loss at fixed times


def test_losses_are_those_of_the_stages(model):
    """Of each stage, at fixed times and noise: the same twice, other with other pictures, the stage's own."""
    pictures = picture_sets.scene_pictures(CONFIG, 32, 40)
    found = loss.measure(model.engine, pictures, n=40, batch_size=8)
    assert found.keys() == {"clip", "prior", "decoder", "upsampler32"}
    assert found == loss.measure(model.engine, pictures, n=40, batch_size=8)
    other = loss.measure(
        model.engine, picture_sets.scene_pictures(CONFIG, 32, 40, seed=1), n=40, batch_size=8
    )
    for name, entry in found.items():
        assert entry["n"] == 40 and entry["standard_error"] > 0 and np.isfinite(entry["value"])
        assert entry["interval"][0] < entry["value"] < entry["interval"][1]
        assert entry["value"] == entry["scalars"]["loss"] != other[name]["value"]
    assert len(loss.table(found).splitlines()) == 5
    # CLIP's by hand: the whole set in its order, for nothing is drawn at random where all are taken.
    images = [item.picture() for item in pictures.items()]
    z, w = model.encode_image(images), model.encode_text(list(pictures.texts))[0][0]
    scale = np.exp(float(model.engine.params("clip")["logit_scale"]))
    by_hand = []
    for start in range(0, 40, 8):
        logits = scale * z[start : start + 8] @ w[start : start + 8].T
        log_p = [logits - np.log(np.exp(logits).sum(axis=a, keepdims=True)) for a in (0, 1)]
        by_hand.append(-np.mean([np.diagonal(p).mean() for p in log_p]))
    assert found["clip"]["value"] == pytest.approx(np.mean(by_hand), rel=1e-3)
    with pytest.raises(ValueError, match="of 12 pictures is not 2 batches of 8"):
        loss.measure(model.engine, pictures, n=12, batch_size=8)
    with pytest.raises(ValueError, match="has a caption"):
        loss.measure(model.engine, dataclasses.replace(pictures, texts=()), n=40, batch_size=8)


def test_losses_of_the_other_stages(tmp_path):
    """The autoregressive prior, the CLIP of noised pictures, the classifier with its labels."""
    extended = pipeline.UnCLIP.load(make_model(tmp_path, extended=True))
    texts = ["a red star", "a blue ring", "a yellow circle", "a green cross"] * 4
    pictures = dataclasses.replace(picture_sets.scene_pictures(CONFIG, 32, 16), texts=tuple(texts))
    found = loss.measure(extended.engine, pictures, n=16, batch_size=8)
    assert {"prior", "noisy_clip", "classifier"} <= found.keys()
    assert all(np.isfinite(entry["value"]) for entry in found.values())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("guidance", "must be settings like"),
        ("guidance_scal=2", "no setting of sampling; did you mean .guidance_scale"),
        ("guidance_scale=much", "much"),
        ("prior_method=huen", "huen"),
        ("model=/nowhere", "/nowhere"),
        ("decoder_steps=100000", "num_steps must be between 1 and num_timesteps = 1000"),
    ],
)
def test_a_way_that_cannot_be_drawn_is_refused_before_drawing(model, tmp_path, way, message):
    pytest.importorskip("scipy", reason="the checker needs scipy")
    with flagsaver.flagsaver(), pytest.raises((ValueError, OSError), match=message):
        FLAGS(["evaluate"])
        compare(["", way], tmp_path, os.fspath(model.engine.directory), n=4)
    assert not list(tmp_path.iterdir())

"""A judge: another CLIP than the measured model's."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import comparison, drawing, evaluate, fidelity, networks, picture_sets
from dalle2_jax.evaluate.metric import Request
from dalle2_jax.generate.flags import define_sampling_flags
from tests.tiny_model import make_class_model, make_model

CLASSES = ("red star", "blue ring", "yellow circle")
FLAGS = flags.FLAGS
if "guidance_scale" not in FLAGS:
    define_sampling_flags()


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("judge") / "tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of classes, without a CLIP."""
    return pipeline.UnCLIP.load(make_class_model(tmp_path_factory.mktemp("classes"), CLASSES))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of six scenes, with captions that name the model's classes."""
    folder = tmp_path_factory.mktemp("images")
    found = picture_sets.scene_pictures(scenes.preset("quickstart"), 32, 6)
    for i, item in enumerate(found.items()):
        drawing.grid.save_png(epath.Path(folder) / f"{i}.png", item.picture(), {})
        (folder / f"{i}.txt").write_text(f"a {CLASSES[i % 3]}")
    return folder


def test_a_model_without_clip_is_measured_by_a_judge(model, judge_folder, images, tmp_path):
    """The judge's numbers of the drawn pictures; log, report and page say which CLIP they are from."""
    names = ("clip_mmd", "clip_precision_recall")
    request = Request(names, reference=str(images), n=6, batch_size=8, out=str(tmp_path))
    with networks.open_judge(str(judge_folder)) as judge:
        report, lines = evaluate.evaluate(model, request, epath.Path(tmp_path), judge)
        own = networks.Networks(clip=judge, batch_size=8)
        drawn = picture_sets.open_pictures(tmp_path / "pictures")
        expected = fidelity.measure(drawn, picture_sets.open_pictures(images), names, own)
        sha256 = judge.engine.weights_sha256("clip")
    assert drawn.count == 6 and report["clip_mmd"]["value"] == expected["clip_mmd"]["value"] > 0
    assert report["clip_recall"]["value"] == expected["clip_recall"]["value"]
    assert report["judge"] == {"name": "tiny", "weights_sha256": sha256}
    assert report["clip_mmd"]["features"] == "CLIP of the judge tiny" != expected["clip_mmd"]["features"]
    assert report["clip_mmd"]["weights_sha256"] == sha256
    assert lines[0] == f"judge: CLIP of tiny, sha256 {sha256}" and "CLIP of the judge tiny" in lines[-1]
    evaluate.write_report(epath.Path(tmp_path), report, lines, str(tmp_path / "page.html"))
    for file in ("report.json", "report.txt", "page.html"):
        assert (
            "CLIP of the judge tiny" in (tmp_path / file).read_text()
            and sha256 in (tmp_path / file).read_text()
        )


def test_captions_are_scored_by_a_judge_without_a_choice_of_metrics(model, judge_folder, images, tmp_path):
    request = Request(("clip_score",), images=str(images), out=str(tmp_path))
    with networks.open_judge(str(judge_folder)) as judge:
        report, _ = evaluate.evaluate(model, request, epath.Path(tmp_path), judge)
        (texts, _), _ = judge.encode_text(picture_sets.open_pictures(images).captions())
        z = judge.encode_image([item.picture() for item in picture_sets.open_pictures(images).items()])
        chosen = evaluate.choose_metrics(
            model,
            Request(images=str(images), reference=str(images)),
            networks.Networks(clip=judge, judge=True),
        )
    assert report["clip_score_raw"]["value"] == pytest.approx((z * texts).sum(axis=1).mean(), abs=1e-5)
    assert chosen == ([], list(fidelity.WITH_CLIP))


def test_ways_of_models_without_clip_are_compared_by_a_judge(model, judge_folder, images, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    directory = str(model.engine.directory)
    request = Request(reference=str(images), n=4, batch_size=8)
    with networks.open_judge(str(judge_folder)) as judge, flagsaver.flagsaver():
        FLAGS(["evaluate"])
        options = dict(model_dir=directory, pictures=2)
        (row,) = comparison.compare([""], request, tmp_path, judge=judge, **options)
        comparison.write_report(epath.Path(tmp_path), [row], str(tmp_path / "page.html"))
        sha256 = judge.engine.weights_sha256("clip")
    assert np.isfinite([row.diversity, row.clip]).all()
    assert row.fidelity["clip_frechet"]["features"] == "CLIP of the judge tiny"
    assert json.loads((tmp_path / "comparison.json").read_text())["judge"]["weights_sha256"] == sha256
    for file in ("comparison.md", "page.html"):
        assert f"CLIP of the judge tiny, sha256 {sha256}" in (tmp_path / file).read_text()


def test_a_judge_that_cannot_judge_is_refused_before_anything_is_drawn(model, judge_folder, images, tmp_path):
    with pytest.raises(ValueError, match="holds no CLIP and no classifier: it has decoder"):
        networks.open_judge(str(model.engine.directory)).__enter__()
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        networks.open_judge(str(images)).__enter__()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a 'bert' .* not a CLIPModel"):
        networks.open_judge(str(tmp_path)).__enter__()
    (tmp_path / "config.json").unlink()
    with networks.open_judge(str(judge_folder)) as judge:
        for metrics, message in (
            (("loss",), "--judge is a CLIP, and none of loss reads it"),
            (("retrieval",), "retrieval needs a CLIP, and model 'classes' has none"),
            (("aesthetic",), "needs the weights of its head"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluate.evaluate(model, Request(metrics, out=str(tmp_path)), epath.Path(tmp_path), judge)
    with pytest.raises(ValueError, match="--aesthetic reads a CLIP.*--judge=DIR"):
        evaluate.open_networks(model, Request(aesthetic=__file__))
    assert not list(tmp_path.iterdir())

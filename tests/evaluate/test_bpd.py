"""Bits per dimension of a model directory: the stage's bound with the conditions of each picture."""

import jax
import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import evaluate, picture_sets
from dalle2_jax.evaluate.metric import Request
from dalle2_jax.evaluate.metrics import bpd
from dalle2_jax.evaluate.stage_examples import StageExamples
from dalle2_jax.generate.tasks import picture_keys
from dalle2_jax.runtime.batch import as_floats
from tests.tiny_model import make_class_model, make_model

CONFIG = scenes.preset("quickstart")
PICTURES = picture_sets.scene_pictures(CONFIG, 16, 8)
T = 5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A decoder of nothing, with T times."""
    return pipeline.UnCLIP.load(make_class_model(tmp_path_factory.mktemp("alone"), num_timesteps=T))


def by_hand(engine, num_steps=None):
    """The stage's own function of 8 pictures, compiled once."""
    stage, params = engine.stage("decoder"), engine.params("decoder")
    keys = picture_keys(np.uint32(3), np.arange(8, dtype=np.uint32), 0)
    bits = jax.jit(lambda batch: stage.bits_per_dim(params, keys, batch, num_steps))
    return lambda fields: jax.device_get(bits(as_floats(fields)))


def test_the_number_is_the_mean_of_the_stages_bound(alone):
    """All steps are T steps; the batch size and the other pictures change nothing; fewer steps are looser."""
    how = dict(n=8, seed=3)
    found = bpd.measure(alone.engine, PICTURES, batch_size=8, **how)
    examples = StageExamples(alone.engine, "decoder")
    assert examples.reads == {"image"} and not examples.reads_captions
    images = [item.picture() for item in PICTURES.items()]
    expected = by_hand(alone.engine)(examples.make(images, (), 3))
    values = expected["bpd"].astype(np.float64)
    np.testing.assert_allclose(found["value"], values.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["standard_error"], values.std(ddof=1) / 8**0.5, rtol=1e-4)
    terms = [expected["prior"], expected["terms"][:-1].sum(axis=0), expected["terms"][-1]]
    np.testing.assert_allclose(list(found["terms"].values()), [x.mean() for x in terms], rtol=1e-4)
    assert sum(found["terms"].values()) == pytest.approx(found["value"], rel=1e-5)
    assert found["n"] == 8 and found["num_steps"] == found["num_timesteps"] == T
    assert found["interval"][0] < found["value"] < found["interval"][1]
    assert found == bpd.measure(alone.engine, PICTURES, num_steps=T, batch_size=8, **how)
    other = bpd.measure(alone.engine, PICTURES, num_steps=2, batch_size=8, **how)
    assert other["num_steps"] == 2 and other["value"] != found["value"]
    assert bpd.measure(alone.engine, PICTURES, batch_size=8, n=8, seed=4)["value"] != found["value"]
    few = bpd.measure(alone.engine, PICTURES, batch_size=8, n=3, seed=3)
    rows = np.sort(np.random.default_rng(3).permutation(8)[:3])
    np.testing.assert_allclose(few["value"], values[rows].mean(), rtol=1e-4)


def test_a_conditional_models_pictures_are_coded_by_their_own_conditions(tmp_path):
    """unCLIP's decoder gets the CLIP image embedding of the picture itself, and its caption."""
    engine = pipeline.UnCLIP.load(make_model(tmp_path)).engine
    found = bpd.measure(engine, PICTURES, n=8, seed=3, num_steps=2, batch_size=8)
    images, texts = [item.picture() for item in PICTURES.items()], PICTURES.captions()
    embeds, bound = pipeline.Pipeline(engine).encode_image(images, 8), by_hand(engine, 2)

    def bits(embeds, texts):
        fields = StageExamples(engine, "decoder").make(images, texts, 3)
        assert fields.keys() >= {"image", "clip.image", "tokens", "token_mask"}
        return bound(fields | {"image_embed": embeds})["bpd"].mean()

    np.testing.assert_allclose(found["value"], bits(embeds, texts), rtol=1e-4)
    for other in (bits(embeds[::-1], texts), bits(embeds, texts[::-1])):
        assert abs(other - found["value"]) > 1e-3 * found["value"]
    with pytest.raises(ValueError, match="has a caption"):
        bpd.measure(engine, picture_sets.of_images("plain", np.stack(images)), n=8)


def test_what_cannot_be_measured_is_refused(alone, monkeypatch, tmp_path):
    engine = alone.engine
    with pytest.raises(ValueError, match=f"bpd_steps 6 must be between 0, for all, and num_timesteps = {T}"):
        bpd.measure(engine, PICTURES, num_steps=6)
    one = picture_sets.of_images("one", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="two pictures or more: one has 1"):
        bpd.measure(engine, one)
    with monkeypatch.context() as patched:
        patched.setitem(engine.stages, "decoder", object())
        with pytest.raises(ValueError, match="needs a decoder that draws by Gaussian diffusion"):
            bpd.measure(engine, PICTURES)
        patched.delitem(engine.stages, "decoder")
        with pytest.raises(ValueError, match="has no decoder"):
            bpd.measure(engine, PICTURES)
    labelled = pipeline.UnCLIP.load(make_class_model(tmp_path / "labelled", ("red star", "blue ring")))
    with pytest.raises(ValueError, match="'a dog' does not name exactly one of data.classes"):
        pictures = picture_sets.of_images("dogs", np.zeros((2, 8, 8, 3), np.uint8), ("a red star", "a dog"))
        bpd.measure(labelled.engine, pictures)


def test_a_histogram_counts_each_level_once_more():
    training = np.zeros((4, 2, 2, 3), np.uint8)
    training[..., 1] = [[[0, 1], [2, 3]]]
    pictures = np.zeros((2, 1, 1, 3), np.uint8)
    pictures[1] = 9
    zero, quarter, none = (-np.log2((count + 1) / (16 + 256)) for count in (16, 4, 0))
    found = bpd.histogram_bits(training, pictures)
    np.testing.assert_allclose(found, [(2 * zero + quarter) / 3, none])


def test_the_command_reports_it(alone, tmp_path):
    """On scenes with the histogram of training scenes; on pictures of --reference, without."""
    request = Request(metrics=("bpd",), scenes="quickstart", n=8, bpd_steps=T, batch_size=8)
    report, lines = evaluate.evaluate(alone, request, tmp_path)
    assert report["scenes_config"] == "quickstart" and report["bpd"]["num_steps"] == T
    baseline = report["bpd"]["pixel_histogram"]
    assert baseline["n"] == 8 and 0 < baseline["value"] < 8 and baseline["training_pictures"] == 512
    assert lines[-1].splitlines()[1].startswith("decoder, 5 of 5 steps") and "prior" in lines[-1]
    path = tmp_path / "pictures.npz"
    np.savez(path, arr_0=np.stack([item.picture() for item in PICTURES.items()]))
    request = Request(metrics=("bpd",), reference=str(path), n=8, bpd_steps=T, batch_size=8)
    report, _ = evaluate.evaluate(alone, request, tmp_path)
    assert report["bpd"]["pictures"] == "pictures.npz" and "pixel_histogram" not in report["bpd"]
    assert "scenes_config" not in report
    expected = bpd.measure(alone.engine, PICTURES, n=8, num_steps=T, batch_size=8)
    assert report["bpd"]["value"] == pytest.approx(expected["value"], rel=1e-6)

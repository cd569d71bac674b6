"""Stages in the loop, each with what comes before: two steps of their recipes' presets `debug`, and a picture
that the whole cascade draws."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.runtime import checkpoint, modeldir, partition
from dalle2_jax.train import loop, statistics
from dalle2_jax.train.plan import Plan
from dalle2_jax.train.step import TrainState
from tests import tiny_model

# Less than the presets have, so that a step compiles in seconds. SAM is in tests/models/stages/test_clip.py.
SMALLER = {
    "clip": dict(sam_rho=0.0),
    "decoder64": dict(channels=8, head_dim=8, channel_mult=[1], attention_resolutions=[16]),
    "upsampler256": dict(channels=8, channel_mult=[1]),
    "upsampler1024": dict(channels=8, channel_mult=[1]),
}


def recipe(name: str, **changes) -> dict:
    """The preset `debug` of configs/NAME.py, plain, made smaller."""
    config = models.to_plain(importlib.import_module(f"configs.{name}").get_config("debug"))
    config["model"] |= SMALLER.get(name, {})
    return json.loads(json.dumps(config)) | changes


@pytest.fixture(scope="module")
def root(one_device, tmp_path_factory):
    """Workdirs of two steps each: clip, prior, ar_prior, decoder64, upsampler256, upsampler1024."""
    root = tmp_path_factory.mktemp("stages")
    clip = str(root / "clip")
    loop.train(recipe("clip"), clip)
    for name in ("prior", "ar_prior"):
        loop.train(recipe(name, clip=clip), str(root / name))
    captions = dict(sample_captions=["a red star", "a blue ring"], sample_prior=str(root / "prior"))
    loop.train(recipe("decoder64", clip=clip, **captions), str(root / "decoder64"))
    for name in ("upsampler256", "upsampler1024"):
        loop.train(recipe(name), str(root / name))
    return root


@pytest.fixture(scope="module")
def classifier(one_device, tmp_path_factory):
    """A workdir of two steps."""
    root = tmp_path_factory.mktemp("classifiers")
    config = recipe(
        "decoder64", stage="classifier", model=tiny_model.CLASSIFIER | dict(attention_resolutions=[])
    )
    config["data"]["classes"] = ["circle", "square", "star"]
    loop.train(config, str(root / "classifier"))
    return root


def scalars(workdir: Path) -> dict[str, list[float]]:
    """name -> its values in metrics.jsonl."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


# test_meshes.py trains a classifier in every run.
@pytest.mark.parametrize(
    "name",
    ["clip", "prior", "ar_prior", "decoder64", pytest.param("classifier", marks=pytest.mark.slow)],
)
def test_two_steps_of_a_stage_are_logged_evaluated_and_saved(request, name):
    root = request.getfixturevalue("classifier" if name == "classifier" else "root")
    found = scalars(root / name)
    assert len(found["train/loss"]) == 2 and np.isfinite(found["train/loss"]).all()
    assert found["train/bad_steps"] == [0, 0]
    evaluated = [value for key, values in found.items() if key.startswith("eval/") for value in values]
    assert evaluated and np.isfinite(evaluated).all()
    assert (root / name / "checkpoints" / "2").is_dir()
    if name in ("prior", "ar_prior"):
        assert np.isfinite(found["eval/sample_cosine"]).all()
    if name == "decoder64":
        assert Image.open(root / name / "samples" / "samples_00000002.png").width > 32


def test_a_prior_measures_its_average_over_training_data(root):
    """The statistics that are saved are those of the averaged network, and not of the last parameters."""
    config = recipe("prior", clip=str(root / "clip"))
    params, average = (
        checkpoint.restore_subtree(root / "prior", name, 2) for name in ("params", "ema_params")
    )
    eps_sq = average["stats"]["eps_sq"]
    assert np.isfinite(eps_sq).all() and (eps_sq > 0).all() and eps_sq.dtype == np.float32
    np.testing.assert_array_equal(eps_sq, params["stats"]["eps_sq"])

    stage = models.build_stage(config)
    draw = np.random.default_rng(0)
    batch = {
        name: draw.normal(size=x.shape).astype(x.dtype)
        if x.dtype == jnp.float32
        else np.ones(x.shape, x.dtype)
        for name, x in stage.batch_spec(8).items()
    }

    class Dataset:
        def batches(self, *_, **__):
            while True:
                yield batch

    mesh = partition.make_mesh(**config["mesh"])
    doubled = jax.tree.map(lambda x: 2 * x, params["net"])
    given = TrainState(
        step=jnp.int32(2),
        params=params,
        ema_params=average | {"net": doubled},
        opt_state=(),
        bad_steps=jnp.int32(0),
    )
    found = statistics.make_measure(Plan(config, stage, mesh), Dataset(), {})(given)
    measure, key = jax.jit(stage.measure), jax.random.key(config["seed"])
    of_average, of_last = (
        np.mean([measure(tree, jax.random.fold_in(key, i), batch)["eps_sq"] for i in range(4)], axis=0)
        for tree in (given.ema_params, params)
    )
    for tree in (found.params, found.ema_params):
        measured = np.asarray(tree["stats"]["eps_sq"])
        assert np.abs(measured / of_average - 1).max() < np.abs(measured / of_last - 1).max() / 2
    jax.tree.map(np.testing.assert_array_equal, found.params["net"], params["net"])


def test_an_autoregressive_prior_fits_its_components_to_the_data(root):
    stats = checkpoint.restore_subtree(root / "ar_prior", "ema_params", 2)["stats"]
    basis = np.asarray(stats["components"])
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-4)
    assert np.abs(stats["mean"]).max() > 0


def test_what_was_trained_draws_a_picture_and_what_was_not_measured_is_refused(root, tmp_path):
    convert.convert_workdirs(
        tmp_path / "model",
        clip=str(root / "clip"),
        prior=str(root / "prior"),
        decoder=str(root / "decoder64"),
        upsamplers=[str(root / "upsampler256"), str(root / "upsampler1024")],
    )
    stored = modeldir.load_stage(tmp_path / "model" / "prior", keep_dtype=True)[1]
    assert stored["stats"]["eps_sq"].dtype == np.float32  # though the weights are bfloat16
    model = pipeline.UnCLIP.load(tmp_path / "model")
    drawn = model.text_to_image(["a red star"], upsampler_steps=[3, 2])
    assert drawn.base.shape == (1, 16, 16, 3) and drawn.images.shape == (1, 256, 256, 3)
    assert drawn.settings["prior"]["method"] == "analytic"
    model.engine.params("prior")["stats"]["eps_sq"] = jnp.full(1000, jnp.nan)
    with pytest.raises(ValueError, match="prior: method 'analytic' needs statistics"):
        model.settings()
    assert model.settings(prior_method="ddim")["prior"]["method"] == "ddim"

"""A tokenizer through the commands: trained, codes stored and read, converted, reconstructed, measured."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow.parquet", reason="metadata of embeddings need pyarrow")

from dalle2_jax import pipeline  # noqa: E402
from dalle2_jax.convert import convert  # noqa: E402
from dalle2_jax.data import pipeline as data_pipeline  # noqa: E402
from dalle2_jax.embed import embed  # noqa: E402
from dalle2_jax.evaluate import evaluate, picture_sets  # noqa: E402
from dalle2_jax.evaluate.metric import Request  # noqa: E402
from dalle2_jax.evaluate.metrics import reconstruction  # noqa: E402
from dalle2_jax.generate.pipeline import Pipeline  # noqa: E402
from dalle2_jax.models import models  # noqa: E402
from dalle2_jax.models.stages import tokenizer  # noqa: E402
from dalle2_jax.runtime import checkpoint, modeldir  # noqa: E402
from tests import test_token_system, tiny_model, tiny_run  # noqa: E402
from tests.data import shards_for_tests as made  # noqa: E402

COUNT, SIDE, STEPS, BATCH = 48, 16, 40, 16
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
MODEL = dict(
    image_size=SIDE,
    net=dict(kind="vqvae", channels=16, residual_channels=8, num_res_blocks=1, strides=(4,)),
    quantizer=dict(kind="vq", num_codes=8, width=4, decay=0.9, restart=0.1),
    data_variance=0.5,
)


def picture(number: int) -> np.ndarray:
    """Four squares of the colours in the digits of `number` to the base of 4."""
    digits = [number // 4**i % 4 for i in range(4)]
    return COLOURS[digits].reshape(2, 2, 3).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)


PICTURES = np.stack([picture(5 * number) for number in range(COUNT)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shards and the workdir of a tokenizer; record 7 is no picture."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "data").mkdir()
    members = []
    for number, pixels in enumerate(PICTURES):
        image = b"<html>" if number == 7 else made.encode(Image.fromarray(pixels))
        members += made.sample(number, f"squares {number}", image)
    made.write_tar(folder / "data" / "00000.tar", members)
    with pytest.MonkeyPatch.context() as patch:
        settings = tiny_run.config(folder / "data", STEPS, batch_size=BATCH)
        settings |= dict(stage="tokenizer", model=MODEL, checkpoint_every=STEPS, mesh=dict(data=4, fsdp=2))
        settings["data"] |= dict(max_bad_fraction=0.1)
        assert tiny_run.run_main(settings, folder / "run", patch.setattr) == 0
    return folder


def of(place):
    """(stage, parameters) of the workdir."""
    stage, _, params = models.load_stage(place / "run", "tokenizer")
    return stage, params


def test_training_reports_the_use_of_the_codes(place):
    names = ("loss", "usage", "restarts")
    logged = {name: tiny_run.logged(place / "run", f"train/{name}") for name in names}
    assert logged["loss"][STEPS] < 0.75 * logged["loss"][1]
    assert logged["usage"][STEPS] == 1 and logged["restarts"].keys() == logged["loss"].keys()
    assert 1 < tiny_run.logged(place / "run", "eval/perplexity")[STEPS] <= 8
    grid = np.asarray(Image.open(place / "run" / "samples" / f"samples_{STEPS:08d}.png"))
    assert grid.shape[1] > 2 * SIDE  # originals beside reconstructions
    state = tiny_run.stored_state(place / "run", STEPS)
    for name in [name for name in state if name.startswith("['params']['stats']")]:
        np.testing.assert_array_equal(state[name], state[name.replace("['params']", "['ema_params']")])


def test_a_run_warns_of_a_collapse(place, tmp_path, monkeypatch, caplog):
    """Once, by what a step reports of the codes."""
    shutil.copytree(place / "run", tmp_path / "run")
    settings = tiny_run.config(place / "data", STEPS + 3, batch_size=BATCH)
    settings |= dict(stage="tokenizer", model=MODEL, checkpoint_every=STEPS, mesh=dict(data=4, fsdp=2))
    settings["data"] |= dict(max_bad_fraction=0.1)
    collapsed = lambda self, scalars: f"collapsed: usage {scalars['usage']:.1f}"  # noqa: E731
    monkeypatch.setattr(tokenizer.Tokenizer, "advice", collapsed)
    assert tiny_run.run_main(settings, tmp_path / "run", monkeypatch.setattr) == 0
    assert caplog.text.count("collapsed: usage 1.0") == 1


@pytest.fixture(scope="module")
def codes(place):
    """The folder of stored codes."""
    config = tiny_run.config(place / "data", 1, frozen=dict(tokenizer=os.fspath(place / "run")))
    config["data"] |= dict(max_bad_fraction=0.1)
    lost = embed.embed(config, "", place / "codes", splits=("",), rows_per_shard=20, batch_size=16)
    assert sum(lost[""].values()) == 1
    embed.embeddings.finish(place / "codes")
    return place / "codes"


def test_stored_codes_are_those_of_the_tokenizer(place, codes):
    stage, params = of(place)
    expected = np.asarray(stage.encode_sequence(params, PICTURES / 127.5 - 1))
    tables = [np.load(codes / "codes" / f"codes_{part:05d}.npy") for part in range(3)]
    stored = np.concatenate(tables)
    assert stored.dtype == np.uint16 and stored.shape == (COUNT, 16) and (stored[7] == 65_535).all()
    there = np.arange(COUNT) != 7
    np.testing.assert_array_equal(stored[there], expected[there])
    sha256 = modeldir.sha256(checkpoint.restore_ema_params(place / "run"))
    assert json.loads((codes / "embed.json").read_text())["frozen"] == {"tokenizer": sha256}


@pytest.mark.parametrize("alone", [True, False])
def test_training_reads_stored_codes(place, codes, alone):
    """With their captions alone, or beside the pictures; the record without codes is replaced."""
    stored = np.concatenate([np.load(codes / "codes" / f"codes_{part:05d}.npy") for part in range(3)])
    where = (
        dict(source="embeddings", path=str(codes)) if alone else dict(source="tar", path=str(place / "data"))
    )
    more = {} if alone else dict(embeddings=str(codes))
    dataset = data_pipeline.make_dataset(**where, **more, split="", fields=("codes",), max_bad_fraction=0.1)
    batch = next(dataset.batches(COUNT, shuffle=False))
    np.testing.assert_array_equal(batch["codes"], stored[batch["index"]])
    assert 7 not in batch["index"] and set(dataset.encoder_sha256) == {"tokenizer"}
    assert dataset.record_fields(3)[1] == "squares 3"


def test_a_run_refuses_stored_codes_of_another_book(codes, tmp_path, monkeypatch, caplog):
    config = tiny_run.config(codes, 1, **test_token_system.TOKEN_MODEL)
    config["data"] |= dict(source="embeddings")
    config["model"] = config["model"] | dict(text=None, num_codes=(7,))
    assert tiny_run.run_main(config, tmp_path / "run", monkeypatch.setattr) == 2
    assert "draws codes of num_codes (7,), the tokenizer of the stored codes has (8,)" in caplog.text


def test_codes_belong_to_their_tokenizer(place, codes, tmp_path, monkeypatch, caplog):
    """By its sha256: a run does not go on with codes of another one, and embed adds none of another one."""
    config = tiny_run.config(codes, 1, **test_token_system.TOKEN_MODEL)
    config["data"] |= dict(source="embeddings", max_bad_fraction=0.1)
    config["model"] = config["model"] | dict(text=None, num_codes=(8,))
    assert tiny_run.run_main(config, tmp_path / "run", monkeypatch.setattr) == 0
    path = codes / "embed.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"frozen": {"tokenizer": 64 * "0"}}))
    try:
        again = config | dict(num_steps=2)
        assert tiny_run.run_main(again, tmp_path / "run", monkeypatch.setattr) == 2
    finally:
        path.write_text(before)
    assert "the frozen tokenizer has changed since step 1" in caplog.text
    other = test_token_system.write(tmp_path / "other", tokenizer=dict(stage="tokenizer", model=MODEL))
    config = tiny_run.config(place / "data", 1, frozen=dict(tokenizer=os.fspath(other)))
    with pytest.raises(ValueError, match=r"(?s)holds other embeddings.*frozen: "):
        embed.embed(config, "", codes, splits=("",), rows_per_shard=20, batch_size=16)


@pytest.fixture(scope="module")
def model(place):
    assert convert.main(["workdirs", f"--tokenizer={place / 'run'}", f"--out={place / 'model'}"]) == 0
    return pipeline.UnCLIP.load(place / "model")


def test_a_model_directory_keeps_the_codes(place, model):
    """Weights are float32, so that the codes stay those of the workdir."""
    index = modeldir.read_index(place / "model")
    assert index["system"] == "tokens" and list(model.actions) == ["reconstruct"]
    stage, params = of(place)
    _, _, converted = models.load_stage(place / "model", "tokenizer", keep_dtype=True)
    assert modeldir.sha256(converted) == modeldir.sha256(params)
    result = model.reconstruct(Image.fromarray(PICTURES[3]))
    expected = np.asarray(stage.reconstruct(params, PICTURES[3:4] / 127.5 - 1))
    assert np.abs(result.images - (expected + 1) * 127.5).max() <= 1
    with pytest.raises(ValueError, match="cannot do draw"):
        model.text_to_image(["a"])
    with pytest.raises(ValueError, match="leave components, steps and guidance_scale out"):
        model.reconstruct(Image.fromarray(PICTURES[3]), components=(4,))


def test_reconstructions_are_measured(model):
    pictures = picture_sets.of_images("squares", PICTURES)
    found, images, true, texts = reconstruction.measure(model, pictures, n=COUNT)
    np.testing.assert_array_equal(true, PICTURES)
    error = np.square(images.astype(float) - PICTURES).mean(axis=(1, 2, 3))
    assert found["psnr"]["value"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-6)
    assert found["codes"]["level_0"]["codes"] == 16 * COUNT and not texts
    assert "level_0" in reconstruction.table(found)


def test_reconstructions_are_compared_by_a_judge_though_the_model_draws_nothing(model, monkeypatch, tmp_path):
    """The metrics of pictures measure the reconstructions, beside the same pictures."""
    clip = json.loads(json.dumps({name: tiny_model.configs()["clip"][name] for name in ("stage", "model")}))
    judge = Pipeline.load(
        test_token_system.write(tmp_path / "judge", clip=clip, tokenizer=test_token_system.TOKENIZER)
    )
    found = {}

    def measured(inputs, names, images):
        found.update(names=names, images=images.count, reference=inputs.reference.count)
        return {}

    monkeypatch.setattr(evaluate, "measure_pictures", measured)
    monkeypatch.setattr(evaluate.fidelity, "table", str)
    request = Request(("reconstruction", "clip_frechet"), n=8, out=str(tmp_path), scenes="quickstart")
    report, _ = evaluate.evaluate(model, request, tmp_path / "out", judge)
    assert found == dict(names=["clip_frechet"], images=8, reference=8) and "settings" not in report
    with pytest.raises(ValueError, match="cannot do draw"):
        evaluate.evaluate(model, Request(("clip_frechet",)), tmp_path / "out", judge)
    monkeypatch.delitem(model.engine.stages, "tokenizer")
    with pytest.raises(ValueError, match="reconstruction needs a tokenizer"):
        evaluate.choose_metrics(model, Request(("reconstruction",)), None)


def test_structural_similarity():
    x = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    np.testing.assert_allclose(reconstruction.ssim(x, x), 1)
    flat = [np.full((1, 12, 12, 3), value, np.uint8) for value in (100, 120)]
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    np.testing.assert_allclose(reconstruction.ssim(*flat), expected, rtol=1e-6)
    assert reconstruction.ssim(x, 255 - x).max() < 0

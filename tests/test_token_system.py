"""A model of captions and codes: trained with a frozen tokenizer, converted, drawn from, reranked."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.convert import convert
from dalle2_jax.convert.workdirs import write_model
from dalle2_jax.data import scenes
from dalle2_jax.edit.complete import complete
from dalle2_jax.evaluate import evaluate, picture_sets
from dalle2_jax.evaluate.metric import Request
from dalle2_jax.evaluate.metrics import loss
from dalle2_jax.generate import again, rerank
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.generate.pipeline import Pipeline, Running
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir, partition
from tests import tiny_model, tiny_run
from tests.data import shards_for_tests as made

SIDE, CAPTION = 8, tiny_model.CAPTIONS[0]
TEXT = dict(vocab_size=512, context_length=12)
TOKENIZER = dict(
    stage="tokenizer",
    model=dict(
        image_size=SIDE,
        net=dict(kind="vqvae", channels=8, residual_channels=4, num_res_blocks=1, strides=(2,)),
        quantizer=dict(kind="vq", num_codes=6, width=4),
    ),
)
TOKEN_MODEL = dict(
    stage="token_model",
    model=dict(
        grids=((4, 4),),
        num_codes=(6,),
        text=TEXT,
        net=dict(width=16, depth=2, num_heads=2, kinds=("column", "conv3")),
        text_drop=0.1,
        guidance_scale=2.0,
    ),
)


def write(folder, **configs):
    """A model directory of random weights."""
    stages = {name: models.build_stage(config) for name, config in configs.items()}
    parts = {
        name: ({"data": {}} | configs[name], tiny_model.random_params(stage, i))
        for i, (name, stage) in enumerate(stages.items())
    }
    extra = {"name": "", "system": "tokens"}
    write_model(convert.check_out(folder, "float32"), parts, stages, tiny_model.tokenizer(), "float32", extra)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """CLIP, tokenizer, token model."""
    clip = {name: tiny_model.configs()["clip"][name] for name in ("stage", "model")}
    clip = json.loads(json.dumps(clip))
    return write(tmp_path_factory.mktemp("m") / "m", clip=clip, tokenizer=TOKENIZER, token_model=TOKEN_MODEL)


@pytest.fixture(scope="module")
def model(model_dir):
    return Pipeline.load(model_dir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, model_dir):
    """A run of two steps on a mesh of 8 devices, with codes of a frozen tokenizer and BPE dropout."""
    place = tmp_path_factory.mktemp("run")
    (place / "data").mkdir()
    samples = [made.sample(i, f"{CAPTION} {i}") for i in range(16)]
    made.write_tar(place / "data" / "00000.tar", [member for sample in samples for member in sample])
    settings = tiny_run.config(
        place / "data",
        2,
        batch_size=8,
        grad_accum=2,
        mesh=dict(data=2, fsdp=2, tensor=2),
        tokenizer=dict(path=str(model_dir / "tokenizer"), **TEXT),
        frozen=dict(tokenizer=str(model_dir)),
        checkpoint_every=2,
        sample_every=2,
        **TOKEN_MODEL,
    )
    settings["data"]["bpe_dropout"] = 0.5
    with pytest.MonkeyPatch.context() as patch:
        assert tiny_run.run_main(settings, place / "run", patch.setattr) == 0
    return place / "run"


def test_a_token_model_is_trained_on_the_codes_of_a_frozen_tokenizer(workdir, model_dir):
    losses = tiny_run.logged(workdir, "train/code_loss")
    assert abs(losses[1] - np.log(6)) < 0.7 and "train/text_loss" in (workdir / "metrics.jsonl").read_text()
    grid = np.asarray(Image.open(workdir / "samples" / "samples_00000002.png"))
    assert grid.shape[-1] == 3 and len(np.unique(grid.reshape(-1, 3), axis=0)) > 10


def test_workdirs_become_a_model_whose_system_follows_from_its_stages(workdir, model_dir, tmp_path):
    out = tmp_path / "out"
    sources = [f"--tokenizer={model_dir}", f"--token_model={workdir}"]
    assert convert.main(["workdirs", *sources, f"--out={out}", "--dtype=float32"]) == 0
    index = modeldir.read_index(out)
    assert index["system"] == "tokens"
    assert index["stages"]["token_model"]["uses"] == {"tokenizer": "tokenizer"}
    frozen = index["stages"]["token_model"]["frozen"]["tokenizer"]
    assert frozen == modeldir.sha256(models.load_stage(model_dir, "tokenizer", keep_dtype=True)[2])
    assert set(Pipeline.load(out).actions) == {"draw", "complete", "reconstruct"}


def test_another_tokenizer_than_that_of_training_is_told(workdir, model_dir, tmp_path, capsys):
    """Its codes mean other pictures; the model is made, with a note."""
    other = write(tmp_path / "other", tokenizer=TOKENIZER)
    told = "note: token_model was trained with another tokenizer than tokenizer of this model"
    for tokenizer, noted in ((model_dir, False), (other, True)):
        out = tmp_path / f"out_{noted}"
        sources = [f"--tokenizer={tokenizer}", f"--token_model={workdir}"]
        assert convert.main(["workdirs", *sources, f"--out={out}", "--dtype=float32"]) == 0
        assert (told in capsys.readouterr().out) == noted


def test_a_model_without_the_tokenizer_is_refused(workdir, tmp_path, capsys):
    assert convert.main(["workdirs", f"--token_model={workdir}", f"--out={tmp_path / 'out'}"]) == 2
    assert "it has no tokenizer" in capsys.readouterr().err


def test_other_codes_than_the_tokenizers_are_refused(model_dir, tmp_path):
    other = TOKEN_MODEL | dict(model=TOKEN_MODEL["model"] | dict(num_codes=(7,)))
    write(tmp_path / "m", tokenizer=TOKENIZER, token_model=other)
    with pytest.raises(ValueError, match=r"draws codes of num_codes \(7,\), the tokenizer has \(6,\)"):
        Pipeline.load(tmp_path / "m")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_codes=(7,)), "draws codes of num_codes (7,), the frozen tokenizer has (6,)"),
        (dict(grids=((2, 8),)), "draws codes of grids ((2, 8),), the frozen tokenizer has ((4, 4),)"),
    ],
)
def test_a_run_refuses_a_frozen_tokenizer_of_other_codes(
    model_dir, tmp_path, monkeypatch, caplog, changes, message
):
    settings = tiny_run.config(tmp_path, 1, frozen=dict(tokenizer=str(model_dir)), **TOKEN_MODEL)
    settings["model"] = settings["model"] | changes
    assert tiny_run.run_main(settings, tmp_path / "run", monkeypatch.setattr) == 2
    assert message in caplog.text and not (tmp_path / "run").exists()


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(model):
    captions = tiny_model.CAPTIONS
    images = model.text_to_image(captions, seed=3).images
    assert images.shape == (3, SIDE, SIDE, 3)
    other = model.text_to_image([captions[1]], seed=3, temperature=1.0)
    np.testing.assert_array_equal(other.images[0], images[1])
    assert other.settings["codes"] == dict(guidance_scale=2.0, temperature=1.0, top_k=0, top_p=1.0)
    plain = model.text_to_image([captions[1]], seed=3, guidance_scale=1, top_k=1)
    assert (plain.images[0] != images[1]).any()
    with pytest.raises(ValueError, match="num_steps has no meaning for a stage 'token_model'"):
        model.text_to_image([CAPTION], decoder_steps=5)


def test_reranked_pictures_are_those_that_clip_finds_closest(model, tmp_path):
    captions = tiny_model.CAPTIONS[:2]
    every = model.text_to_image(captions, n=4, seed=5)
    cosine = rerank.scores(model, every.images, every.captions).reshape(2, 4)
    best = np.argsort(-cosine, axis=1)[:, :2]
    kept = model.text_to_image(captions, n=2, seed=5, rerank=4)
    assert kept.numbers == tuple(best.reshape(-1)) and kept.captions == tuple(np.repeat(captions, 2))
    for row in range(2):
        for place in range(2):
            drawn = every.images[4 * row + best[row, place]]
            np.testing.assert_array_equal(kept.images[2 * row + place], drawn)
    assert kept.settings["rerank"] == dict(candidates=4, judge=model.name)
    # of numbered pictures each is the best of its own candidates
    one = model.text_to_image(captions, numbers=[0, 0], seed=5, rerank=4)
    assert one.numbers == tuple(best[:, 0])
    path = kept.save(tmp_path)[1]
    result, verdict = again.draw(model, again.read(path))
    assert "the same picture" in verdict and result.numbers == (kept.numbers[1],)
    assert kept.grid().shape[0] > 2 * SIDE  # a row a caption


def test_reranking_asks_for_what_it_needs(model, tmp_path):
    with pytest.raises(ValueError, match="rerank 2 draws too few candidates for 3 pictures"):
        model.text_to_image([CAPTION], n=3, rerank=2)
    with pytest.raises(ValueError, match="reranking needs captions"):
        model.text_to_image([], rerank=2)
    write(tmp_path / "m", tokenizer=TOKENIZER, token_model=TOKEN_MODEL)
    with pytest.raises(ValueError, match="cannot do encode_image"):
        model.text_to_image([CAPTION], rerank=2, judge=Pipeline.load(tmp_path / "m"))


def test_pictures_of_classes_are_reranked_by_the_classifier(tmp_path):
    """A model of classes without CLIP: the candidates that its classifier finds likeliest."""
    classes = dict(classes=["red star", "blue ring", "yellow circle"])
    net = dict(width=8, hidden=8, num_blocks=1, num_res_blocks=1, num_heads=2, kernel=3)
    prior = dict(grids=((4, 4),), num_codes=(6,), nets=(net,), num_classes=3, label_drop=0.1)
    write(
        tmp_path / "m",
        classifier=dict(stage="classifier", model=tiny_model.CLASSIFIER, data=classes),
        tokenizer=TOKENIZER,
        token_model=dict(stage="pixelsnail", model=prior, data=classes),
    )
    model = Pipeline.load(tmp_path / "m")
    every = model.text_to_image(["a red star"], n=4, seed=2)
    kept = model.text_to_image(["a red star"], n=2, seed=2, rerank=4)
    likely = model.score(every.images, ["a red star"] * 4)
    assert kept.numbers == tuple(np.argsort(-likely)[:2]) and (likely < 0).all()
    with pytest.raises(ValueError, match="does not name exactly one class"):
        model.text_to_image(["a dog"], rerank=2)


def test_the_lower_part_of_a_picture_is_completed(model):
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    result = complete(model, picture, CAPTION, n=3, seed=1)
    square = square_picture(picture, SIDE)
    batch = {"caption": [CAPTION] * 3, "number": range(3), "encode.image": np.stack([square] * 3)}
    settings = {"codes": model.engine.stage("token_model").sampling | {"keep": 0.5}}
    made, _ = model.run(model.steps("complete"), batch, settings, Running(seed=1))
    np.testing.assert_array_equal(result.images, made["picture.image"])
    given, drawn = made["encode.codes"], made["codes.codes"]
    np.testing.assert_array_equal(drawn[:, :8], given[:, :8])
    assert (drawn[:, 8:] != given[:, 8:]).any()
    assert len(np.unique(result.images.reshape(3, -1), axis=0)) == 3
    with pytest.raises(ValueError, match="scale 1.0 must lie between 0 and 1"):
        complete(model, picture, CAPTION, scale=1.0)


COMMANDS = """
import json, os, runpy, sys
import dalle2_jax.generate.pipeline
for arguments in json.loads(sys.argv[1]):
    if not os.fork():
        sys.argv = ["edit", *arguments]
        runpy.run_module("dalle2_jax.edit", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_the_commands_complete_and_reconstruct(model_dir, tmp_path):
    """They write what the functions return: pictures, their settings, a grid with the source."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    common = [f"--model={model_dir}", "--dtype=float32", "--seed=1"]
    commands = [
        ["complete", "a.png", CAPTION, "--n=2", "--scale=0.25", "--out=complete", *common],
        ["reconstruct", "a.png", "--out=reconstruct", *common],
        ["complete", "a.png", CAPTION, "--steps=3", "--out=none", *common],
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    statuses = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert statuses[:2] == ["0", "0"] and statuses[2] != "0", done.stderr
    assert "complete draws codes, a step each: leave --steps out" in done.stderr
    for action, count in (("complete", 2), ("reconstruct", 1)):
        report = json.loads((tmp_path / action / "edit.json").read_text())
        files = [each["file"] for each in report["pictures"]]
        assert len(files) == count and report["pictures"][0]["action"] == action
        drawn = [np.asarray(Image.open(tmp_path / action / file)) for file in files]
        assert all(image.shape == (SIDE, SIDE, 3) for image in drawn)
        assert (tmp_path / action / "grid.png").exists()
        if action == "complete":
            assert report["settings"]["codes"]["keep"] == 0.25 and (drawn[0] != drawn[1]).any()


def test_a_token_model_is_measured(model, tmp_path):
    """Its loss, on codes that its own tokenizer makes; the checker reads what it draws of scenes."""
    pytest.importorskip("scipy", reason="the checker needs scipy")
    pictures = picture_sets.scene_pictures(scenes.preset("quickstart"), 16, 16)
    found = loss.measure(model.engine, pictures, n=16, batch_size=8)
    assert found.keys() == {"clip", "tokenizer", "token_model"}
    assert 1 < found["token_model"]["scalars"]["code_loss"] < 6
    assert found["tokenizer"]["value"] > 0
    request = Request(("scenes",), scenes="quickstart", n=4, seed=1)
    report, _ = evaluate.evaluate(model, request, tmp_path)
    entries = report["scenes"]
    assert sum(entry["n"] for entry in entries.values()) == 4
    assert len((tmp_path / "scenes.jsonl").read_text().splitlines()) == 4


def test_a_negative_caption_is_read(model):
    images = [
        model.text_to_image([CAPTION], n=4, negative=negative, guidance_scale=8.0).images
        for negative in (None, tiny_model.CAPTIONS[1])
    ]
    assert (images[0] != images[1]).any()


def test_parameters_are_split_over_the_mesh(workdir):
    stage, _, params = models.load_stage(workdir, "token_model")
    placed = partition.shardings(params, partition.make_mesh(data=2, fsdp=2, tensor=2))
    leaves = dict(jax.tree_util.tree_flatten_with_path(placed)[0])
    split = [str(path) for path, sharding in leaves.items() if not sharding.is_fully_replicated]
    assert any("token_embedding" in name for name in split) and any("fc1" in name for name in split)

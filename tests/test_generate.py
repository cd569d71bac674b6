"""The command that draws: what it writes, what it refuses, and that it does so without TensorFlow."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.generate import output, rerank
from dalle2_jax.generate.engine import Timing
from tests.tiny_model import CAPTIONS, make_class_model, make_model

ROOT = Path(__file__).parent.parent
# A name that is None in sys.modules cannot be imported.
BLOCKED = """
import runpy, sys
for name in ("tensorflow", "tensorflow_datasets", "torch", "transformers", "orbax", "orbax.checkpoint"):
    sys.modules[name] = None
runpy.run_module("dalle2_jax.generate", run_name="__main__")
"""
# Each list of arguments in a process of its own, which need not import again; its errors go to I.log.
MISTAKES = """
import json, os, runpy, sys
import dalle2_jax.generate.pipeline
for i, arguments in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        os.dup2(os.open(f"{i}.log", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["generate", *arguments]
        runpy.run_module("dalle2_jax.generate", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def command(*arguments: str, cwd: Path, program: str = BLOCKED) -> subprocess.CompletedProcess:
    """Runs the command, on one device, where the blocked packages cannot be imported."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    run = [sys.executable, "-c", program, *arguments]
    return subprocess.run(run, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_command_draws_without_tensorflow(directory, tmp_path):
    done = command(
        f"--model={directory}",
        "--n=2",
        "--rerank=3",
        "--seed=7",
        "--guidance_scale=2",
        "--guidance_interval=0.2,3",
        "--prior_steps=2",
        "--steps=2",
        "--upsampler_steps=2",
        "--out=drawn",
        CAPTIONS[0],
        "一个红色的圆",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "drawn"
    report = json.loads((out / "generate.json").read_text())
    files = [picture["file"] for picture in report["pictures"]]
    assert files == [
        "0000_a-red-star-above-a-blue-ring.png",
        "0001_a-red-star-above-a-blue-ring.png",
        "0002_一个红色的圆.png",
        "0003_一个红色的圆.png",
    ]
    assert {path.name for path in out.iterdir()} == {*files, "grid.png", "generate.json"}
    pictures = [Image.open(out / file) for file in files]
    assert all(picture.size == (32, 32) and picture.mode == "RGB" for picture in pictures)
    assert pictures[2].text["caption"] == "一个红色的圆"
    inside = json.loads(pictures[1].text["dalle2_jax"])
    assert (inside["seed"], inside["model"]) == (7, "tiny")
    numbers = [json.loads(picture.text["dalle2_jax"])["number"] for picture in pictures]
    assert all(len({*two}) == 2 and {*two} <= {0, 1, 2} for two in (numbers[:2], numbers[2:]))
    assert inside["settings"] == report["settings"]
    assert report["settings"]["rerank"] == {"candidates": 3, "judge": "tiny"}
    assert report["settings"]["decoder"]["guidance_scale"] == 2.0
    assert report["settings"]["decoder"]["guidance_interval"] == [0.2, 3.0]
    assert "guidance_interval" not in report["settings"]["prior"]
    assert [report["settings"][name]["num_steps"] for name in ("prior", "decoder", "upsampler32")] == [
        2,
        2,
        2,
    ]
    assert set(report["timings"]) == {"text", "prior", "decoder", "upsampler32"}
    for stage in report["timings"]:
        assert stage in done.stdout
    assert "4 pictures of 32 x 32" in done.stdout and "s a picture" in done.stdout


def test_a_cascade_keeps_the_candidates_that_clip_finds_closest(directory):
    model = pipeline.UnCLIP.load(directory)
    how = dict(seed=5, prior_steps=2, decoder_steps=2, upsampler_steps=(2,))
    every = model.text_to_image(CAPTIONS[:2], n=3, **how)
    kept = model.text_to_image(CAPTIONS[:2], n=2, rerank=3, **how)
    cosine = rerank.scores(model, every.images, every.captions).reshape(2, 3)
    best = np.argsort(-cosine, axis=1)[:, :2]
    assert kept.numbers == tuple(best.reshape(-1)) and kept.captions == tuple(np.repeat(CAPTIONS[:2], 2))
    rows = (best + [[0], [3]]).reshape(-1)
    for name in ("images", "base", "image_embeds"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(every, name)[rows])


def test_a_model_without_clip_is_judged_by_the_packages(tmp_path, monkeypatch):
    """Its CLIP ranks; another that is given ranks instead."""
    classes = ("red star", "blue ring")
    model = pipeline.UnCLIP.load(make_class_model(tmp_path / "model", classes))
    bundled = rerank.judge_of(model, None)
    assert "encode_image" in bundled.actions and bundled.name == pipeline.UnCLIP.load().name != model.name
    asked = []

    class Judge:
        """Finds a later candidate closer than an earlier one."""

        name, actions = "package", {"encode_image": ()}

        def encode_text(self, texts, batch_size):
            asked.append(list(texts))
            return (np.eye(2)[:1].repeat(len(texts), axis=0), None), None

        def encode_image(self, images, batch_size):
            angles = np.linspace(1, 0, len(images))
            return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    monkeypatch.setattr(pipeline.UnCLIP, "load", classmethod(lambda cls: Judge()))
    kept = model.text_to_image(["a red star"], n=2, rerank=3)
    assert kept.numbers == (2, 1) and asked == [["a red star"]]
    assert kept.settings["rerank"] == dict(candidates=3, judge="package")
    judge = Judge()
    judge.name = "given"
    assert model.text_to_image(["a red star"], rerank=3, judge=judge).settings["rerank"]["judge"] == "given"


def test_a_model_without_captions_draws_without(tmp_path):
    make_class_model(tmp_path / "model")
    done = command("--model=model", "--n=8", "--out=drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "drawn" / "generate.json").read_text())
    assert [picture["file"] for picture in report["pictures"]] == [f"{i:04d}_picture.png" for i in range(8)]


def test_mistakes_end_with_a_message(tmp_path):
    cases = [
        ([" "], "caption 1 is empty"),
        ([], "at least one caption"),
        (["--model=absent", "a star"], "no model directory absent"),
        (["--guidance_interval=2", "a star"], "'2' must be two numbers LO,HI"),
        (["--upsampler_steps=2,x", "a star"], "upsampler_steps '2,x' must be whole numbers"),
    ]
    done = command(json.dumps([arguments for arguments, _ in cases]), cwd=tmp_path, program=MISTAKES)
    assert done.returncode == 0, done.stderr
    statuses = done.stdout.split()
    for i, (status, (_, message)) in enumerate(zip(statuses, cases, strict=True)):
        said = (tmp_path / f"{i}.log").read_text()
        assert status != "0" and message in said and "Traceback" not in said
    assert len(list(tmp_path.iterdir())) == len(cases)


def result(captions, n=1) -> pipeline.Result:
    """A drawing that nobody drew."""
    count = len(captions) * n
    images = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3)).astype(np.uint8)
    timings = {"text": Timing(1, 1, 0.5, 2.0), "decoder": Timing(count, 9, 3.0 * count, 4.0)}
    repeated = tuple(caption for caption in captions for _ in range(n))
    embeds = np.zeros((count, 4), np.float32)
    return pipeline.Result(repeated, tuple(range(n)) * len(captions), 3, embeds, images, images, {}, timings)


def test_pictures_are_stored_exactly(tmp_path):
    drawn = result(["a/../b", "a/../b"])
    paths = output.write_pictures(tmp_path, drawn, "model")
    assert [path.name for path in paths] == ["0000_a-b.png", "0001_a-b.png"]
    for path, image in zip(paths, drawn.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_seconds_are_counted_without_compiling():
    report = output.report(result(["a", "b"]), "model")
    assert report["timings"]["decoder"]["seconds_per_row"] == 3.0
    assert report["timings"]["decoder"]["compile_seconds"] == 4.0
    assert report["seconds_per_picture"] == pytest.approx((0.5 + 6.0) / 2)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A red star!", "a-red-star"),
        ("../../etc/passwd", "etc-passwd"),
        ("???", "picture"),
        ("红色 的圆", "红色-的圆"),
        ("x" * 1000, "x" * 48),
        ("字" * 1000, "字" * 48),
    ],
)
def test_slug(caption, name):
    assert output.slug(caption) == name
    assert len(f"0000_{name}.png".encode()) < 255  # what file systems allow


def test_a_long_stage_prints_now_and_then():
    times = iter([0.0, 1.0, 6.0, 7.0])
    file = io.StringIO()
    lines = output.StageLines(file, clock=lambda: next(times), every=5.0)
    for done in (1, 2, 3, 4):
        lines("decoder", done, 4, 2.0 * done)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/4", "3/4", "4/4"]
    assert "2.000 s a picture" in file.getvalue()

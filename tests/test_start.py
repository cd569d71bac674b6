"""The start of a command: hints for wrong flags, groups of --help, quiet logs, missing packages."""

import ast
import logging
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.evaluate import page
from dalle2_jax.runtime import compiling, extras, hub, names, processes, start
from dalle2_jax.train import checks

ROOT = Path(__file__).resolve().parents[1]
# Commands one after the other in forked processes, which need not import JAX again; prints exit statuses.
COMMANDS = """
import os, runpy, sys
import dalle2_jax.generate.pipeline, dalle2_jax.train.loop
for line in sys.stdin.read().splitlines():
    command, *arguments = line.split("|")
    if not os.fork():
        os.dup2(1, 2)
        sys.argv = [command, *arguments]
        runpy.run_module(f"dalle2_jax.{command}", run_name="__main__", alter_sys=True)
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
MISTAKES = {
    "generate|a|red|star|above|a|ring": 'put it in quotes: "a red star above a ring"',
    "generate|--num_inference_steps=9|a star": "no flag --num_inference_steps; did you mean --steps?",
    "generate|--again=absent.png|--seed=3": "leave out --seed",
    "train|--lr=3": "did you mean --config.optim.learning_rate?",
    "train|--config=tiny/clip|--workdir=w|--steps=4": "did you mean --config.num_steps?",
    "train|--config=tiny/clip|--workdir=w|--config.lr=3": "did you mean config.optim.learning_rate?",
    "edit|inpaint|a.png|b.png|a|star": "put the caption in quotes",
    "convert|workdirs|--ouut=a|--out=b": "has no argument --ouut=a; did you mean --out?",
}
HELPED = {
    "generate|--help": ("often used:\n  --n=N", "\nmemory:\n  --batch_size=N", "\nexpert:", "examples:"),
    "train|--help": ("  optim.learning_rate ", "recipes,", "  tiny/clip ", "examples:"),
}


def test_wrong_flags_and_help_as_a_user_meets_them(tmp_path):
    lines = [*MISTAKES, *HELPED]
    command = [sys.executable, "-P", "-c", COMMANDS]
    options = dict(input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **options)
    *answers, rest = done.stdout.split("status ")
    answers = [answers[0], *(answer.partition("\n")[2] for answer in answers[1:])]
    statuses = [part.partition("\n")[0] for part in done.stdout.split("status ")[1:]]
    assert len(answers) == len(lines) and done.returncode == 0, done.stdout + done.stderr
    for line, answer, status in zip(lines, answers, statuses, strict=True):
        wanted = HELPED.get(line, (MISTAKES.get(line, ""),))
        assert all(part in answer for part in wanted) and "Traceback" not in answer, f"{line}\n{answer}"
        assert status == ("0" if line in HELPED else "2"), line
        assert line in HELPED or answer.count("loading JAX") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lr", "optim.learning_rate"),
        ("steps", "num_steps"),
        ("config.optim.learning_rat", "optim.learning_rate"),
    ]
    + [
        ("epochs", "num_steps"),
        ("workers", "data.num_workers"),
        ("qqq", ""),
        ("resolution", "model.image_size"),
    ],
)
def test_the_nearest_setting_is_found_anywhere(name, nearest):
    assert names.nearest_setting(name, checks.all_settings("decoder")) == nearest


def test_extras_are_those_of_setup_py():
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    dicts = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    ]
    needs = {key: str(value) for key, value in ast.literal_eval(dicts[0]).items()}
    own_name = {"libtpu": "jax[tpu]", "tensorflow_datasets": "tensorflow-datasets"}
    for package, extra in extras.EXTRA_OF.items():
        assert own_name.get(package, package) in needs[extra], f"{package} is not in the extra {extra}"


def test_a_missing_package_is_one_line(monkeypatch):
    said = []
    with pytest.raises(SystemExit) as ended, processes.fail_together(say=said.append):
        raise ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure")
    assert ended.value.code == 2 and said == ["matplotlib is not installed: pip install 'dalle2_jax[eval]'"]
    with pytest.raises(ModuleNotFoundError), processes.fail_together(say=said.append):
        raise ModuleNotFoundError("No module named 'dalle2_jax.absent'", name="dalle2_jax.absent")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"the studio needs gradio: pip install 'dalle2_jax\[studio\]'"):
        extras.check("the studio", "gradio")


def test_without_network_the_hub_fails_at_once_with_what_to_download(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"nobody/none is not on this machine.*hf download nobody/none --revision"
    ):
        hub.local(f"hf://nobody/none@{'0' * 40}")
    assert time.monotonic() - began < 5 * hub.TIMEOUT
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"


def test_compiling_is_told_from_reading_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "NOTE_AFTER", 0.0)
    said = []
    watch = compiling.Watch(said.append)
    try:
        assert watch.work == "reading compiled programs"
        watch._began(compiling.REQUEST)
        watch._ended(compiling.COMPILED, 3.0)
        watch._ended(compiling.READ, 2.95)
        assert watch.seconds == pytest.approx(0.05) and watch.work == "reading compiled programs"
        watch._ended(compiling.COMPILED, 3.0)
        assert watch.work == "compiling (once)" and watch.traced == 0
        watch._ended(compiling.TRACED, 1.0)
        assert watch.traced == 1 and watch.seconds == pytest.approx(3.05)
        for _ in range(2):
            watch._note()
        assert len(said) == 1 and said[0].startswith("compiling")
    finally:
        watch.close()
    before = watch.seconds
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert watch.seconds == before


def test_notes_of_libraries_are_left_out_and_warnings_stay():
    def record(level, path):
        return logging.LogRecord("absl", level, path, 1, "a text", (), None)

    quiet = start._without_notes_of_tfds
    assert not quiet(record(logging.INFO, "/a/tensorflow_datasets/core/load.py"))
    assert quiet(record(logging.WARNING, "/a/tensorflow_datasets/core/load.py"))
    assert quiet(record(logging.INFO, "/a/dalle2_jax/train/loop.py"))


def test_figures_of_every_kind_of_metric():
    entry = {"value": 0.5, "interval": [0.25, 1.0], "share": True}
    kind = {"n": 8, "named": 0.75, "colour": 1.0, "interval": {"named": [0.5, 0.9], "colour": [0.7, 1.0]}}
    found = page.figures("recall", entry) + page.figures("scenes", {"pair_seen": kind})
    found += page.figures("retrieval", {"n": 100, "image_to_text": 0.97})
    found += page.figures("loss", {"prior": {"value": 3.25, "interval": [3.0, 3.5], "scalars": {"a": 1.0}}})
    assert [(f.name, f.text(), f.spread()) for f in found] == [
        ("recall", "50.0 %", "25 .. 100 %"),
        ("scenes: pair seen, all named", "75.0 %", "50 .. 90 %"),
        ("retrieval: image to text", "97.0 %", ""),
        ("loss: prior", "3.25", "3 .. 3.5"),
    ]
    assert "50.0 %" in page.headlines(found)

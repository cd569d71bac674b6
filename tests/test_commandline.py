"""Flags and settings that are paths: `~` is the home folder in all of them, of every command."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from configs import common
from dalle2_jax.convert import convert
from dalle2_jax.embed import embed, encoders
from dalle2_jax.generate import pictures
from dalle2_jax.models import models
from dalle2_jax.runtime import files, hub
from dalle2_jax.train import loop
from tests.data import shards_for_tests as made

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "dalle2_jax").rglob("*.py")
    if "    start.run(" in path.read_text("utf-8")
)
# Flags whose value is text, but no path. A new one belongs here, or is defined by `commandline.DEFINE_path`.
NO_PATHS = {
    *("caption", "source", "negative", "compare"),  # texts
    *("spacing", "preset", "scenes", "metrics", "splits", "topology", "allow_changed", "host"),  # names
    "frozen",  # NAME=PATH, whose path preflight expands
    *("components", "worker"),  # numbers
}
NO_PATHS_OF_CONVERT = {"name", "licence", "repository", "system", "stage"}
NO_PATH_SETTINGS = {
    *("stage", "wandb", "cpu_products", "data.source", "data.split", "data.eval_split", "data.language"),
    *("data.image_field", "data.caption_field", "optim.schedule", "optim.optimizer"),
    "data.allow_damaged",  # names of files among those of data.path
}
# Prints {command: {flag: what it makes of ~/a}} of the flags that take texts.
FLAGS_OF = """
import importlib, json, runpy, sys
from absl import app, flags

app.run = lambda main, flags_parser: None
for command in sys.argv[1:]:
    importlib.import_module(command)  # flags of what it imports are not its own
others, found = set(flags.FLAGS), {}
for command in sys.argv[1:]:
    found[command] = {}
    runpy.run_module(command, run_name="__main__", alter_sys=True)
    for name in sorted(set(flags.FLAGS) - others):
        flag = flags.FLAGS[name]
        if name == "config":
            flag.parse("~/recipe.py:~/model")
            found[command][name] = flag.value.preset
        elif not flag.boolean:
            try:
                flag.parse("~/a")
                found[command][name] = flag.value
            except flags.Error:
                pass  # a number, or one of some words
        delattr(flags.FLAGS, name)
print(json.dumps(found))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home folder, an empty one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_tilde_is_the_home_folder_in_every_flag_that_is_a_path(home):
    assert {"dalle2_jax.train.__main__", "dalle2_jax.embed.__main__", "dalle2_jax.studio.__main__"} <= set(
        COMMANDS
    )
    recipe = (
        "from ml_collections import ConfigDict\nget_config = lambda preset: ConfigDict({'preset': preset})"
    )
    (home / "recipe.py").write_text(recipe)
    ran = subprocess.run(
        [sys.executable, "-c", FLAGS_OF, *COMMANDS], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.keys() == set(COMMANDS)
    literal = {
        name
        for flags_of in found.values()
        for name, value in flags_of.items()
        if name != "config" and "~/a" in (value if isinstance(value, list) else [value])
    }
    assert literal == NO_PATHS
    for command, flags_of in found.items():
        for name, value in flags_of.items():
            if name not in NO_PATHS | {"config"}:
                assert value in (f"{home}/a", [f"{home}/a"]), f"{command} --{name}"
    assert found["dalle2_jax.train.__main__"].keys() >= {"workdir", "config"}
    assert found["dalle2_jax.evaluate.__main__"].keys() >= {"out", "images", "report", "stats_out", "prompts"}
    assert found["dalle2_jax.studio.__main__"].keys() >= {"model"}
    assert (
        found["dalle2_jax.train.__main__"]["config"] == "~/model"
    )  # which `configs/finetune.py` opens by `hub.local`


def test_a_tilde_is_the_home_folder_in_every_path_that_convert_is_given(home):
    subparsers = convert.make_parser()._subparsers._group_actions[0].choices
    seen = set()
    for command, parser in subparsers.items():
        for action in parser._actions:
            takes_text = isinstance(action, argparse._StoreAction) and not action.choices
            if (
                not takes_text or action.dest in NO_PATHS_OF_CONVERT or action.nargs == "?"
            ):  # refused formats'
                continue
            seen.add(action.dest)
            assert action.type is not None, f"convert {command} {action.dest}"
            assert action.type("~/a") in (f"{home}/a", (f"{home}/a",)), f"convert {command} {action.dest}"
    assert seen >= {"source", "out", "model", "decoder", "upsamplers", "tokenizer"}
    given = ["workdirs", "--decoder=~/d", "--upsamplers=~/a,~/b", "--out=~/m"]
    options = convert.make_parser().parse_args(given)
    assert options.upsamplers == (f"{home}/a", f"{home}/b") and options.out == f"{home}/m"
    assert options.prior == ""


def test_every_setting_that_is_a_path_is_expanded_where_training_and_embedding_begin(home, monkeypatch):
    config = models.to_plain(common.get_config())
    config["data"] |= dict(embeddings="", leave_out="")
    texts = {name for name, value in config.items() if isinstance(value, str)}
    for group in ("data", "tokenizer", "optim"):
        texts |= {f"{group}.{name}" for name, value in config[group].items() if isinstance(value, str)}
    assert texts == set(models.PATHS) | NO_PATH_SETTINGS  # a new one has to be put into one of them
    for name in models.PATHS:
        group, _, own = name.rpartition(".")
        (config[group] if group else config)[own] = f"~/{name}"
    begun, embedded = [], []
    monkeypatch.setattr(loop, "_train", lambda *given: begun.append(given))
    loop.train(config, "~/run")
    ((settings, workdir, *_),) = begun
    assert os.fspath(workdir) == f"{home}/run"
    for name in models.PATHS:
        group, _, own = name.rpartition(".")
        assert (settings[group] if group else settings)[own] == f"{home}/{name}"
    assert config["clip"] == "~/clip"  # the caller's own stays

    def stop(path, batch_size, dtype):
        raise InterruptedError

    expand = models.expand_paths
    monkeypatch.setattr(models, "expand_paths", lambda given: embedded.append(expand(given)) or embedded[-1])
    monkeypatch.setattr(encoders, "ClipEncoder", stop)
    with pytest.raises(InterruptedError):
        embed.embed(config, "clip", "out", splits=("train",))
    assert embedded[0]["data"]["path"] == f"{home}/data.path"


def test_what_is_no_path_of_a_home_folder_stays(home):
    for text in ("", "a/~/b", "/a/b", "gs://bucket/~", f"hf://a/b@{'0' * 40}", "~no_such_user/a", "a~"):
        assert files.expand(text) == text
    assert files.expand(Path("~/a")) == files.expand(files.expand("~/a")) == f"{home}/a"
    assert files.expand("~root") == os.path.expanduser("~root")
    assert models.expand_paths({"stage": "~", "data": {}}) == {"stage": "~", "data": {}}


def test_the_library_takes_a_tilde_where_it_is_given_a_path(home):
    from dalle2_jax.data.tokenizer import load_tokenizer, train_bpe
    from dalle2_jax.evaluate import picture_sets

    made.write_samples(home / "00000.tar", range(3))
    (home / "a.png").write_bytes(made.flat_png(1))
    train_bpe(["a caption"], 300, 8).save(home / "words")
    assert len(made.open_source("tar", "~", "")) == 3
    assert len(made.open_source("tar", "~/*.tar", "")) == 3
    assert load_tokenizer("~/words").vocab_size == 300
    assert pictures.read_picture("~/a.png").size == (8, 8)
    assert len(list(picture_sets.open_pictures("~/00000.tar").items())) == 3
    assert os.fspath(hub.local("~/model")) == f"{home}/model"
    assert not (home.parent / "~").exists()


def test_embeddings_whose_plan_holds_a_tilde_go_on(home):
    """As older passes wrote it; others are still refused."""
    from dalle2_jax.data import embeddings

    folder, stored = epath.Path(home / "embeddings"), {"data": {"path": "~/a", "split": "train"}}
    folder.mkdir()
    (folder / embeddings.PLAN).write_text(json.dumps(stored))
    embeddings.keep_plan(folder, {"data": {"path": f"{home}/a", "split": "train"}})
    with pytest.raises(ValueError, match="other embeddings"):
        embeddings.keep_plan(folder, {"data": {"path": f"{home}/b", "split": "train"}})


def test_nobody_else_expands_paths():
    """Else one place does it and the next one does not, which then looks for a folder called '~'."""
    for path in (ROOT / "dalle2_jax").rglob("*.py"):
        if path.name != "files.py":
            assert not re.search(r"\bexpanduser\b", path.read_text("utf-8")), path

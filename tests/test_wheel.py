"""The wheel, installed into an empty folder: it holds recipes and bundled model, and runs from anywhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_jax.__main__ import COMMANDS

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "dalle2_jax", "configs")
# Loads recipes as --config does: by name, by path, with a preset, from a user's file.
LOAD = """
import sys
from absl import flags
import dalle2_jax
from dalle2_jax.runtime import commandline

assert dalle2_jax.__file__.startswith(sys.argv[1]), dalle2_jax.__file__
commandline.define_config()
for name in ("decoder64", "ddpm/tiny", "configs/decoder64.py", "finetune"):
    assert commandline.recipe_file(name).startswith(sys.argv[1]), name
for name in ("decoder64:debug", "ddpm/tiny", "configs/glide/decoder.py", "mine.py", "finetune"):
    flags.FLAGS["config"].parse(name)
    print(name, flags.FLAGS["config"].value.stage, flags.FLAGS["config"].value.batch_size)
"""


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python without the working directory in its path."""
    command = [sys.executable, "-P", *map(str, words)]
    env = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed into, beside what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    pip, quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check"), ("--no-deps", "--no-index")
    made = run(*pip, "wheel", "--no-build-isolation", *quiet, f"--wheel-dir={folder}", source, cwd=folder)
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,) = folder.glob("dalle2_jax-*.whl")
    made = run(*pip, "install", *quiet, f"--target={target}", wheel, cwd=folder)
    assert made.returncode == 0, made.stderr[-2000:]
    return target


def test_the_wheel_holds_every_recipe_and_the_bundled_model(installed):
    def files(folder: Path, pattern: str) -> set[str]:
        found = {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}
        return {path.as_posix() for path in found if "__pycache__" not in path.parts}

    package = installed / "dalle2_jax"
    for pattern in ("*.py", "*.txt"):
        assert files(package / "configs", pattern) == files(ROOT / "configs", pattern)
    assert files(package / "bundled", "*") == files(ROOT / "dalle2_jax/bundled", "*")
    assert {path.name for path in installed.iterdir()} <= {"bin", "dalle2_jax"} | {
        path.name for path in installed.glob("*.dist-info")
    }
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text("utf-8")
    assert (ROOT / "README.md").read_text("utf-8").strip() in metadata
    assert {"train", "studio", "hub"} <= set(re.findall(r"^Provides-Extra: (\w+)", metadata, re.M))


def test_recipes_are_found_from_any_folder(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs.ddpm import tiny\n\n\ndef get_config(preset=''):\n    return tiny.get_config()\n"
    )
    done = run("-c", LOAD, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    lines = ["decoder64:debug decoder 8", "ddpm/tiny decoder 32", "configs/glide/decoder.py decoder 2048"]
    assert done.stdout.splitlines() == [*lines, "mine.py decoder 32", "finetune decoder 32"]


def test_the_console_command_runs_the_commands(installed, tmp_path):
    program, env = installed / "bin" / "dalle2-jax", dict(PYTHONPATH=str(installed))
    listed = run(program, cwd=tmp_path, **env).stdout
    assert re.findall(r"^  (\w+) +\w", listed, re.M) == list(COMMANDS)
    helped = run(program, "generate", "--help", cwd=tmp_path, **env)
    assert helped.stdout.startswith("dalle2-jax generate [--model=DIR]") and "--seed" in helped.stdout
    wrong = run(program, "genrate", cwd=tmp_path, **env)
    assert wrong.returncode == 1 and "did you mean 'generate'?" in wrong.stderr
    unknown = run("-m", "dalle2_jax", "train", "--config=tiny/clp", "--workdir=w", cwd=tmp_path, **env)
    assert unknown.returncode == 2 and "no recipe tiny/clp; did you mean tiny/clip" in unknown.stderr

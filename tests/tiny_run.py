"""The smallest run: a denoiser of 8 x 8 pictures with two layers, through the whole of training in a second.

python -m tests.tiny_run WORKDIR DATA [NAME=VALUE ...]    a process of its own, with training's exit statuses
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from configs import common
from dalle2_jax.models import models
from dalle2_jax.models.stages import Loss
from dalle2_jax.runtime import checkpoint, processes
from dalle2_jax.train import __main__ as command
from dalle2_jax.train import inputs
from tests.data import shards_for_tests as made

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 8


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A stage whose loss is that of guessing the noise in a picture."""

    image_size: int = 8

    def batch_spec(self, batch_size):
        return {"image": jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.float32)}

    def init(self, key, batch):
        one, two = jax.random.split(key)
        return {
            "fc1": {"kernel": jax.random.normal(one, (192, WIDTH)) / 14},
            "fc2": {"kernel": jax.random.normal(two, (WIDTH, 192)) / 6},
        }

    def loss(self, params, key, batch, *, step=0, train=True):
        noise = jax.random.normal(key, (batch["image"].shape[0], 192))
        hidden = jnp.tanh((batch["image"].reshape(-1, 192) + noise) @ params["fc1"]["kernel"])
        return Loss(jnp.square(hidden @ params["fc2"]["kernel"] - noise).mean())


def shards(folder, unreadable: int | None = None):
    """Writes one tar of 23 pictures, of which that of this number cannot be read; returns `folder`."""
    members = [
        member
        for number in range(23)
        for member in made.sample(number, image=b"<html>404</html>" if number == unreadable else None)
    ]
    made.write_tar(folder / "00000.tar", members)
    return folder


def config(data, num_steps: int, **changes) -> dict:
    """Its settings, plain: `num_steps` steps on the tar shards in `data`, each of them logged and saved."""
    made = models.to_plain(common.get_config())
    made |= dict(stage="upsampler", batch_size=8, num_steps=num_steps, keep_checkpoints=0, eval_batches=1)
    made |= dict(log_every=1, checkpoint_every=1, eval_every=10**6, sample_every=10**6)
    made["data"] |= dict(path=str(data), split="", eval_split="")
    made["optim"] |= dict(learning_rate=1e-2, warmup_steps=0)
    return made | changes


def status(settings: dict, workdir, monkeypatch, allow_changed=()) -> int:
    """The exit status of a run in this process."""
    with monkeypatch.context() as patched:
        patched.setattr(models, "build_stage", lambda config: Tiny())
        return run_main(settings, workdir, patched.setattr, allow_changed)


def whole_run(data, num_steps: int, workdir):
    """A run in this process that nothing interrupts, one checkpoint a step; returns `workdir`."""
    with pytest.MonkeyPatch.context() as patched:
        assert status(config(data, num_steps), workdir, patched) == 0
    return workdir


def poison(monkeypatch, is_bad) -> list[list[int]]:
    """Makes pictures that are not numbers of those of the steps of which `is_bad(step)`; returns the records
    that each step read, as they are read."""
    make, read = inputs.make_datasets, []

    class Poisoned:
        def __init__(self, dataset):
            self._dataset = dataset

        def __getattr__(self, name):
            return getattr(self._dataset, name)

        def batches(self, *args, start_step=0, **options):
            stream = self._dataset.batches(*args, start_step=start_step, **options)
            for step, batch in enumerate(stream, start_step + 1):
                read.append(batch["index"].tolist())
                yield batch | {"image": batch["image"] * np.nan} if is_bad(step) else batch

    def poisoned(*args):
        training, validation = make(*args)
        return Poisoned(training), validation

    monkeypatch.setattr(inputs, "make_datasets", poisoned)
    return read


def run_main(settings: dict, workdir, set_attribute, allow_changed=()) -> int:
    """The exit status of the command in this process; `set_attribute(module, name, value)`."""
    flags = dict(config=settings, workdir=str(workdir), allow_changed=allow_changed, debug=False)
    set_attribute(command, "FLAGS", types.SimpleNamespace(**flags))
    try:
        command.main(["train"])
    except SystemExit as ended:
        return ended.code
    return 0


def start(workdir, data, *, devices: int = 2, environment=(), **changes) -> subprocess.Popen:
    """A run as a process of its own; its output goes to WORKDIR.log, appended. `changes`: of the settings."""
    command = [sys.executable, "-m", "tests.tiny_run", str(workdir), str(data)]
    command += [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    return launch(command, f"{workdir}.log", devices, environment)


def start_together(count: int, workdir, data, **changes) -> list[subprocess.Popen]:
    """`start` with so many processes of one device each, which train as one."""
    names = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [
        start(workdir, data, devices=1, environment=names | {"JAX_PROCESS_ID": str(i)}, **changes)
        for i in range(count)
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launch(command: list[str], log: str, devices: int, environment=()) -> subprocess.Popen:
    """A process with so many CPU devices, whose output is appended to the file `log`."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | dict(environment)
    with open(log, "a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT
        )


def stored_state(workdir, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by path."""
    trees = {name: checkpoint.restore_subtree(workdir, name, step) for name in ("params", "ema_params")}
    trees["opt_state"] = checkpoint.restore_subtree(workdir, "opt_state", step)
    flat, _ = jax.tree_util.tree_flatten_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Two states are equal to the bit."""
    assert one.keys() == other.keys() and one
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def steps_of(workdir) -> list[int]:
    """The committed steps of a run, oldest first; nothing is touched."""
    folder = Path(workdir) / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        if folder.is_dir()
        else []
    )


def logged(workdir, name: str) -> dict[int, float]:
    """{step: value} of a scalar in metrics.jsonl; the last value counts, a torn line does not."""
    path, found = Path(workdir) / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            found |= {line["step"]: line[name]} if name in line else {}
    return found


if __name__ == "__main__":
    workdir_, data_, *changes_ = sys.argv[1:]
    parsed = {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes_)}
    models.build_stage = lambda config: Tiny()
    logging.set_verbosity(logging.INFO)
    processes.leave(run_main(config(data_, **parsed), workdir_, setattr))

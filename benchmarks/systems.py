"""python -m benchmarks.systems --out=DIR NAME [NAME ...]

For each named system (`benchmarks.recipes.RECIPES`): trains its tiny recipe from nothing, makes model
directories, draws with them, measures the pictures. Every command is printed as a user would type it.

  DIR/NAME/STAGE         workdirs          DIR/NAME/result.json   minutes, parameters, FLOPs, scores
  DIR/NAME/models/MODEL  model directories DIR/NAME/grid.png      pictures
  DIR/NAME/drawn/SET     drawn pictures    DIR/table.md           one table of all systems that DIR has

The same command goes on where it was: a trained stage and drawn pictures are kept. A score below its gate
is marked, and the command ends with status 1.
"""

import argparse
import dataclasses
import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import scores
from benchmarks.recipes import RECIPES
from benchmarks.trained import Recipe, Trained, Training
from dalle2_jax.generate import tasks
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.models import flops, models
from dalle2_jax.runtime import files, partition
from dalle2_jax.runtime.metrics import labelled_grid, save_png

# Training


class Stopped(Exception):
    """The user interrupted a command; it has saved its state."""


def run(command: Sequence[str]) -> tuple[float, float]:
    """Run `python -m ...` to its end: (seconds, CPU seconds). SIGTERM and SIGINT reach it and stop this
    command after it."""
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    began, used = time.monotonic(), _child_seconds()
    child = subprocess.Popen([sys.executable, *command], start_new_session=True)
    stopped = []

    def stop(number, _):
        stopped.append(number)
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise Stopped
    if status:
        raise RuntimeError(f"this command failed with status {status}: {shlex.join(['python', *command])}")
    return time.monotonic() - began, _child_seconds() - used


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(training: Training, folder: Path) -> dict:
    """Train a stage, unless it is done; its measurements as JSON values."""
    workdir, log = folder / training.name, folder / "timings.jsonl"
    if not trained(workdir):
        name, *preset = training.config.split(":")
        recipe = ":".join([f"configs/{name}.py", *preset])
        command = ["-m", "dalle2_jax.train", f"--config={recipe}", f"--workdir={workdir}"]
        began = time.monotonic()
        used = _child_seconds()
        try:
            run([*command, *(flag.format(dir=folder) for flag in training.flags)])
        finally:
            entry = {"name": training.name, "seconds": time.monotonic() - began}
            with open(log, "a") as file:
                file.write(json.dumps(entry | {"cpu_seconds": _child_seconds() - used}) + "\n")
        if not trained(workdir):
            raise Stopped
    stage, config, params = models.load_stage(workdir, training.name)
    times = [json.loads(line) for line in log.read_text().splitlines()]
    spent = [entry for entry in times if entry["name"] == training.name]
    return {
        "name": training.name,
        "config": training.config,
        "arm": training.arm,
        "steps": config["num_steps"],
        "batch": config["batch_size"],
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "minutes": sum(entry["seconds"] for entry in spent) / 60,
        "cpu_minutes": sum(entry["cpu_seconds"] for entry in spent) / 60,
    }


def trained(workdir: Path) -> bool:
    """Whether a workdir has the checkpoint of its last step."""
    if not (workdir / "config.json").exists():
        return False
    last = json.loads((workdir / "config.json").read_text())["num_steps"]
    return (workdir / "checkpoints" / str(last)).is_dir()


def make_model(folder: Path, name: str, parts: dict[str, str]) -> None:
    """Write a model directory from workdirs, unless it is newer than they are."""
    out = folder / "models" / name
    index = out / "model_index.json"
    paths = {role: [folder / name for name in names.split(",")] for role, names in parts.items()}
    newest = max((path / "checkpoints").stat().st_mtime for some in paths.values() for path in some)
    if index.exists() and index.stat().st_mtime > newest:
        return
    flags = [f"--{role}={','.join(map(str, some))}" for role, some in paths.items()]
    run(["-m", "dalle2_jax.convert", "workdirs", *flags, f"--out={out}"])


# Measuring


def cost_of_a_picture(model: Pipeline, captions: Sequence[str]) -> dict:
    """{'seconds', 'flops', 'steps'} of one picture with the model's settings, drawn 8 at a time."""
    many = list(captions[:8]) or ["a picture"] * 8
    model.text_to_image(many, numbers=range(8), batch_size=8)  # compiles
    result = model.text_to_image(many, numbers=range(8), batch_size=8, seed=1)
    seconds = sum(timing.seconds for timing in result.timings.values()) / 8
    arithmetic, settings = 0, model.settings()
    for step in model.steps("draw"):
        now = settings.get(step.name, {}) | dict(step.fixed)
        task = tasks.make_task(model.engine, step, now, tasks.specs(model.engine, step, now))
        params = models.abstract_params(model.engine.stage(step.stage))
        batch = {k: jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype) for k, spec in task.specs.items()}
        arithmetic += flops.count(task.function, params, batch, dict(task.scalars))
    steps = {name: timing.steps for name, timing in result.timings.items() if timing.steps > 1}
    return {"seconds": seconds, "flops": arithmetic, "sampling_steps": steps}


def measure(name: str, recipe: Recipe, out: Path) -> bool:
    """Train, draw and score one system; writes its result. True: every gate holds."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    trainings = [train(training, folder) for training in recipe.trainings]
    for model, parts in recipe.models.items():
        make_model(folder, model, parts)
    found, began = Trained(folder, tuple(recipe.models)), time.monotonic()
    scored = recipe.measure(found)
    if found.grid[0]:
        save_png(folder / "grid.png", labelled_grid(np.stack(found.grid[0]), found.grid[1]))
    model = found.model()
    captions = found.captions("single", 8) if "draw" in model.actions and model.reads_captions else []
    cost = cost_of_a_picture(model, captions) if "draw" in model.actions else {}
    stages = {name for names in next(iter(recipe.models.values())).values() for name in names.split(",")}
    parameters = sum(one["parameters"] for one in trainings if one["name"] in stages)
    result = {"title": recipe.title, "trainings": trainings, "parameters": parameters, "picture": cost}
    result["measuring_minutes"] = (time.monotonic() - began) / 60  # fewer where it had drawn before
    result["scores"] = [dataclasses.asdict(score) | {"holds": score.holds} for score in scored]
    with files.atomic_write(folder / "result.json") as partial:
        partial.write_text(json.dumps(result, indent=2))
    print("\n" + scores.lines(scored), flush=True)
    return all(score.holds is not False for score in scored)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    partition.initialise()
    right = []
    for name in options.names:
        print(f"\n== {RECIPES[name].title}", flush=True)
        try:
            right.append(measure(name, RECIPES[name], options.out.resolve()))
        except Stopped:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        table = scores.table(options.out, list(RECIPES))
        with files.atomic_write(options.out / "table.md") as partial:
            partial.write_text(table)
    print("\n" + (options.out / "table.md").read_text())
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())

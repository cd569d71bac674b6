"""Drawn pictures as files: PNG with settings inside, a labelled grid, a report; lines on a terminal."""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

import dalle2_jax
from dalle2_jax.data import shards
from dalle2_jax.runtime import grid, processes
from dalle2_jax.runtime.metrics import show_duration

if TYPE_CHECKING:
    from dalle2_jax.generate.result import Result


def slug(caption: str, length: int = 48) -> str:
    """A caption as part of a file name: words joined by '-', letters of any script."""
    return "-".join(re.findall(r"\w+", caption.lower()))[:length].rstrip("-") or "picture"


def report(result: "Result", name: str) -> dict:
    """Model, seed, settings, timings and versions behind the pictures of `result`, JSON values."""
    return {
        "model": name,
        "seed": result.seed,
        "settings": result.settings,
        "timings": {
            stage: {
                "rows": timing.examples,
                "steps": timing.steps,
                "seconds": round(timing.seconds, 4),
                "seconds_per_row": round(timing.seconds / timing.examples, 4),
                "compile_seconds": round(timing.compile_seconds, 4),
            }
            for stage, timing in result.timings.items()
        },
        "seconds_per_picture": round(sum(t.seconds for t in result.timings.values()) / len(result.images), 4),
        "versions": {
            "dalle2_jax": dalle2_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def identity(result: "Result", i: int, **more) -> dict:
    """Caption, number and seed of picture i, and `more`, JSON values."""
    return {"caption": result.captions[i], "number": result.numbers[i], "seed": result.seed} | more


def metadata(result: "Result", i: int, name: str, **more) -> dict[str, str]:
    """The text entries of picture i's PNG: its caption; its `identity`, model and settings as JSON."""
    made = identity(result, i, **more) | {"model": name, "settings": result.settings}
    return {"caption": result.captions[i], "dalle2_jax": json.dumps(made)}


def result_grid(result: "Result") -> np.ndarray:
    """The pictures with their captions below, uint8 [H, W, 3]; a row a caption if n is above 1."""
    columns = max(result.numbers) + 1
    return grid.labelled_grid(result.images, result.captions, columns if columns > 1 else None)


def write_pictures(
    out: str | os.PathLike, result: "Result", name: str, command: str = "generate", **more
) -> list[epath.Path]:
    """Write the pictures, grid.png and COMMAND.json of `result` into `out`; return the pictures' paths.

    Replaces files of the same names alone: COMMAND.json lists its pictures. `more`, JSON values, goes into it
    and into the pictures' metadata.
    """
    folder = epath.Path(out)
    paths = [folder / f"{i:04d}_{slug(caption)}.png" for i, caption in enumerate(result.captions)]
    for i, (path, image) in enumerate(zip(paths, result.images, strict=True)):
        grid.save_png(path, image, metadata(result, i, name, **more))
    captions = json.dumps(result.captions, ensure_ascii=False)
    grid.save_png(folder / "grid.png", result_grid(result), {"captions": captions})
    pictures = [{"file": path.name} | identity(result, i, **more) for i, path in enumerate(paths)]
    summary = {"pictures": pictures, "grid": "grid.png"} | report(result, name)
    text = shards.encodable(json.dumps(summary, indent=2, ensure_ascii=False))  # files may have any name
    (folder / f"{command}.json").write_text(text + "\n", "utf-8")
    return paths


def note(line: str) -> None:
    """Print a note; of several processes the first prints."""
    if processes.is_first():
        print(f"note: {line}", flush=True)


class StageLines:
    """Prints lines of progress of each stage: pictures done, seconds, seconds a picture."""

    def __init__(self, file=None, clock=time.monotonic, every: float = 5.0):
        self._file, self._clock, self._every, self._last = file or sys.stdout, clock, every, float("-inf")
        self._silent = not processes.is_first()

    def __call__(self, stage: str, done: int, total: int, seconds: float) -> None:
        """Print progress, at most once in `every` seconds and at the end."""
        now = self._clock()
        if self._silent or done < total and now - self._last < self._every:
            return
        self._last = now
        line = f"{stage:>12} {done}/{total} pictures, {seconds:.2f} s, {seconds / done:.3f} s a picture"
        print(line, file=self._file, flush=True)


class ProgressLine:
    """One line of progress, written over itself: the step, pictures done, the time left.

    The time left is that of all steps if their speeds are known, else that of the step. A context: at its end
    the line says how many seconds it took.

    Args:
      steps: the steps that will run, in their order.
      speeds: step -> seconds a picture when it last ran; updated.
      file: None: stderr.
    """

    def __init__(self, steps: Sequence[str], speeds: dict[str, float], file=None, clock=time.monotonic):
        self._steps, self._speeds, self._file, self._clock = list(steps), speeds, file, clock
        self._began, self._width, self._silent = clock(), 0, not processes.is_first()

    def __enter__(self) -> "ProgressLine":
        self._show("drawing" if self._speeds else "drawing (the first time compiles, once)")
        return self

    def __exit__(self, error, *_) -> None:
        if error is None:
            self._show(f"drawn in {show_duration(self._clock() - self._began)}", "\n")
        else:  # its message takes the line's place
            self._show("", "\r")

    def __call__(self, step: str, done: int, total: int, seconds: float) -> None:
        """Show that `done` of `total` pictures have passed a step, `seconds` after its start."""
        self._speeds[step] = seconds / done
        later = self._steps[self._steps.index(step) + 1 :] if step in self._steps else []
        left = (total - done) * self._speeds[step] + total * sum(self._speeds.get(name, 0) for name in later)
        note = f"{show_duration(left)} left"
        if not all(name in self._speeds for name in later):
            note = f"next {later[0]}" if done == total else f"{note} in this step"
        self._show(f"{step} {done}/{total}, {note}")

    def _show(self, text: str, end: str = "") -> None:
        if not self._silent:
            print(f"\r{text:<{self._width}}", end=end, file=self._file or sys.stderr, flush=True)
            self._width = len(text)

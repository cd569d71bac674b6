"""Drawn pictures as files: PNG with settings inside, a labelled grid, a report; lines on a terminal."""

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

import dalle2_jax
from dalle2_jax.data import shards
from dalle2_jax.generate import rerank
from dalle2_jax.runtime import files, grid, processes
from dalle2_jax.runtime.metrics import show_duration

if TYPE_CHECKING:
    from dalle2_jax.generate.pipeline import Pipeline
    from dalle2_jax.generate.result import Result

COLUMNS = 10  # of a grid


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
        "versions": versions(),
        "devices": devices(),
    }


def versions() -> dict[str, str]:
    """Versions of this package and of what it computes with."""
    names = {"dalle2_jax": dalle2_jax, "jax": jax, "numpy": np}
    return {name: module.__version__ for name, module in names.items()} | {"python": sys.version.split()[0]}


def devices() -> str:
    """Number and kind of the devices, '2 x cpu'."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def origin(model: "Pipeline", count: int, batch_size: int | None = None) -> Callable[[], dict]:
    """A function that returns what pictures depend on besides caption, seed and settings, JSON values.

    A call reads the files of the weights, for their sha256. The function keeps no weights in memory.

    Args:
      model: has drawn `count` pictures.
      batch_size: of the drawing. With count and devices it fixes the size of the compiled batch, which may
        change the last bits.
    """
    engine = model.engine
    weights = {name: os.fspath(engine.weights_file(name)) for name in engine.stages}
    how = dict(dtype=engine.dtype, low_memory=engine.low_memory, batch_size=batch_size)
    how |= dict(count=len(processes.share(count)), local_devices=jax.local_device_count())
    return functools.partial(_origin, weights, how | dict(versions=versions(), devices=devices()))


def _origin(weights: Mapping[str, str], how: dict) -> dict:
    return {"weights": {name: files.sha256(path) for name, path in weights.items()}, **how}


def identity(result: "Result", i: int, **more) -> dict:
    """Caption, number and seed of picture i, and `more`, JSON values."""
    return {"caption": result.captions[i], "number": result.numbers[i], "seed": result.seed} | more


def metadata(result: "Result", i: int, name: str, **more) -> dict[str, str]:
    """The text entries of picture i's PNG: its caption; `identity`, `origin`, model and settings as JSON."""
    made = identity(result, i, **more) | {"model": name, "settings": result.settings}
    return {"caption": result.captions[i], "dalle2_jax": json.dumps(made)}


@dataclasses.dataclass(frozen=True)
class Source:
    """The first cells of a grid, such as the picture that was edited.

    Attributes:
      images: uint8 [N, H, W, 3]. labels: N texts.
      pictures: labels of the pictures after them; None: their captions.
    """

    images: np.ndarray
    labels: Sequence[str]
    pictures: Sequence[str] | None = None


def write_pictures(
    out: str | os.PathLike,
    result: "Result",
    name: str,
    command: str = "generate",
    *,
    origin: Mapping | None = None,
    source: Source | None = None,
    **more,
) -> list[epath.Path]:
    """Write the pictures, grid.png and COMMAND.json of `result` into `out`; return the pictures' paths.

    Replaces files of the same names alone: COMMAND.json lists its pictures.

    Args:
      origin: of the pictures, for the PNGs and COMMAND.json; None: that of the result, if it has one.
      source: the first cells of the grid, such as the picture that was edited.
      more: JSON values for COMMAND.json and the PNGs.
    """
    origin = result.origin() if origin is None and result.origin is not None else origin
    folder, made = epath.Path(out), {"origin": origin} if origin else {}
    paths = [folder / f"{i:04d}_{slug(caption)}.png" for i, caption in enumerate(result.captions)]
    for i, (path, image) in enumerate(zip(paths, result.images, strict=True)):
        grid.save_png(path, image, metadata(result, i, name, **made, **more))
    captions = json.dumps(result.captions, ensure_ascii=False)
    grid.save_png(folder / "grid.png", result_grid(result, source), {"captions": captions})
    pictures = [{"file": path.name} | identity(result, i, **more) for i, path in enumerate(paths)]
    summary = {"pictures": pictures, "grid": "grid.png"} | report(result, name) | made
    text = shards.encodable(json.dumps(summary, indent=2, ensure_ascii=False))  # files may have any name
    (folder / f"{command}.json").write_text(text + "\n", "utf-8")
    return paths


def per_caption(result: "Result") -> int:
    """Pictures of each caption: by the numbers 0 .. n - 1; of reranked pictures by the runs of captions."""
    if rerank.NAME not in result.settings:
        return max(result.numbers) + 1
    runs = [len([*group]) for _, group in itertools.groupby(result.captions)]
    return min(runs)


def result_grid(result: "Result", source: Source | None = None) -> np.ndarray:
    """The labelled grid of a result: n pictures of a caption side by side, at most COLUMNS a row."""
    if source is not None:
        labels = [*source.labels, *(source.pictures or result.captions)]
        return grid.labelled_grid(np.concatenate([source.images, result.images]), labels)
    n = per_caption(result)
    columns = -(-n // -(-n // COLUMNS))
    if n == 1 or len(result.images) % n:
        return grid.labelled_grid(result.images, result.captions)
    blank = -n % columns  # each caption begins a row
    images = result.images.reshape(-1, n, *result.images.shape[1:])
    images = np.pad(images, ((0, 0), (0, blank), (0, 0), (0, 0), (0, 0)), constant_values=255)
    groups = [result.captions[i : i + n] for i in range(0, len(result.images), n)]
    labels = [label for captions in groups for label in [*captions, *[""] * blank]]
    return grid.labelled_grid(images.reshape(-1, *images.shape[2:]), labels, columns)


def say(line: str) -> None:
    """Print a line; of several processes the first prints."""
    if processes.is_first():
        print(line, flush=True)


def note(line: str) -> None:
    """Print a note; of several processes the first prints."""
    say(f"note: {line}")


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

"""Drawn pictures as files: PNG with settings inside, a labelled grid, a report; progress on a terminal."""

import json
import os
import re
import sys
import time

import jax
import numpy as np
from etils import epath

import dalle2_jax
from dalle2_jax.data import shards
from dalle2_jax.generate.pipeline import Result
from dalle2_jax.runtime import metrics, processes


def slug(caption: str, length: int = 48) -> str:
    """A caption as part of a file name: words joined by '-', letters of any script."""
    return "-".join(re.findall(r"\w+", caption.lower()))[:length].rstrip("-") or "picture"


def report(result: Result, name: str) -> dict:
    """What made the pictures of `result`, JSON values."""
    return {
        "model": name,
        "seed": result.seed,
        "settings": result.settings,
        "timings": {
            stage: {
                "rows": timing.rows,
                "steps": timing.steps,
                "seconds": round(timing.seconds, 4),
                "seconds_per_row": round(timing.seconds / timing.rows, 4),
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


def metadata(result: Result, i: int, name: str, **said) -> dict[str, str]:
    """The text entries of picture i's PNG: its caption, and as JSON all that made it and what is `said`."""
    made = {"caption": result.captions[i], "number": result.numbers[i], "seed": result.seed} | said
    made |= {"model": name, "settings": result.settings}
    return {"caption": result.captions[i], "dalle2_jax": json.dumps(made)}


def write_pictures(
    out: str | os.PathLike, result: Result, name: str, command: str = "generate", **said
) -> list[epath.Path]:
    """Write the pictures, grid.png and COMMAND.json of `result` into `out`; the pictures' paths.

    Files of the same names are replaced, others left alone: COMMAND.json lists what belongs to it. `said`,
    JSON values, goes into it and into the pictures' metadata.
    """
    out = epath.Path(out)
    summary = report(result, name)
    paths, pictures = [], []
    for i, (image, caption, number) in enumerate(
        zip(result.images, result.captions, result.numbers, strict=True)
    ):
        path = out / f"{i:04d}_{slug(caption)}.png"
        made = {"caption": caption, "number": number, "seed": result.seed} | said
        metrics.save_png(path, image, metadata(result, i, name, **said))
        paths.append(path)
        pictures.append({"file": path.name} | made)
    columns = max(result.numbers) + 1
    grid = metrics.labelled_grid(result.images, result.captions, columns if columns > 1 else None)
    metrics.save_png(out / "grid.png", grid, {"captions": json.dumps(result.captions, ensure_ascii=False)})
    summary = {"pictures": pictures, "grid": "grid.png"} | summary
    text = shards.encodable(json.dumps(summary, indent=2, ensure_ascii=False))  # files may have any name
    (out / f"{command}.json").write_text(text + "\n", "utf-8")
    return paths


class StageLines:
    """Prints a line a stage on a terminal of any kind: pictures done, seconds, seconds a picture."""

    def __init__(self, file=None, clock=time.monotonic, every: float = 5.0):
        self._file, self._clock, self._every, self._last = file or sys.stdout, clock, every, float("-inf")
        self._silent = not processes.is_first()

    def __call__(self, stage: str, done: int, total: int, seconds: float) -> None:
        """Print progress, at most once in `every` seconds and at the end."""
        now = self._clock()
        if self._silent or done < total and now - self._last < self._every:
            return
        self._last = now
        print(
            f"{stage:>12} {done}/{total} pictures, {seconds:.2f} s, {seconds / done:.3f} s a picture",
            file=self._file,
            flush=True,
        )

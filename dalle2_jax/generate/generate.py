"""python -m dalle2_jax.generate [--model=DIR] "caption" ["caption" ...] [--n=4 --seed=0 --out=outputs ...]

Draws captions with a model directory, or with the small model that comes with the package. --out gets every
picture as PNG (with the settings inside), a labelled grid.png, and generate.json, which says what made them.
"""

import json
import os
import re
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath

import dalle2_jax
from dalle2_jax.data import shards
from dalle2_jax.generate import pipeline
from dalle2_jax.generate.settings import SETTINGS, split
from dalle2_jax.runtime import commandline, metrics, partition, processes


def slug(caption: str, length: int = 48) -> str:
    """A caption as part of a file name: words joined by '-', letters of any script."""
    return "-".join(re.findall(r"\w+", caption.lower()))[:length].rstrip("-") or "picture"


def report(result: pipeline.Result, name: str) -> dict:
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


def metadata(result: pipeline.Result, i: int, name: str, **said) -> dict[str, str]:
    """The text entries of picture i's PNG: its caption, and as JSON all that made it and what is `said`."""
    made = {"caption": result.captions[i], "number": result.numbers[i], "seed": result.seed} | said
    made |= {"model": name, "settings": result.settings}
    return {"caption": result.captions[i], "dalle2_jax": json.dumps(made)}


def write_pictures(
    out: str | os.PathLike, result: pipeline.Result, name: str, command: str = "generate", **said
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


FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help lists what is defined here as the command's own


def define_sampling_flags() -> None:
    """Define the flags that say how to draw; `sampling_settings` reads them."""
    commandline.DEFINE_path(
        "model", None, "Model directory; by default the small model that comes with the package."
    )
    for name, setting in SETTINGS.items():
        text = setting.help.removesuffix(".") + "; default: the model's own."
        if isinstance(setting.kind, tuple):
            flags.DEFINE_enum(name, None, setting.kind, text)
        else:
            _DEFINE[setting.kind](name, None, text)
    flags.DEFINE_alias("steps", "decoder_steps")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type; default: as trained.")
    flags.DEFINE_bool("low_memory", False, "Weights as they are stored, those of one stage at a time.")
    flags.DEFINE_integer("batch_size", None, "Pictures at a time, rounded up to a multiple of the devices.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")


class _Interval(flags.ArgumentParser):
    """LO,HI -> two numbers."""

    syntactic_help = "two numbers: LO,HI"

    def parse(self, argument):
        """Raises ValueError for what is no pair of numbers."""
        if not isinstance(argument, str):
            return argument
        try:
            low, high = (float(text) for text in argument.split(","))
        except ValueError:
            raise ValueError(f"{argument!r} must be two numbers LO,HI, such as 0.2,3") from None
        return low, high


def _define_interval(name: str, default, text: str) -> None:
    flags.DEFINE(_Interval(), name, default, text)


_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    list: flags.DEFINE_list,
    tuple: _define_interval,
}


def sampling_settings(changes: dict[str, str] | None = None) -> dict:
    """The keywords of `UnCLIP.settings` that the flags give, with `changes` (name -> text) instead of some.

    Raises ValueError for steps that are no numbers, and for a change that is no setting or has no such value.
    """
    values = {name: FLAGS[name].value for name in SETTINGS}
    split(changes or {})  # names what is no setting
    for name, text in (changes or {}).items():
        try:
            values[name] = FLAGS[name].parser.parse(text)
        except ValueError as error:
            raise ValueError(f"{name}={text}: {error}") from None
    steps = values["upsampler_steps"]
    if steps is not None and not all(text.strip().isdigit() for text in steps):
        raise ValueError(f"upsampler_steps {','.join(steps)!r} must be whole numbers, such as 27,15")
    return values | {"upsampler_steps": None if steps is None else [int(text) for text in steps]}


def main(argv):
    """Run the command; `argv` without the flags."""
    captions = [shards.clean_caption(text) for text in argv[1:]]
    with processes.together(debug=FLAGS.debug):
        pipeline.check_captions(captions)
        settings = sampling_settings()
        partition.initialise()
        processes.join()
        began = time.monotonic()
        model = pipeline.UnCLIP.load(FLAGS.model, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
        for line in model.cut_captions(captions):
            if processes.is_first():
                print(f"note: {line}", flush=True)
        epath.Path(FLAGS.out).mkdir(parents=True, exist_ok=True)  # now, not after an hour of drawing
        result = model.text_to_image(
            captions,
            **settings,
            seed=FLAGS.seed,
            n=FLAGS.n,
            batch_size=FLAGS.batch_size,
            progress=StageLines(),
        )
        if not processes.is_first():
            return
        paths = write_pictures(FLAGS.out, result, model.name)
        compiling = sum(timing.compile_seconds for timing in result.timings.values())
        sampling = sum(timing.seconds for timing in result.timings.values())
        print(
            f"{len(paths)} picture{'s' * (len(paths) > 1)} of {model.image_size} x {model.image_size} in "
            f"{time.monotonic() - began:.1f} s (compiling {compiling:.1f} s, {sampling / len(paths):.2f} s a "
            f"picture): {epath.Path(FLAGS.out) / 'grid.png'}"
        )

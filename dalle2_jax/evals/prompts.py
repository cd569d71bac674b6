"""Suites of prompts drawn for tools that judge them: GenEval, DrawBench, PartiPrompts, or any captions.

The pictures of every suite lie as GenEval's evaluator wants them:

    OUT/prompts.jsonl                  a line a prompt: all that its file says of it
    OUT/00000/metadata.jsonl           that line
    OUT/00000/samples/0000.png, ...    the pictures
    OUT/00000/grid.png                 all of them

A file of prompts is GenEval's evaluation_metadata.jsonl ('prompt'), DrawBench's csv ('Prompts'), the tsv of
PartiPrompts ('Prompt'), or a text file with a caption on each line.
"""

import csv
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import grid, processes
from dalle2_jax.data.shards import clean_caption, encodable
from dalle2_jax.evals.picture_sets import keep_plan
from dalle2_jax.pipeline import MAX_CAPTION, check_captions

KEYS = ("prompt", "Prompt", "Prompts", "caption")
KINDS = (".jsonl", ".csv", ".tsv", ".txt")
AT_A_TIME = 64  # pictures, before they are written


def read_prompts(path: str | os.PathLike) -> list[dict]:
    """What a file says of each prompt, in its order, 'prompt' among it.

    Raises ValueError for another kind of file, one without prompts, and for a prompt that cannot be drawn.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: a file of prompts ends in {', '.join(KINDS)}")
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        elif path.suffix == ".txt":
            rows = [{"prompt": line.strip()} for line in file if line.strip()]
        else:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    found = []
    for number, row in enumerate(rows, 1):
        key = next((key for key in KEYS if isinstance(row, dict) and row.get(key)), None)
        if key is None:
            raise ValueError(f"{path}: entry {number} has none of {', '.join(map(repr, KEYS))}")
        found.append(
            {name: value for name, value in row.items() if name != key} | {"prompt": clean_caption(row[key])}
        )
    try:
        check_captions([row["prompt"] for row in found])
    except ValueError as error:
        raise ValueError(f"{path}: {error} (captions have at most {MAX_CAPTION} characters)") from None
    return found


def draw(
    model,
    prompts: Sequence[dict],
    out: str | os.PathLike,
    *,
    n: int = 4,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    progress=None,
) -> Path:
    """`n` pictures of each of `prompts`, drawn by an `UnCLIP`, in the module's layout; those there are stay.

    So drawing that was interrupted goes on. Raises ValueError where the folder holds pictures of another
    model, seed, settings or prompts.
    """
    out = Path(out)
    weights = {name: model.cascade.weights_sha256(name) for name in model.cascade.stages}
    plan = {"model": model.name, "weights_sha256": weights, "n": n, "seed": seed}
    plan = json.dumps(plan | {"settings": model.settings(**(settings or {}))}, indent=2) + "\n"
    lines = [encodable(json.dumps(row, ensure_ascii=False)) + "\n" for row in prompts]
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("plan.json", plan), ("prompts.jsonl", "".join(lines))):
        processes.one_then_others(name, functools.partial(keep_plan, out / name, text))
    folders = [out / f"{i:05d}" for i in range(len(prompts))]
    missing = np.array([not (folder / "grid.png").exists() for folder in folders])
    missing = np.flatnonzero(processes.from_first(missing)).tolist()  # the same for all
    at_once = max(1, AT_A_TIME // n) * jax.process_count()
    for start in range(0, len(missing), at_once):
        part = missing[start : start + at_once]
        captions = [prompts[i]["prompt"] for i in part]
        images = model.text_to_image(
            captions, n=n, seed=seed, batch_size=batch_size, progress=progress, **(settings or {})
        ).images
        for k, i in enumerate(part if processes.is_first() else ()):
            (folders[i] / "samples").mkdir(parents=True, exist_ok=True)
            (folders[i] / "metadata.jsonl").write_text(lines[i], "utf-8")
            own = images[k * n : (k + 1) * n]
            for number, image in enumerate(own):
                grid.save_png(folders[i] / "samples" / f"{number:04d}.png", image, {"caption": captions[k]})
            # last, as it says that the rest is there
            partial = folders[i] / ".grid.partial"
            grid.save_png(partial, grid.labelled_grid(own, [captions[k]] * n, n), {"caption": captions[k]})
            partial.rename(folders[i] / "grid.png")
    processes.sync("drawn")
    return out

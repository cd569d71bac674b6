"""Suites of prompts, drawn for external tools: GenEval, DrawBench, PartiPrompts, or any captions.

The pictures of every suite have the layout of GenEval's evaluator:

    OUT/prompts.jsonl                  a line a prompt, with all fields of the suite's file
    OUT/00000/metadata.jsonl           that line
    OUT/00000/samples/0000.png, ...    the pictures
    OUT/00000/grid.png                 all of them

A file of prompts is GenEval's evaluation_metadata.jsonl ('prompt'), DrawBench's csv ('Prompts'), the tsv of
PartiPrompts ('Prompt'), a JSON list of texts or of such objects, or a text file with a caption on each line.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from dalle2_jax.data.shards import clean_caption, encodable
from dalle2_jax.evaluate.drawing import open_drawn_folder, plan_of, save_picture
from dalle2_jax.generate.captions import MAX_CAPTION, check_captions
from dalle2_jax.runtime import files, grid, processes

KEYS = ("prompt", "prompts", "caption", "captions")  # in upper or lower case
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
AT_A_TIME = 64  # pictures, before they are written


def read_prompts(path: str | os.PathLike) -> list[dict]:
    """The fields of each prompt in a file, in its order, with the text as 'prompt'.

    The file is UTF-8, or UTF-16 with a byte-order mark. Raises ValueError for another kind of file or
    encoding, for a file without prompts, and for a prompt that cannot be drawn.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path}: a file of prompts ends in {', '.join(KINDS)}")
    text = files.read_text(path)
    if kind in (".csv", ".tsv"):
        rows = _table(path, text, "\t" if kind == ".tsv" else ",")
    elif kind == ".txt":
        rows = [{"prompt": line} for line in io.StringIO(text, newline=None) if line.strip()]
    else:
        rows = _json(path, text, lines=kind == ".jsonl")
    found = []
    for number, row in enumerate(rows, 1):
        key = _key(row)
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{path}: entry {number} has none of {', '.join(map(repr, KEYS))}; it has "
                f"{', '.join(map(repr, row)) or 'nothing'}"
                if key is None
                else f"{path}: entry {number} has {value!r} for {key!r}: give a text"
            )
        others = {name: other for name, other in row.items() if name != key}
        found.append(others | {"prompt": clean_caption(value)})
    try:
        check_captions([row["prompt"] for row in found])
    except ValueError as error:
        raise ValueError(f"{path}: {error} (captions have at most {MAX_CAPTION} characters)") from None
    return found


def _key(names: Iterable[str]) -> str | None:
    """The first of KEYS among `names`, in its spelling there, or None."""
    spelled = {name.strip().lower(): name for name in names}
    return next((spelled[key] for key in KEYS if key in spelled), None)


def _table(path: Path, text: str, delimiter: str) -> list[dict]:
    """The non-empty rows of a table with a column of prompts; other delimiters are tried, too.

    Raises ValueError, with the column names, for no such column, and for a row with too many cells.
    """
    columns: list[str] = []
    try:
        for separator in (delimiter, ",", ";", "\t"):  # spreadsheets of many countries write semicolons
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restval="")
            columns = columns or list(reader.fieldnames or ())
            if _key(reader.fieldnames or ()) is None:
                continue
            rows = []
            for row in reader:
                surplus = [cell for cell in row.pop(None, ()) if cell.strip()]
                if surplus:
                    raise ValueError(
                        f"{path}: line {reader.line_num} has more cells than the first line, such as "
                        f"{surplus[0]!r}: put a prompt that holds {separator!r} in quotation marks"
                    )
                if any(cell.strip() for cell in row.values()):
                    rows.append(row)
            return rows
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}") from None
    raise ValueError(
        f"{path}: its first line has none of the columns {', '.join(map(repr, KEYS))}; it has "
        f"{', '.join(map(repr, columns)) or 'nothing'}"
    )


def _json(path: Path, text: str, lines: bool) -> list[dict]:
    """The objects of a JSON list or of JSON lines; a text instead of an object is a prompt."""
    where, rows = "the file", []
    try:
        if lines:
            found = []
            for number, line in enumerate(text.split("\n"), 1):
                where = f"line {number}"
                found += [(where, json.loads(line))] if line.strip() else []
        else:
            stored = json.loads(text)
            if not isinstance(stored, list):
                raise ValueError("it must be a list of prompts")
            found = [(f"entry {i}", row) for i, row in enumerate(stored, 1)]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {where} cannot be read as JSON: {error}") from None
    for where, row in found:
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {where} is {row!r}: give a text, or an object with one of {KEYS}")
        rows.append(row)
    return rows


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
    """Draw `n` pictures of each prompt in the module's layout; existing pictures are kept.

    So interrupted drawing resumes. Raises ValueError if the folder holds pictures of another model, seed,
    settings or prompts.
    """
    out, settings = Path(out), settings or {}
    plan = {**plan_of(model), "n": n, "seed": seed, "settings": model.settings(**settings)}
    lines = [encodable(json.dumps(row, ensure_ascii=False)) + "\n" for row in prompts]
    plans = {"plan.json": json.dumps(plan, indent=2) + "\n", "prompts.jsonl": "".join(lines)}
    folders = [f"{i:05d}" for i in range(len(prompts))]
    missing = open_drawn_folder(out, plans, [f"{folder}/grid.png" for folder in folders]).tolist()
    at_once = max(1, AT_A_TIME // n) * jax.process_count()
    for start in range(0, len(missing), at_once):
        part = missing[start : start + at_once]
        captions = [prompts[i]["prompt"] for i in part]
        how = dict(n=n, seed=seed, batch_size=batch_size, progress=progress)
        images = model.text_to_image(captions, **how, **settings).images
        for k, i in enumerate(part if processes.is_first() else ()):
            folder, of_prompt, caption = out / folders[i], images[k * n : (k + 1) * n], captions[k]
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(lines[i], "utf-8")
            for number, image in enumerate(of_prompt):
                save_picture(folder / "samples" / f"{number:04d}.png", image, caption)
            # last: it marks the folder as complete
            save_picture(folder / "grid.png", grid.labelled_grid(of_prompt, [caption] * n, n), caption)
    processes.sync("drawn")
    return out

"""The tables of settings in docs/training.md: `python -m tests.settings_page` updates them from the code.

A table that begins with `| setting |` has a column for each source of defaults (`default`: the config; a
stage: the keywords of its `build`) and a last column with the meaning. Settings and defaults come from the
code. Meanings and the order of rows stay as they are in the page; a new setting comes last, without one.
"""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

from configs import common
from dalle2_jax.data.settings import DataSettings
from dalle2_jax.models import models
from dalle2_jax.train import optim

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/training.md"
# Settings of data that training fills in, from the stage and the config.
FILLED_IN = {
    "fields",
    "image_size",
    "image_sizes",
    "low_res_size",
    "crop_size",
    "num_classes",
    "tokenizer",
    "seed",
}
TABLE = re.compile(r"^\| setting \|.*\n\|[-| ]+\n(?:\|.*\n)*", re.M)
REQUIRED = "required"


def flatten(tree: dict, prefix: str = "") -> dict:
    """{'a.b': value}; an empty dict is a value."""
    flat = {}
    for name, value in tree.items():
        inner = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def of_config() -> dict[str, str]:
    """{setting: default} of a config outside `model`."""
    found = {field.name: field.default for field in dataclasses.fields(optim.Settings)}
    found = {f"optim.{name}": default for name, default in found.items() if name != "num_steps"}
    for name, parameter in inspect.signature(DataSettings).parameters.items():
        if name not in FILLED_IN:
            found[f"data.{name}"] = parameter.default
    return {name: repr(value) for name, value in (found | flatten(common.get_config().to_dict())).items()}


def of_stage(stage: str) -> dict[str, str]:
    """{keyword: its default as the source has it} of a stage's `build`."""
    tree = ast.parse((ROOT / f"dalle2_jax/models/stages/{stage}.py").read_text("utf-8"))
    build = next(f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "build")
    pairs = zip(build.args.kwonlyargs, build.args.kw_defaults, strict=True)
    return {argument.arg: ast.unparse(default) if default else REQUIRED for argument, default in pairs}


def sources() -> dict[str, dict[str, str]]:
    """{column: {setting: default}}."""
    return {"default": of_config()} | {stage: of_stage(stage) for stage in models.STAGES}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read(table: str) -> tuple[list[str], dict[str, str]]:
    """(columns, {setting: meaning}) of a table."""
    header, _, *rows = table.strip().splitlines()
    return cells(header)[1:-1], {cells(row)[0].strip("`"): cells(row)[-1] for row in rows}


def updated(text: str, found: dict[str, dict[str, str]]) -> str:
    """The page with the settings and defaults of `found`. ValueError for a column that no table has."""
    tables = [read(match[0]) for match in TABLE.finditer(text)]
    for column, settings in found.items():
        home = [rows for columns, rows in tables if column in columns]
        if not home:
            raise ValueError(f"no table of settings has a column {column!r}")
        for name in [name for name in settings if not any(name in rows for rows in home)]:
            home[0][name] = ""

    def written(match: re.Match) -> str:
        columns, rows = tables.pop(0)
        lines = match[0].splitlines()[:2]
        for name, meaning in rows.items():
            defaults = [found.get(column, {}).get(name, "") for column in columns]
            if any(defaults):
                shown = [f"`{default}`" if default not in ("", REQUIRED) else default for default in defaults]
                lines.append(f"| `{name}` | {' | '.join(shown)} | {meaning} |".replace("  ", " "))
        return "\n".join(lines) + "\n"

    return TABLE.sub(written, text)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8"), sources()), "utf-8")

"""The pages of the site that the code writes: `pages()`, Markdown.

Docstrings and signatures of the library, each command's --help, settings by `tests.settings_page` with the
meanings of docs/training.md, the settings of sampling and the recipes of the package.
"""

import argparse
import ast
import functools
import importlib
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dalle2_jax.__main__ import COMMANDS
from dalle2_jax.convert import convert
from dalle2_jax.generate.settings import SETTINGS
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.runtime import commandline
from tests import settings_page

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 88  # characters of a line of --help and of a signature
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
# page -> (title, text, objects 'module:name', or modules with all that is public in them)
DOCSTRINGS = {
    "library": (
        "The library",
        "`dalle2_jax.load` opens a model directory as an `UnCLIP`; calling it draws. Edits are methods, too: "
        "[their page](edits.md) has them as functions whose first argument is the model.",
        ("dalle2_jax:load", "dalle2_jax.generate.pipeline:Pipeline", "dalle2_jax.pipeline:UnCLIP")
        + ("dalle2_jax.generate.pipeline:Running", "dalle2_jax.generate.result:Result"),
    ),
    "edits": (
        "Edits",
        "`pipe = dalle2_jax.load()` has these functions as methods: `pipe.variations(picture)`.",
        ("dalle2_jax.edit.actions", "dalle2_jax.edit.latents", "dalle2_jax.generate.unclip")
        + ("dalle2_jax.studio.explain:explain",),
    ),
    "parts": (
        "Parts to build on",
        "[The design](../design.md) says where each thing goes; new parts use these modules.",
        ("dalle2_jax.systems.step", "dalle2_jax.models.stages.settings", "dalle2_jax.evaluate.metric")
        + ("dalle2_jax.data.records", "dalle2_jax.runtime.batch", "dalle2_jax.runtime.partition"),
    ),
}


def write(folder: Path) -> None:
    """Write every page into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / f"{name}.md").write_text(text + "\n", "utf-8")


def pages() -> dict[str, str]:
    """name -> Markdown of every page."""
    found = {name: docstrings(*page) for name, page in DOCSTRINGS.items()}
    return found | {"commands": commands(), "settings": settings(), "recipes": recipes()}


# Docstrings


def docstrings(title: str, text: str, names: Iterable[str]) -> str:
    """A page of docstrings."""
    parts = [f"# {title}", text]
    for name in names:
        module, _, attribute = name.partition(":")
        found = importlib.import_module(module)
        if attribute:
            parts += described(f"{module}.{attribute}", getattr(found, attribute), "##")
            continue
        parts += [f"## `{module}`", markdown(found.__doc__)]
        for public, value in vars(found).items():
            if not public.startswith("_") and getattr(value, "__module__", "") == module and callable(value):
                parts += described(public, value, "###")
    return "\n\n".join(parts)


def described(name: str, value: Any, heading: str) -> list[str]:
    """A function, a property or a class with its public members: heading, signature, docstring."""
    code = "\n".join(["```python", signature(name.rpartition(".")[2], value), "```"])
    parts = [f"{heading} `{name}`", code, markdown(value.__doc__)]
    if inspect.isclass(value):
        for public, member in vars(value).items():
            member = getattr(member, "__func__", member)  # of a class method
            ours = getattr(function(member), "__module__", "") == value.__module__
            if ours and (not public.startswith("_") or public == "__call__"):
                parts += described(f"{name.rpartition('.')[2]}.{public}", member, f"{heading}#")
    return parts


def function(value: Any) -> Any:
    """The function of a property; anything else as it is."""
    if isinstance(value, functools.cached_property):
        return value.func
    return value.fget if isinstance(value, property) else value


def signature(name: str, value: Any) -> str:
    """`name(arguments) -> type`, one argument a line where it is long; `name -> type` of a property."""
    found = inspect.signature(function(value))
    arguments, by_name = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not by_name:
            arguments, by_name = [*arguments, "*"], True
        if parameter.name not in ("self", "cls"):
            arguments.append(re.sub("<.*>", "...", str(parameter)))  # defaults that are objects
    text = f"({', '.join(arguments)})"
    if len(name + text) > WIDTH:
        text = "\n".join(["(", *(f"    {argument}," for argument in arguments), ")"])
    if function(value) is not value:
        text = ""
    if found.return_annotation is not found.empty and not inspect.isclass(value):
        text += f" -> {inspect.formatannotation(found.return_annotation)}"
    return name + re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def markdown(text: str | None) -> str:
    """A docstring with its sections (Args, Raises, ...) as lists."""
    lines: list[str] = []
    inside = False
    for line in inspect.cleandoc(text or "").splitlines():
        entry = re.match(r"  (\S[^:]*): (.*)", line)
        if SECTION.fullmatch(line):
            lines += [f"**{line[:-1]}**", ""]
        elif inside and entry:
            lines += [f"- `{entry[1]}`: {entry[2]}"]
        elif inside and line.startswith("  "):
            lines += [f"  {line.strip()}"]
        else:
            lines += [line]
        inside = bool(SECTION.fullmatch(line)) or inside and (not line or line.startswith("  "))
    return "\n".join(lines)


# Commands


def commands() -> str:
    """Every command with its --help; `convert` with that of each subcommand."""
    parts = ["# Commands", "`dalle2-jax COMMAND` is `python -m dalle2_jax.COMMAND`."]
    for name, about in COMMANDS.items():
        parts += [f"## {name}", f"{about[0].upper()}{about[1:]}.", block(help_of(name))]
    parser = convert.make_parser()
    (subcommands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    for name, subcommand in subcommands.items():
        if subcommand.prog.endswith(f" {name}"):  # no alias
            subcommand.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)
            parts += [f"## convert {name}", block(subcommand.format_help())]
    return "\n\n".join(parts)


def help_of(name: str) -> str:
    """What `python -m dalle2_jax.NAME --help` prints. RuntimeError: it prints no flags."""
    command = [sys.executable, "-m", f"dalle2_jax.{name}", "--help"]
    environment = os.environ | {"COLUMNS": str(WIDTH), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "--" not in done.stdout:
        raise RuntimeError(f"{name} --help ends with status {done.returncode}: {done.stderr}")
    return done.stdout.replace(f"{ROOT}/", "")


def block(text: str) -> str:
    """A block of text as it is."""
    return "\n".join(["```text", text.strip("\n"), "```"])


# Settings and recipes


def settings() -> str:
    """Every setting of a config and of sampling."""
    meanings: dict[str, dict[str, str]] = {}
    for match in settings_page.TABLE.finditer(settings_page.PAGE.read_text("utf-8")):
        columns, rows = settings_page.read(match[0])
        for column in columns:
            meanings.setdefault(column, {}).update(rows)
    parts = ["# Settings"]
    parts += ["`--config.NAME=value` sets one. [Training](../training.md#settings) has them by subject."]
    for column, defaults in settings_page.sources().items():
        title, prefix = ("A config", "") if column == "default" else (f"`model` of `{column}`", "model.")
        rows = (
            (f"`{prefix}{name}`", f"`{default}`", relinked(meanings[column].get(name, "")))
            for name, default in sorted(defaults.items())
        )
        parts += [f"## {title}", table(("setting", "default", "meaning"), rows)]
    parts += ["## Sampling"]
    parts += ["Keywords of the library and flags `--NAME=value` of commands. The model has the defaults."]
    rows = ((f"`{name}`", values(setting), meaning(setting)) for name, setting in SETTINGS.items())
    return "\n\n".join([*parts, table(("setting", "values", "meaning"), rows)])


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def relinked(cell: str) -> str:
    """A cell of docs/training.md for a page in docs/reference."""
    cell = cell.replace("](#", "](training.md#")
    return re.sub(r"\]\((?=[\w-]+\.md)", "](../", cell)


def values(setting: Setting) -> str:
    """The values that a setting of sampling takes."""
    if isinstance(setting.kind, tuple):
        return ", ".join(f"`{value}`" for value in setting.kind)
    kinds = {"pair": "two numbers", "list": "whole numbers", int: "whole number", float: "number"}
    bounds = {"from": setting.low, "to": setting.high}.items()
    limits = [f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)]
    return " ".join([kinds.get(setting.kind, "text"), *limits])


def meaning(setting: Setting) -> str:
    """The help of a setting of sampling."""
    return setting.help.replace("|", "\\|")


def recipes() -> str:
    """Every recipe of the package with the first paragraph of its docstring."""
    parts = ["# Recipes", "`--config=NAME`, or `--config=configs/NAME.py`; a preset follows after a colon."]
    rows = []
    for name, path in commandline.recipes().items():
        about = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        rows.append((f"`{name}`", " ".join(about.split("\n\n")[0].split()).replace("|", "\\|")))
    return "\n\n".join([*parts, table(("recipe", "content"), rows)])

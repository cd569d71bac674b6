"""Flags that several commands have: --config, and flags whose value is a path."""

import ast
import importlib
import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from absl import flags

from dalle2_jax.runtime import files, names

RECIPES = "dalle2_jax.configs"  # code imports no recipe: flags name them
flags.disclaim_key_flags()  # --help lists the flags defined here with those of the command


def recipes() -> dict[str, Path]:
    """The recipes of the package by name: 'decoder64', 'ddpm/tiny'; programs beside them are none."""
    (folder,) = importlib.import_module(RECIPES).__path__
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in Path(folder).rglob("*.py")}
    kept = sorted(name for name in found if not name.endswith(("__init__", "common")))
    return {name: found[name] for name in kept if "def get_config(" in found[name].read_text("utf-8")}


def recipe_file(name: str) -> str:
    """The path of a recipe: of a file, or of one of `recipes`, such as decoder64 or configs/decoder64.py.

    An existing file wins. Raises ValueError with the nearest names for an unknown recipe.
    """
    if Path(path := files.expand(name)).is_file():
        return path
    known, key = recipes(), name.removeprefix("configs/").removesuffix(".py")
    if key in known:
        return str(known[key])
    inside = " or ".join(recipe for recipe in known if recipe.startswith(f"{key}/"))
    near = inside or names.nearest(key, known, most=3, show=str)
    hint = f"did you mean {near}?" if near else f"recipes of the package: {', '.join(known)}"
    raise ValueError(f"there is no file and no recipe {name}; {hint}")


def recipes_text() -> str:
    """The recipes of the package with the first sentence of each, for --help."""
    lines = [
        "recipes, as --config=NAME; preset :debug of those without a folder takes two steps on drawn scenes:"
    ]
    for name, path in recipes().items():
        about = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        sentence = re.split(r"(?<=[.:])\s", " ".join(about.split("\n\n")[0].split()))[0].rstrip(".:")
        lines.append(f"  {name.ljust(20)}  {textwrap.shorten(sentence, 86, placeholder=' ...')}")
    return "\n".join(lines)


def define_config(
    text: str = "Recipe, such as decoder64, or FILE.py, with :preset; override with --config.a.b=value.",
) -> None:
    """Defines --config, and --config.a.b for every setting of the recipe."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, text, lock_config=False, accept_new_attributes=True)
    parser: Any = flags.FLAGS["config"].parser
    load = parser.parse

    def parse(argument: str):
        name, colon, preset = argument.partition(":")
        if importlib.util.find_spec("configs") is None:  # a wheel: recipes of users may import it
            sys.modules["configs"] = importlib.import_module(RECIPES)
        return load(recipe_file(name) + colon + preset)

    parser.parse = parse


class PathParser(flags.ArgumentParser):
    """The path of a file or a folder, expanded by `files.expand`."""

    def parse(self, argument: str) -> str:
        """The expanded path."""
        return files.expand(argument)

    def flag_type(self) -> str:
        """The type that --help shows."""
        return "path"


def DEFINE_path(name: str, default: str | None, text: str) -> None:
    """Defines a flag whose value is a path or an address."""
    flags.DEFINE(PathParser(), name, default, text, serializer=flags.ArgumentSerializer())


def DEFINE_multi_path(name: str, default: list[str] | None, text: str) -> None:
    """Defines a flag whose value is a list of paths, one for each time that it is set."""
    flags.DEFINE_multi(PathParser(), flags.ArgumentSerializer(), name, default, text)

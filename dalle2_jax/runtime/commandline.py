"""Flags that several commands have: --config, and flags whose value is a path."""

from typing import Any

from absl import flags

from dalle2_jax.runtime import files

flags.disclaim_key_flags()  # --help lists the flags defined here with those of the command


def define_config(text: str = "Config file, FILE.py[:preset]; override with --config.a.b=value.") -> None:
    """Defines --config, and --config.a.b for every setting of the file."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, text, lock_config=False, accept_new_attributes=True)
    parser: Any = flags.FLAGS["config"].parser
    load = parser.parse
    parser.parse = lambda path: load(files.expand(path))


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

"""The start of a command: its first line, quiet logs, flags parsed with hints, --help in groups.

start.begin(__name__, "generate: loading JAX")   before the imports that take seconds
with start.group("memory"): flags.DEFINE_...     a group of --help
start.run(main)                                  in place of app.run
"""

import contextlib
import functools
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from dalle2_jax.runtime.names import nearest_setting

FLAGS = flags.FLAGS
HELP = ("--help", "-help", "--helpshort", "-h", "-?")
OFTEN, SAMPLING, MEMORY, EXPERT = "often used", "sampling", "memory", "expert"
FAILED = 2  # exit status for flags that cannot be used, as for settings
_LABEL = 30  # characters of a flag's name and value before its help begins
_groups: dict[str, list[str]] = {}


def begin(module: str, line: str) -> None:
    """Prints the first line of a command, and silences the notes of libraries, before JAX is imported.

    module: the caller's __name__; nothing happens unless it is '__main__'. Warnings stay, such as JAX's of a
    GPU that it cannot use.
    """
    if module != "__main__":
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # TensorFlow's notes on instruction sets
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no note on oneDNN: here TensorFlow computes nothing
    if not {"JAX_LOGGING_LEVEL", "JAX_DEBUG_LOG_MODULES"} & os.environ.keys():
        # at INFO it names every backend that is not there
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    absl_logging.get_absl_logger().addFilter(_without_notes_of_tfds)
    if not set(HELP) & set(sys.argv[1:]):
        print(line, file=sys.stderr, flush=True)


def _without_notes_of_tfds(record: logging.LogRecord) -> bool:
    """A filter: False for what tensorflow-datasets logs of its folders."""
    return record.levelno > logging.INFO or "tensorflow_datasets" not in record.pathname


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
    """Flags defined inside belong to this group of --help; other flags to `OFTEN`."""
    before = set(FLAGS)
    yield
    _groups.setdefault(title, []).extend(name for name in FLAGS if name not in before)


def run(
    main: Callable, *, more: Callable[[], str] | None = None, settings: Callable[[], Iterable[str]] = tuple
) -> None:
    """`app.run` with our --help and hints.

    Args:
      main: takes the arguments that are no flags.
      more: text at the end of --help.
      settings: names 'a.b' of the settings of --config, for hints.
    """
    app.run(main, flags_parser=functools.partial(_parse, more=more, settings=settings))


def _parse(argv: list[str], more: Callable[[], str] | None, settings: Callable) -> list[str]:
    """The arguments that are no flags; --help prints the page and ends the program, as does a wrong flag."""
    if any(argument in HELP for argument in argv[1:]):
        print(help_page(sys.modules["__main__"].__doc__ or "", more() if more else ""))
        raise SystemExit(0)
    try:
        return FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        near = nearest_flag(error.flagname, settings())
        hint = f"did you mean {near}?" if near else "--help lists the flags"
        message = f"there is no flag --{error.flagname}; {hint}"
    except flags.Error as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(FAILED)


def nearest_flag(name: str, settings: Iterable[str] = ()) -> str:
    """The flag or the --config setting that is nearest to an unknown flag's name; '' if none is.

    Flags of this program come before settings, and those before flags of libraries.
    """
    ours = [f"--{flag}" for flag in _own_flags()]
    own = {flag.removeprefix("--"): flag for flag in ours}
    of_config = {setting: f"--config.{setting}" for setting in settings}
    for choices in (own, of_config):
        if near := nearest_setting(name.removeprefix("config."), choices):
            return choices[near]
    return ""


def _own_flags() -> list[str]:
    """The names of the flags of this command, in the order in which they were defined."""
    key = {flag.name for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}  # absl's name of __main__
    grouped = {name for names in _groups.values() for name in names}
    return [name for name in FLAGS if name in key | grouped]


def help_page(about: str, more: str = "") -> str:
    """The text of --help: what the command does, its flags by group, `more`."""
    grouped = {name for names in _groups.values() for name in names}
    found = {OFTEN: [], **_groups}
    found[OFTEN] = [*(name for name in _own_flags() if name not in grouped), *found[OFTEN]]
    last = ("", MEMORY, EXPERT)
    titles = [title for title in found if found[title]]
    titles.sort(key=lambda title: last.index(title) if title in last else 0)
    parts = [about.rstrip()]
    for title in titles:
        names = sorted(found[title], key=lambda name: name == "debug")
        lines = [line for name in names for line in _flag_lines(FLAGS[name])]
        parts.append("\n".join([f"{title if len(titles) > 1 else 'flags'}:", *lines]))
    return "\n\n".join(
        [*parts, *([more.rstrip()] if more else []), "--helpfull lists the flags of libraries, too."]
    )


def _flag_lines(flag: Any) -> list[str]:
    """The lines of a flag: its name and kind of value, then its help beside them."""
    width = min(110, shutil.get_terminal_size().columns)
    value = "" if flag.boolean else f"={_metavar(flag)}"
    default = (
        "" if flag.default in (None, False, "", []) else f" (default: {flag.default_as_str.strip(chr(39))})"
    )
    about = re.sub(r"^<.*?>: ", "", flag.help)  # absl puts the values of an enum before its help
    label, text = f"  --{flag.name}{value}", " ".join(f"{about}{default}".split())
    lines = textwrap.wrap(text, max(30, width - _LABEL))
    if len(label) < _LABEL - 1:
        label, *lines = label.ljust(_LABEL) + (lines or [""])[0], *lines[1:]
    return [label, *(" " * _LABEL + line for line in lines)]


def _metavar(flag: Any) -> str:
    """What stands for the value of a flag."""
    parser = flag.parser
    if values := getattr(parser, "enum_values", None):
        return "|".join(values)
    kinds = {"int": "N", "float": "X", "path": "PATH", "config": "RECIPE"}
    default = "A,B" if isinstance(parser, flags.ListParser) else "TEXT"
    return getattr(parser, "metavar", "") or kinds.get(str(parser.flag_type()), default)

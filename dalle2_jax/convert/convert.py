"""dalle2-jax convert SUBCOMMAND ...: weights in, model directories out.

    dalle2-jax convert workdirs --clip=W --prior=W --decoder=W --upsamplers=W1,W2 --out=MODEL
    dalle2-jax convert FORMAT SRC OUT
    dalle2-jax convert to-diffusers MODEL OUT
    dalle2-jax convert push MODEL OWNER/NAME
    dalle2-jax convert inception SRC.pth OUT.safetensors

The first takes the averaged parameters of training workdirs, the second weights of others: the name of a
FORMAT is a module of `formats` (hf-clip is hf_clip.py), which describes SRC. The third makes folders of
diffusers and transformers. push publishes on the Hugging Face Hub; SRC and MODEL may be
hf://OWNER/NAME@COMMIT. The last turns the released weights of FID's Inception into what
`dalle2_jax.evaluate --inception` reads. A model directory holds, for each stage, weights and the config that
rebuilds it, and the tokenizer (see modeldir.py); nothing of the machine that trained it.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle2_jax import systems
from dalle2_jax.convert import card, inception_weights
from dalle2_jax.convert.formats import refused, to_diffusers
from dalle2_jax.convert.workdirs import check_out, check_stages, convert_workdirs, write_model
from dalle2_jax.data.tokenizer import load_tokenizer
from dalle2_jax.models import models
from dalle2_jax.runtime import extras, files, hub, modeldir
from dalle2_jax.runtime.names import nearest

FORMATS = (
    "hf-clip",
    "openai-clip",
    "open-clip",
    "karlo",
    "karlo-original",
    "kandinsky",
    "glide",
    "adm",
    "adm-classifier",
    "ddpm",
    "iddpm",
    "t5",
    "deepfloyd",
    "dalle-mini",
    "openai-dvae",
    "vqgan",
    "lpips",
)
_NEEDED = "workdir of the {}; a decoder of image embeddings needs it"
_ROLE_HELP = {
    "clip": _NEEDED.format("CLIP"),
    "t5": "workdir or model directory of the T5 whose states the decoder reads",
    "prior": _NEEDED.format("prior"),
    "decoder": "workdir of the decoder",
    "noisy_clip": "workdir of a CLIP of noised pictures, which may steer the decoder",
    "classifier": "workdir of a classifier, which may steer the decoder",
    "tokenizer": "workdir of the tokenizer of pictures, whose codes the token model draws",
    "token_model": "workdir of the token model",
}
ROLES = tuple(_ROLE_HELP)


def convert_weights(
    format_name: str,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: str = "",
    dtype: str = "bfloat16",
    name: str = "",
    licence: str = "",
) -> None:
    """Write a model directory from weights of others.

    Args:
      format_name: one of FORMATS.
      source: a file or a folder, see the format's module.
      out: the directory; made if absent. Files of the same names are replaced.
      tokenizer: a folder that `load_tokenizer` reads, for a source that comes without.
      dtype, name: as above.
      licence: of the weights, for the model card; by default those of the format.

    Raises:
      FileNotFoundError, ValueError: the source does not have this format; names the differences.
    """
    out = check_out(out, dtype)
    module = importlib.import_module(f"dalle2_jax.convert.formats.{format_name.replace('-', '_')}")
    source, tokenizer = hub.local(source), files.expand(tokenizer)
    if not Path(source).exists():
        raise FileNotFoundError(f"{source} does not exist")
    if tokenizer and not os.path.isdir(tokenizer):
        raise FileNotFoundError(f"tokenizer folder {tokenizer} does not exist")
    words = load_tokenizer(tokenizer) if tokenizer else None
    read = module.import_weights(Path(source), words)
    stages = {folder: models.build_stage(config) for folder, (config, _) in read.stages.items()}
    reads = any(getattr(stage, "context_length", None) for stage in stages.values())
    words = (words or read.tokenizer) if reads else None
    if reads and words is None:
        raise ValueError(
            f"{source} comes without a tokenizer: give a folder with CLIP's vocab.json and merges.txt, or a "
            "model directory's tokenizer, as --tokenizer=FOLDER"
        )
    system = systems.of_stages(read.stages)
    check_stages(read.stages, stages, words, systems.load(system))
    for note in dict.fromkeys(note for tensors in read.tensors for note in tensors.notes):
        print(f"note: {note}", flush=True)
    for leaf in jax.tree.leaves([params for _, params in read.stages.values()]):
        np.asarray(leaf)  # every tensor is read before anything is written: some may not be finite
    found = [path for tensors in read.tensors for path in tensors.files]
    sums = {
        path.name if path == Path(source) else str(path.relative_to(source)): files.sha256(path)
        for path in found
    }
    for file, checksum in sums.items():
        print(f"read {file}, sha256 {checksum}", flush=True)
    licence = licence or read.licence
    print(f"licence of these weights: {licence or card.UNKNOWN}", flush=True)
    extra = {"name": name, "made_from": {"format": format_name, "sha256": sums}, "licence": licence}
    extra |= {"system": system}
    write_model(out, read.stages, stages, words, dtype, extra)


def export_diffusers(model: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Write a model directory as a folder of diffusers, or of transformers if it is a CLIP alone.

    Returns notes on it; see formats/to_diffusers.py. Raises FileNotFoundError or ValueError.
    """
    source, folder = epath.Path(hub.local(model)), check_out(out, "float32")
    index = modeldir.read_index(source)
    # CLIP's encoder runs; the weights of the others are read as they are written.
    stages = {name: models.load_stage(source, name, lazy=name != "clip")[1:] for name in index["stages"]}
    context_length = stages["clip"][0]["model"]["text"]["context_length"] if "clip" in stages else None
    words = next((each["tokenizer"] for each in index["stages"].values() if each["tokenizer"]), "")
    tokenizer = load_tokenizer(source / words, context_length) if words else None
    print(f"licence of these weights: {index.get('licence') or card.UNKNOWN}", flush=True)
    notes = to_diffusers.export_model(Path(folder), stages, tokenizer)
    library = "transformers" if set(stages) == {"clip"} else "diffusers"
    (folder / modeldir.CARD_FILE).write_text(card.model_card(index, stages, library))
    return notes


def _paths(text: str) -> tuple[str, ...]:
    """The paths of a list with commas."""
    return tuple(files.expand(part) for part in text.split(",") if part)


def _stage(text: str) -> tuple[str, str]:
    """(name, path) of NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=WORKDIR")
    return name, files.expand(path)


def make_parser() -> argparse.ArgumentParser:
    """The command line; one subcommand a source of weights."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="dalle2-jax convert", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    path: dict[str, Any] = dict(type=files.expand, default="")
    workdirs = commands.add_parser(
        "workdirs", aliases=["export"], help="averaged weights of training workdirs"
    )
    several = "workdir of a stage that has no argument of its own; may be given several times"
    about = "what the stages are together; by default the first system that has all of them"
    workdirs.add_argument("--system", default="", choices=[*systems.SYSTEMS], help=about)
    workdirs.add_argument("--stage", type=_stage, action="append", default=[], metavar="NAME=W", help=several)
    for role in ROLES:
        workdirs.add_argument(f"--{role}", **path, metavar="W", help=_ROLE_HELP[role])
    in_order = "workdirs of the upsamplers, in their order"
    workdirs.add_argument("--upsamplers", type=_paths, default="", metavar="W1,W2", help=in_order)
    workdirs.add_argument("--out", **path, required=True, metavar="MODEL", help="model directory to write")
    workdirs.set_defaults(run=_run_workdirs)
    writers = [workdirs]
    for name in FORMATS:
        module = importlib.import_module(f"dalle2_jax.convert.formats.{name.replace('-', '_')}")
        weights = commands.add_parser(
            f"{name}", help=module.HELP, description=(module.__doc__ or "").split("\n")[0]
        )
        weights.add_argument("source", **path, metavar="SRC", help=module.HELP)
        weights.add_argument("out", **path, metavar="OUT", help="model directory to write")
        weights.add_argument("--tokenizer", **path, metavar="FOLDER", help="for a SRC without a tokenizer")
        weights.set_defaults(run=_run_weights)
        writers.append(weights)
    for writer in writers:
        writer.add_argument("--dtype", default="bfloat16", choices=[*modeldir.DTYPES], help="of the weights")
        writer.add_argument("--name", default="", help="of the model; by default the folder's")
        writer.add_argument("--licence", default="", help="of the weights; by default that of their source")
    for name, reason in refused.REASONS.items():
        other = commands.add_parser(name, help="not read; prints the reason", description=reason)
        other.add_argument("source", metavar="SRC", nargs="?")
        other.add_argument("out", metavar="OUT", nargs="?")
        other.set_defaults(run=lambda options: refused.refuse(options.command))
    diffusers = commands.add_parser("to-diffusers", help="a folder of diffusers or transformers")
    diffusers.add_argument("model", **path, metavar="MODEL", help="model directory")
    diffusers.add_argument("out", **path, metavar="OUT", help="folder to write")
    diffusers.set_defaults(run=_run_diffusers)
    push = commands.add_parser("push", help="a model directory to the Hugging Face Hub")
    push.add_argument("model", **path, metavar="MODEL", help="model directory")
    push.add_argument("repository", metavar="OWNER/NAME", help="made if absent")
    push.add_argument("--private", action="store_true", help="make a repository that others do not see")
    push.set_defaults(run=_run_push)
    inception = commands.add_parser("inception", help="the weights that FID is measured with, converted once")
    inception.add_argument("source", **path, metavar="SRC", help="pt_inception-2015-12-05-6726825d.pth")
    inception.add_argument("out", **path, metavar="OUT", help="safetensors file to write")
    any_checksum = "also convert a file whose checksum is not the released one's"
    inception.add_argument("--any_checksum", action="store_true", help=any_checksum)
    inception.set_defaults(run=_run_inception)
    return parser


def _run_workdirs(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in (*ROLES, "upsamplers")}
    sources = {name: source for name, source in given.items() if source} | dict(options.stage)
    names = ("system", "dtype", "name", "licence")
    convert_workdirs(options.out, **{name: getattr(options, name) for name in names}, **sources)
    _print_size(options.out)
    if set(sources) == {"tokenizer"}:
        print(f"see it: python -m dalle2_jax.edit reconstruct PICTURE.png --model={options.out}")
    else:
        example = '"a red star above a blue ring"'
        print(f"draw with it: python -m dalle2_jax.generate --model={options.out} {example}")


def _run_weights(options: argparse.Namespace) -> None:
    names = ("tokenizer", "dtype", "name", "licence")
    more = {name: getattr(options, name) for name in names}
    convert_weights(options.command, options.source, options.out, **more)
    _print_size(options.out)


def _run_diffusers(options: argparse.Namespace) -> None:
    for note in export_diffusers(options.model, options.out):
        print(f"note: {note}")
    _print_size(options.out)


def _run_push(options: argparse.Namespace) -> None:
    address = hub.push(options.model, options.repository, options.private)
    print(f'draw with it: python -m dalle2_jax.generate --model={address} "a red star above a blue ring"')


def _run_inception(options: argparse.Namespace) -> None:
    checksum = inception_weights.convert(options.source, options.out, options.any_checksum)
    print(f"wrote {options.out}, from weights with the sha256 {checksum}")


def _print_size(out: str) -> None:
    found = [path for pattern in ("*", "*/*") for path in epath.Path(out).glob(pattern) if path.is_file()]
    print(f"wrote {out} ({sum(path.stat().length for path in found) / 1e6:.1f} MB)")


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns 0, or 2 after an error."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands: Any = next(action for action in parser._actions if action.dest == "command").choices
        flags = [flag for action in commands[options.command]._actions for flag in action.option_strings]
        near = nearest(unknown[0].split("=")[0], flags, show=str)
        hint = f"did you mean {near}?" if near else f"`{options.command} --help` lists the arguments"
        print(f"error: {options.command} has no argument {unknown[0]}; {hint}", file=sys.stderr)
        return 2
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        line = extras.missing(error) if isinstance(error, ImportError) else str(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0

"""python -m dalle2_jax.convert SUBCOMMAND ...: weights in, model directories out.

    python -m dalle2_jax.convert workdirs --clip=W --prior=W --decoder=W --upsamplers=W1,W2 --out=MODEL
    python -m dalle2_jax.convert FORMAT SRC OUT
    python -m dalle2_jax.convert to-diffusers MODEL OUT
    python -m dalle2_jax.convert push MODEL OWNER/NAME
    python -m dalle2_jax.convert inception SRC.pth OUT.safetensors

The first takes the averaged parameters of training workdirs, the second weights of others: the name of a
FORMAT is a module of `formats` (hf-clip is hf_clip.py), which describes SRC. The third makes folders of
diffusers and transformers. push publishes on the Hugging Face Hub; SRC and MODEL may be
hf://OWNER/NAME@COMMIT. The last turns the released weights of FID's Inception into what
`dalle2_jax.evaluate --inception` reads. A model directory holds, for each stage, weights and the config that
rebuilds it, and the tokenizer (see modeldir.py); nothing of the machine that trained it.
"""

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

import dalle2_jax
from dalle2_jax.convert import card, inception_weights
from dalle2_jax.convert.formats import refused, to_diffusers
from dalle2_jax.convert.tensors import sha256
from dalle2_jax.data.tokenizer import Tokenizer, load_tokenizer
from dalle2_jax.models import models
from dalle2_jax.runtime import files, hub, modeldir
from dalle2_jax.systems import cascade
from dalle2_jax.systems.cascade import ROLES

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
)
_NEEDED = "workdir of the {}; a decoder of image embeddings needs it"
_ROLE_HELP = {
    "clip": _NEEDED.format("CLIP"),
    "prior": _NEEDED.format("prior"),
    "decoder": "workdir of the decoder",
    "noisy_clip": "workdir of a CLIP of noised pictures, which may steer the decoder",
    "classifier": "workdir of a classifier, which may steer the decoder",
}


def without_paths(value):
    """A config whose texts that look like paths are reduced to their last name; no model depends on them."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and re.search(r"[/\\~]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1].lstrip("~")
    return value


def convert_workdirs(
    out: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    name: str = "",
    licence: str = "",
    **sources: str | tuple[str, ...],
) -> None:
    """Write a model directory from training workdirs.

    Args:
      out: the directory; made if absent. Files of the same names are replaced.
      dtype: 'bfloat16' (half the size) or 'float32' (exact).
      name: of the model; by default the last name of `out`.
      licence: of the weights, for the model card; by default those of the models that stages began from.
      sources: a name of `ROLES` -> a workdir, or a model directory that holds the stage, or its hf://
        address; 'upsamplers' -> several of them, in the order in which they run. '' is none; a decoder of
        image embeddings needs CLIP and prior.

    Raises:
      FileNotFoundError, ValueError: an incomplete workdir, or stages that do not match.
    """
    out = _check_out(out, dtype)
    models.check_names(sources, (*ROLES, "upsamplers"), "sources")
    wanted = [(role, str(sources[role])) for role in ROLES if sources.get(role)]
    wanted += [("upsampler", source) for source in sources.get("upsamplers") or ()]
    if not wanted:
        raise ValueError(f"give at least one workdir: {', '.join(f'--{role}' for role in ROLES)}")
    parts, stages, tokenizers, steps = {}, {}, {}, {}
    local = {source: os.fspath(hub.local(source)) for _, source in wanted}
    for role, source in wanted:
        stage, config, params = models.load_stage(source, role)
        folder = f"upsampler{stage.image_size}" if role == "upsampler" else role
        if folder in stages:
            side = stage.image_size
            raise ValueError(f"two upsamplers draw {side} x {side}: {source} is one too many")
        stages[folder], parts[folder] = stage, (without_paths(config) | {"wandb": ""}, params)
        steps[folder] = _trained_steps(local[source], folder)
        if getattr(stage, "context_length", None):
            tokenizers[folder] = epath.Path(local[source]) / "tokenizer"
        print(f"read {folder} from {source}", flush=True)
    if cascade.reads_embeds(stages) and not {"clip", "prior"} <= stages.keys():
        raise ValueError("this decoder draws image embeddings: give a clip and a prior, too")
    tokenizer = _shared_tokenizer(list(tokenizers.values())) if tokenizers else None
    _check_stages(parts, stages, tokenizer)
    inherited = sorted({found for _, source in wanted if (found := _licence(local[source]))})
    extra = {"name": name, "trained_steps": steps, "licence": licence or "; ".join(inherited)}
    _write_model(out, parts, stages, tokenizer, dtype, extra)


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
    out = _check_out(out, dtype)
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
    _check_stages(read.stages, stages, words)
    for note in dict.fromkeys(note for tensors in read.tensors for note in tensors.notes):
        print(f"note: {note}", flush=True)
    for leaf in jax.tree.leaves([params for _, params in read.stages.values()]):
        np.asarray(leaf)  # every tensor is read before anything is written: some may not be finite
    found = [path for tensors in read.tensors for path in tensors.files]
    sums = {
        path.name if path == Path(source) else str(path.relative_to(source)): sha256(path) for path in found
    }
    for file, checksum in sums.items():
        print(f"read {file}, sha256 {checksum}", flush=True)
    licence = licence or read.licence
    print(f"licence of these weights: {licence or card.UNKNOWN}", flush=True)
    extra = {"name": name, "made_from": {"format": format_name, "sha256": sums}, "licence": licence}
    _write_model(out, read.stages, stages, words, dtype, extra)


def export_diffusers(model: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Write a model directory as a folder of diffusers, or of transformers if it is a CLIP alone.

    Returns notes on it; see formats/to_diffusers.py. Raises FileNotFoundError or ValueError.
    """
    source, folder = epath.Path(hub.local(model)), _check_out(out, "float32")
    index = modeldir.read_index(source)
    stages = {name: models.load_stage(source, name)[1:] for name in index["stages"]}
    context_length = stages["clip"][0]["model"]["text"]["context_length"] if "clip" in stages else None
    words = next((each["tokenizer"] for each in index["stages"].values() if each["tokenizer"]), "")
    tokenizer = load_tokenizer(source / words, context_length) if words else None
    notes = to_diffusers.export_model(Path(folder), stages, tokenizer)
    library = "transformers" if set(stages) == {"clip"} else "diffusers"
    (folder / modeldir.CARD_FILE).write_text(card.model_card(index, stages, library))
    return notes


def _check_out(out: str | os.PathLike, dtype: str) -> epath.Path:
    """`out` as a path. Raises ValueError for an unknown dtype, and for a training workdir."""
    if dtype not in modeldir.DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(modeldir.DTYPES)}")
    folder = epath.Path(files.expand(out))
    if models.is_workdir(folder):
        raise ValueError(f"{folder} is a training workdir: write the model directory elsewhere")
    return folder


def _check_stages(parts: dict[str, tuple], stages: dict, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError unless the stages match each other and the tokenizer."""
    configs = {folder: config for folder, (config, _) in parts.items()}
    vocab_sizes = dict.fromkeys(stages, tokenizer.vocab_size) if tokenizer else {}
    uses = {folder: cascade.uses(stage) for folder, stage in stages.items()}
    cascade.check(configs, stages, vocab_sizes, uses)


def _write_model(
    out: epath.Path, parts: dict, stages: dict, tokenizer: Tokenizer | None, dtype: str, extra: dict
) -> None:
    """Write a model directory of folder -> (config, parameters), the upsamplers in their order."""
    for folder, (config, params) in parts.items():
        modeldir.save_stage(out / folder, config, params, dtype)
    if tokenizer is not None:
        (out / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.save(out / "tokenizer")
    entries = {}
    for folder, stage in stages.items():
        words = "tokenizer" if getattr(stage, "context_length", None) else ""
        entries[folder] = {"folder": folder, "uses": cascade.uses(stage), "tokenizer": words}
    extra = {"dalle2_jax_version": dalle2_jax.__version__} | extra | {"name": extra["name"] or out.name}
    modeldir.write_index(out, entries, extra=extra)
    (out / modeldir.CARD_FILE).write_text(card.model_card(extra, parts))


def _licence(source: str | os.PathLike) -> str:
    """The licence of a model directory, or of the one that a workdir's parameters began as; '' if unknown."""
    folder = epath.Path(source)
    if models.is_workdir(folder):
        began = hub.local(json.loads((folder / "config.json").read_text()).get("init_from", ""))
        if not began or models.is_workdir(began):
            return _licence(began) if began else ""
        folder = epath.Path(began)
    for place in (folder, folder.parent):  # a stage's folder lies in the model's
        if (place / modeldir.INDEX_FILE).exists():
            return modeldir.read_index(place).get("licence", "")
    return ""


def _shared_tokenizer(folders: list[epath.Path]) -> Tokenizer:
    """The one tokenizer of the stages that read captions, at the longest of their contexts."""
    loaded = [load_tokenizer(folder) for folder in folders]
    for folder in folders[1:]:
        if (folder / "tokenizer.json").read_bytes() != (folders[0] / "tokenizer.json").read_bytes():
            raise ValueError(
                f"{folder.parent} was trained with another tokenizer than {folders[0].parent}: train all "
                "stages with one CLIP (--config.clip), which hands its tokenizer on"
            )
    return max(loaded, key=lambda tokenizer: tokenizer.context_length)


def _trained_steps(source: str, folder: str) -> int | None:
    """The step whose average `models.load_stage` read; for a model directory the step in its index."""
    if models.is_workdir(source):
        names = [path.name for path in (epath.Path(source) / "checkpoints").iterdir()]
        return max(int(name) for name in names if name.isdigit())
    return modeldir.read_index(source).get("trained_steps", {}).get(folder)


def _paths(text: str) -> tuple[str, ...]:
    """The paths of a list with commas."""
    return tuple(files.expand(part) for part in text.split(",") if part)


def make_parser() -> argparse.ArgumentParser:
    """The command line; one subcommand a source of weights."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dalle2_jax.convert", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    path: dict[str, Any] = dict(type=files.expand, default="")
    workdirs = commands.add_parser(
        "workdirs", aliases=["export"], help="averaged weights of training workdirs"
    )
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
    names = (*ROLES, "upsamplers", "dtype", "name", "licence")
    convert_workdirs(options.out, **{name: getattr(options, name) for name in names})
    _print_size(options.out)
    print(f'draw with it: python -m dalle2_jax.generate --model={options.out} "a red star above a blue ring"')


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
    options = make_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

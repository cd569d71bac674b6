"""Model directories from workdirs of training; and what every subcommand writes a model directory with."""

import json
import os
import re
from types import ModuleType
from typing import Any

from etils import epath

import dalle2_jax
from dalle2_jax import systems
from dalle2_jax.convert import card
from dalle2_jax.data import words
from dalle2_jax.data.tokenizer import Tokenizer, load_tokenizer
from dalle2_jax.models import models, trainable
from dalle2_jax.runtime import checksums, files, hub, modeldir
from dalle2_jax.train.resume import frozen_of


def without_paths(value):
    """A config whose texts that look like paths are reduced to their last name; no model depends on them."""
    if isinstance(value, dict):
        return {key: item if key == "classes" else without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and re.search(r"[/\\~]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1].lstrip("~")
    return value


def convert_workdirs(
    out: str | os.PathLike,
    *,
    system: str = "",
    dtype: str = "bfloat16",
    name: str = "",
    licence: str = "",
    **sources: str | tuple[str, ...],
) -> None:
    """Write a model directory from training workdirs.

    Args:
      out: the directory; made if absent. Files of the same names are replaced.
      system: what the stages are together, a name in `systems.SYSTEMS`; '': the first that has them all.
      dtype: 'bfloat16' (half the size) or 'float32' (exact). Tokenizers are float32: rounding changes codes.
      name: of the model; by default the last name of `out`.
      licence: of the weights, for the model card; by default those of the models that stages began from.
      sources: a name of the system's `ROLES` -> a workdir, a model directory that holds the stage, the
        stage's folder in one, or an hf:// address; a name of its `LISTS`, such as 'upsamplers' -> several of
        them, in the order in which they run. '' is none; a decoder of image embeddings needs CLIP and prior.

    Raises:
      FileNotFoundError, ValueError: an incomplete workdir, or stages that do not match.
    """
    system = system or systems.of_stages([name for name, source in sources.items() if source])
    out, module = check_out(out, dtype), systems.load(system)
    models.check_names(sources, (*module.ROLES, *module.LISTS), "sources")
    wanted: list[tuple[str, Any]] = [(role, sources[role]) for role in module.ROLES if sources.get(role)]
    for several, role in module.LISTS.items():
        wanted += [(role, source) for source in sources.get(several) or ()]
    if not wanted:
        raise ValueError(f"give at least one workdir: {', '.join(f'--{role}' for role in module.ROLES)}")
    parts, stages, tokenizers, steps, frozen = {}, {}, {}, {}, {}
    local = {source: os.fspath(hub.local(source)) for _, source in wanted}
    for role, source in wanted:
        stage, config, params = models.load_stage(source, role, lazy=True)
        folder = f"{role}{stage.image_size}" if role in module.LISTS.values() else role
        if folder in stages:
            side = stage.image_size
            raise ValueError(f"two {role}s draw {side} x {side}: {source} is one too many")
        stages[folder], parts[folder] = stage, (without_paths(config) | {"wandb": ""}, params)
        steps[folder], frozen[folder] = _training(local[source], folder)
        if getattr(stage, "context_length", None):
            tokenizers[folder] = _root(local[source]) / "tokenizer"
        print(f"read {folder} from {source}", flush=True)
    module.complete(stages)
    tokenizer = _shared_tokenizer(list(tokenizers.values())) if tokenizers else None
    check_stages(parts, stages, tokenizer, module)
    uses = {folder: module.uses(stage) for folder, stage in stages.items()}
    for line in _other_frozen(frozen, parts, uses):
        print(f"note: {line}", flush=True)
    inherited = sorted({found for _, source in wanted if (found := _licence(local[source]))})
    extra = {"name": name, "trained_steps": steps, "licence": licence or "; ".join(inherited)}
    write_model(out, parts, stages, tokenizer, dtype, extra | {"system": system, "frozen": frozen})
    if seen := words.merged([read for _, source in wanted if (read := _words(local[source]))]):
        words.write(out, seen)


def check_out(out: str | os.PathLike, dtype: str) -> epath.Path:
    """`out` as a path. Raises ValueError for an unknown dtype, and for a training workdir."""
    if dtype not in modeldir.DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(modeldir.DTYPES)}")
    folder = epath.Path(files.expand(out))
    if models.is_workdir(folder):
        raise ValueError(f"{folder} is a training workdir: write the model directory elsewhere")
    return folder


def check_stages(
    parts: dict[str, tuple], stages: dict, tokenizer: Tokenizer | None, system: ModuleType
) -> None:
    """Raise ValueError unless the stages of a system match each other and the tokenizer."""
    configs = {folder: config for folder, (config, _) in parts.items()}
    vocab_sizes = dict.fromkeys(stages, tokenizer.vocab_size) if tokenizer else {}
    uses = {folder: system.uses(stage) for folder, stage in stages.items()}
    system.check(configs, stages, vocab_sizes, uses)


def write_model(
    out: epath.Path, parts: dict, stages: dict, tokenizer: Tokenizer | None, dtype: str, extra: dict
) -> None:
    """Write a model directory of folder -> (config, parameters), in the order in which the stages run.

    extra: values of the index; of these 'system' is the system's name, 'frozen' has the sha256 of the frozen
    stages that each stage was trained with.
    """
    extra = {"dalle2_jax_version": dalle2_jax.__version__} | extra | {"name": extra["name"] or out.name}
    system, frozen = extra.pop("system", "unclip"), extra.pop("frozen", {})
    (out / words.FILE).unlink(missing_ok=True)  # of another model
    for folder, (config, params) in parts.items():
        modeldir.save_stage(out / folder, config, params, getattr(stages[folder], "stored_dtype", dtype))
    if tokenizer is not None:
        (out / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.save(out / "tokenizer")
    entries = {}
    for folder, stage in stages.items():
        reads = "tokenizer" if getattr(stage, "context_length", None) else ""
        uses = systems.load(system).uses(stage)
        entries[folder] = {"folder": folder, "uses": uses, "tokenizer": reads}
        entries[folder] |= {"frozen": frozen[folder]} if frozen.get(folder) else {}
    modeldir.write_index(out, entries, system=system, extra=extra)
    (out / modeldir.CARD_FILE).write_text(card.model_card(extra, parts))


def _licence(source: str) -> str:
    """The licence of a model directory, or of the one that a workdir's parameters began as; '' if unknown."""
    folder = epath.Path(source)
    if models.is_workdir(folder):
        config = json.loads((folder / "config.json").read_text())
        began = os.fspath(hub.local(config.get("init_from", "")))
        if not began or models.is_workdir(began):
            return _licence(began) if began else ""
        folder = epath.Path(began)
    for place in (folder, folder.parent):  # a stage's folder lies in the model's
        if (place / modeldir.INDEX_FILE).exists():
            return modeldir.read_index(place).get("licence", "")
    return ""


def _words(source: str) -> words.Words | None:
    """The words of a workdir, or of the model directory that holds a stage; None: it has none."""
    folder = epath.Path(source)
    if models.is_workdir(folder):
        return words.read(folder)
    places = [place for place in (folder, folder.parent) if (place / modeldir.INDEX_FILE).exists()]
    return words.read(places[0]) if places else None


def _shared_tokenizer(folders: list[epath.Path]) -> Tokenizer:
    """The one tokenizer of the stages that read captions, at the longest of their contexts."""
    loaded = [load_tokenizer(folder) for folder in folders]
    tables = [json.loads((folder / "tokenizer.json").read_text())["model"] for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if table != tables[0]:
            raise ValueError(
                f"{folder.parent} was trained with another tokenizer than {folders[0].parent}: train all "
                "stages with one CLIP (--config.clip), which hands its tokenizer on"
            )
    return max(loaded, key=lambda tokenizer: tokenizer.context_length)


def _root(source: str) -> epath.Path:
    """The workdir or model directory of a source, which may be a stage's folder in one."""
    folder = epath.Path(source)
    alone = models.is_workdir(folder) or (folder / modeldir.INDEX_FILE).exists()
    return folder.parent if not alone and (folder.parent / modeldir.INDEX_FILE).exists() else folder


def _training(source: str, folder: str) -> tuple[int | None, dict[str, str]]:
    """(the step whose average `models.load_stage` read, the sha256 of the frozen stages that it was trained
    with); for a model directory those of its index."""
    if models.is_workdir(source):
        step, meta = checksums.read_meta(source)
        return step, {name: sha256 for name, sha256 in frozen_of(meta).items() if name != trainable.BASE}
    index = modeldir.read_index(_root(source))
    entry = index["stages"].get(folder, {})
    return index.get("trained_steps", {}).get(folder), entry.get("frozen", {})


def _other_frozen(frozen: dict[str, dict[str, str]], parts: dict, uses: dict[str, dict]) -> list[str]:
    """A line for each stage of a model that is not the frozen one that another stage was trained with."""
    names = {uses[folder].get(name) for folder, of in frozen.items() for name in of} & parts.keys()
    found = {name: modeldir.sha256(parts[name][1]) for name in names}
    return [
        f"{folder} was trained with another {name} than {uses[folder][name]} of this model"
        for folder, trained_with in frozen.items()
        for name, sha256 in trained_with.items()
        if found.get(uses[folder].get(name), sha256) != sha256
    ]

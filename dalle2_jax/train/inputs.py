"""What a run reads: its tokenizer, and the datasets for training and validation."""

import os
import tempfile
from typing import Any

from etils import epath

from dalle2_jax.models import frozen, models
from dalle2_jax.models.stages.code_sampling import check_codes
from dalle2_jax.models.stages.conditions import Caption
from dalle2_jax.runtime import hub, processes
from dalle2_jax.runtime.batch import STORED, field
from dalle2_jax.train import checks
from dalle2_jax.train.plan import Plan

TOKENIZER_RECORDS = 10_000  # spread over the dataset; a vocabulary needs no more


def shared_tokenizer(config: dict, workdir: epath.Path):
    """`make_tokenizer`, by process 0 first; the other processes read what it saved. Raises ValueError for a
    tokenizer with more tokens than the stage has embeddings for."""
    made = processes.one_then_others("tokenizer", lambda: make_tokenizer(config, workdir))
    checks.check_vocabulary(config, made)
    return made


def make_tokenizer(config: dict, workdir: epath.Path):
    """The tokenizer of the workdir, of the frozen CLIP or another frozen stage, or the one that the config
    describes (saved in the workdir)."""
    from dalle2_jax.data import pipeline, tokenizer

    settings = dict(config["tokenizer"])
    if (workdir / "tokenizer" / "tokenizer_config.json").exists():  # else a run was killed while saving it
        return tokenizer.load_tokenizer(workdir / "tokenizer", settings["context_length"])
    if folder := _frozen_tokenizer(frozen.paths(config)):
        made = tokenizer.load_tokenizer(folder, settings["context_length"])
    elif settings["path"]:
        made = tokenizer.load_tokenizer(hub.local(settings["path"]), settings["context_length"])
    elif made := _encoders_tokenizer(_precomputed(config), settings["context_length"]):
        pass
    else:
        captions = pipeline.iterate_captions(
            **pipeline_source(config), split=config["data"]["split"], limit=TOKENIZER_RECORDS
        )
        made = tokenizer.train_bpe(captions, settings["vocab_size"], settings["context_length"])
    made.save(workdir / "tokenizer")
    return made


def _encoders_tokenizer(embeddings: str, context_length: int):
    """The tokenizer in a folder of embeddings, of the encoder that read the captions; None: it has none."""
    from dalle2_jax.data import find, remote, tokenizer

    folder = os.path.join(embeddings, "tokenizer")
    if not embeddings or not find.is_folder(folder):
        return None
    if not remote.is_remote(folder):
        return tokenizer.load_tokenizer(folder, context_length)
    with tempfile.TemporaryDirectory() as copy:
        for name in (name for name, below in remote.entries(folder) if not below):
            with remote.open_file(f"{folder}/{name}") as file:
                (epath.Path(copy) / name).write_bytes(file.read())
        return tokenizer.load_tokenizer(copy, context_length)


def _frozen_tokenizer(paths: dict[str, str]) -> epath.Path | None:
    """The folder of the tokenizer that the frozen stages of these paths share; None: they have none."""
    folders = {name: epath.Path(hub.local(path)) / "tokenizer" for name, path in paths.items()}
    found = {
        name: folder
        for name, folder in folders.items()
        if name == "clip" or (folder / "tokenizer_config.json").exists()
    }
    files = {name: folder / "tokenizer.json" for name, folder in found.items()}
    texts = {name: file.read_bytes() for name, file in files.items() if file.exists()}
    if len(set(texts.values())) > 1:
        raise ValueError(
            f"the frozen stages {', '.join(texts)} have different tokenizers: a run has one, give stages "
            "that share it"
        )
    return next(iter(found.values()), None)


def pipeline_source(config: dict) -> dict:
    """The keywords of config.data that name the dataset itself."""
    return {
        k: v
        for k, v in config["data"].items()
        if k not in ("split", "eval_split", "flip", "low_res_blur", "bpe_dropout")
    }


def dataset_fields(config: dict, plan: Plan) -> set[str]:
    """What the dataset has to provide: the stage's fields, or what frozen stages compute them from."""
    found = set(plan.frozen.dataset_spec(1))
    missing = {name for name in found if field(name).kind in ("embedding", "states")}
    of_clip = bool(getattr(plan.stage, "embed_dim", 0))
    if missing and not _precomputed(config):
        encoder = "clip=WORKDIR_OR_MODEL of a trained CLIP" if of_clip else "frozen.t5=MODEL of a T5"
        raise ValueError(
            f"stage {config['stage']!r} needs {sorted(missing)}: give --config.{encoder}, or train from "
            f"precomputed {'embeddings' if of_clip else 'states'} (--config.data.source=embeddings, or "
            "beside pictures --config.data.embeddings=FOLDER)"
        )
    if "text_states" in missing and of_clip:
        raise ValueError(
            f"this {config['stage']} reads CLIP's text states, which are not precomputed: give --config.clip"
        )
    if "text_states" in missing and not plan.stage.condition(Caption).masked:
        raise ValueError(
            f"this {config['stage']} reads the states of padding, too (model.text.masked=False), which are "
            "not precomputed: give --config.frozen.t5"
        )
    for owner, _, writes in plan.frozen.encoders:
        if "codes" in writes:
            check_codes(plan.stage, *_codes_of(plan.frozen_stages[owner], owner))
    codes = sorted(name for name in found if field(name).kind == "codes")
    if codes and not _precomputed(config):
        raise ValueError(
            f"stage {config['stage']!r} needs {codes}: give --config.frozen.tokenizer=WORKDIR_OR_MODEL of "
            "the trained stage that computes them, or --config.data.embeddings=FOLDER of stored codes"
        )
    return found


def _codes_of(tokenizer: Any, name: str) -> tuple[str, Any, Any]:
    """(name, grids, num_codes) of a frozen tokenizer, for `check_codes`."""
    return f"the frozen {name}", getattr(tokenizer, "grids", None), getattr(tokenizer, "num_codes", None)


def _precomputed(config: dict) -> str:
    """The folder of embeddings that a run reads, '' for none."""
    data = config["data"]
    first: Any = next(iter(data.get("sources", ())), {})
    data = data | ({"path": first} if isinstance(first, str) else dict(first))
    return data["path"] if data["source"] == "embeddings" else data.get("embeddings", "")


def make_datasets(config: dict, plan: Plan, fields: set[str], tokenizer):
    """(training, validation) datasets with these fields."""
    from dalle2_jax.data import embeddings, pipeline
    from dalle2_jax.data.settings import DataSettings

    stage, frozen_stages = plan.stage, plan.frozen_stages
    owned = {name: name.rpartition(".")[0] for name in fields if "." in name}
    options = {k: v for k, v in config["data"].items() if k not in ("split", "eval_split")}
    options |= dict(
        fields=tuple(sorted(fields)),
        image_size=getattr(stage, "image_size", None),
        image_sizes={name: frozen_stages[owner].image_size for name, owner in owned.items()},
        low_res_size=getattr(stage, "low_res_size", None),
        crop_size=getattr(stage, "crop_size", None),
        num_classes=getattr(stage, "num_classes", 0),
        tokenizer=tokenizer,
        seed=config["seed"],
    )
    models.check_keywords(DataSettings, dict(options, split=""), "data")
    train = pipeline.make_dataset(split=config["data"]["split"], **options)
    spec = stage.batch_spec(1)
    for name, (_, shape) in train.settings.shapes(train.source).items():
        stored = name in spec and field(name).kind in STORED
        if stored and shape != spec[name].shape[1:]:
            raise ValueError(
                f"the stored {name} of an example are {list(shape)}, the {config['stage']} reads "
                f"{list(spec[name].shape[1:])}: use the encoder that the config was written for"
            )
    if "codes" in fields:
        plan_of_codes = (embeddings.read_plan(_precomputed(config)) or {}).get("codes") or {}
        grids, num_codes = (plan_of_codes.get(name) for name in ("grids", "num_codes"))
        check_codes(stage, "the tokenizer of the stored codes", grids, num_codes)
    held_out = dict(options, flip=False, bpe_dropout=0.0, classes=train.classes, leave_out="")
    if options.get("sources"):
        held_out["sources"] = [
            one if isinstance(one, str) else {name: one[name] for name in one if name != "leave_out"}
            for one in options["sources"]
        ]
    return train, pipeline.make_dataset(split=config["data"]["eval_split"], **held_out)

"""Checks of settings before anything is read or compiled: unknown names, values that cannot go together."""

import inspect
from collections.abc import Callable

from absl import flags

from dalle2_jax.models import frozen, models, trainable
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.batch import PICTURES, field
from dalle2_jax.train import optim, resume

FAILED = 2  # exit status of a run whose settings, data or disk do not allow it
# What a config holds; `model`, `data`, `optim` and `mesh` are keywords of functions.
SETTINGS = (
    *(name for name in resume.FREE if "." not in name),
    "stage",
    "model",
    "data",
    "tokenizer",
    "optim",
    "batch_size",
    "grad_accum",
    "spike_sigma",
    "cpu_products",
    "ema_decay",
    "seed",
    "clip",
    "frozen",
    "trainable",
    "init_from",
)
OF_CAPTIONS = ("tokens", "token_mask", "label", "text_embed", "text_states")  # fields made from a caption
TOKENIZER_SETTINGS = ("path", "vocab_size", "context_length")
# Settings that a run fills in: no hint names them.
FILLED_IN = {
    *("data.fields", "data.image_size", "data.image_sizes", "data.low_res_size", "data.crop_size"),
    *("data.tokenizer", "data.seed", "mesh.devices", "optim.num_steps"),
}


def _groups(stage: str = "") -> dict[str, list[str]]:
    """group of a config -> its settings; `model` has those of a stage."""
    from dalle2_jax.data.settings import DataSettings

    takers: dict[str, Callable] = {"data": DataSettings, "mesh": partition.make_mesh, "optim": optim.Settings}
    if stage in models.STAGES:
        takers["model"] = models.stage_module(stage).build
    found = {group: [*inspect.signature(taker).parameters] for group, taker in takers.items()}
    found["data"].append("eval_split")
    return found | {"tokenizer": [*TOKENIZER_SETTINGS]}


def all_settings(stage: str = "") -> list[str]:
    """Settings of a config, such as 'num_steps' and 'optim.learning_rate'; of `model` those of a stage."""
    groups = _groups(stage)
    inside = [f"{group}.{name}" for group, names in groups.items() for name in names]
    return [*(name for name in SETTINGS if name not in groups), *(n for n in inside if n not in FILLED_IN)]


def settings_of_flag() -> list[str]:
    """`all_settings` of the stage of --config, or without it those of no stage; for hints."""
    config = flags.FLAGS["config"].value
    return all_settings(config.get("stage", "") if config else "")


def check_names(config: dict) -> None:
    """Raise ValueError for a setting that there is not, naming the nearest one of all."""
    stage = config.get("stage", "")
    elsewhere = all_settings(stage)
    models.check_names(config, SETTINGS, "config", [f"config.{name}" for name in elsewhere])
    for group, names in _groups(stage).items():
        models.check_names(config[group], names, group, elsewhere)
    models.check_keywords(partition.make_mesh, config["mesh"], "mesh")
    models.check_keywords(optim.Settings, dict(config["optim"], num_steps=1), "optim")


def check_settings(config: dict, stage, mesh) -> None:
    """Raise ValueError for settings that cannot go together, before anything is read or compiled."""
    if hasattr(stage, "check_encodes"):  # a tokenizer is trained by encoding
        stage.check_encodes()
    if config["batch_size"] % config["grad_accum"]:
        raise ValueError(
            f"batch_size {config['batch_size']} is not a multiple of grad_accum {config['grad_accum']}"
        )
    partition.check_batch_size(config["batch_size"] // config["grad_accum"], mesh, "batch_size / grad_accum")
    for name in ("log_every", "eval_every", "sample_every", "checkpoint_every"):
        if config[name] < 1:
            raise ValueError(f"{name} {config[name]} must be 1 or more; a number above num_steps: at the end")
    if config["spike_sigma"] < 0:
        raise ValueError(f"spike_sigma {config['spike_sigma']} must be 0 (none) or above; 6 is usual")
    if (products := config.get("cpu_products", "")) not in ("", "float32", "bfloat16"):
        raise ValueError(f"cpu_products {products!r} is unknown; choose 'float32' or 'bfloat16', or leave it")
    optim.Settings(**config["optim"], num_steps=config["num_steps"])
    _check_sample_captions(config, stage)
    if patterns := config.get("trainable"):
        trainable.check(models.abstract_params(stage), patterns)
        if not config["init_from"]:
            raise ValueError(
                "config.trainable leaves parameters as they are: say where they come from, "
                "--config.init_from=WORKDIR_OR_MODEL"
            )
    classes = config["data"].get("classes", ())
    if classes and getattr(stage, "num_classes", 0) not in (0, len(classes)):  # (): those of the data
        raise ValueError(
            f"data.classes has {len(classes)} names, model.num_classes is {stage.num_classes}: make them one"
        )
    if config["grad_accum"] > 1 and getattr(stage, "whole_batch", False):
        raise ValueError(
            f"the loss of stage {config['stage']!r} compares all examples of a batch, which cannot be cut: "
            "set grad_accum=1 (model.remat='all' saves memory)"
        )
    tower = config["model"].get("vision") or {}
    if getattr(stage, "sam_rho", 0) and tower.get("kind") == "resnet" and mesh.shape["tensor"] > 1:
        # XLA's partitioner would abort, and the process with it
        raise ValueError(
            "XLA cannot split the convolutions of SAM's replicas over mesh.tensor="
            f"{mesh.shape['tensor']}: set mesh.tensor=1, or model.sam_rho=0, or model.vision.kind='vit'"
        )


def check_vocabulary(config: dict, tokenizer) -> None:
    """Raise ValueError for a tokenizer with more tokens than the stage's text network has embeddings."""
    vocab_size = (config["model"].get("text") or {}).get("vocab_size")
    if vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size is {vocab_size}: "
            f"raise it to {tokenizer.vocab_size}"
        )


def _check_sample_captions(config: dict, stage) -> None:
    """Raise ValueError for `sample_captions` of a stage that cannot draw pictures from captions."""
    captions = config.get("sample_captions", ())
    if not captions:
        return
    if isinstance(captions, str):
        raise ValueError(f"sample_captions is a list of captions: ({captions!r},)")
    draws = stage.ops["sample"].writes[0] if hasattr(stage, "sample") else ""
    reads = set(stage.batch_spec(1)) - {draws, "image", "crop_yx"}
    if "image_embed" in reads and draws != "image_embed":
        _check_sample_prior(config, stage.batch_spec(1))
        reads -= {"image_embed"}
    others = sorted(name for name in reads if name.rpartition(".")[2] not in OF_CAPTIONS)
    if not draws or field(draws).kind not in (*PICTURES, "codes") or others or not reads:
        also = f" also reads {', '.join(others)}" if others else " draws no pictures from captions"
        raise ValueError(f"sample_captions: stage {config['stage']!r}{also}. {_WITHOUT}")


_WITHOUT = (
    "Leave them out: then the samples are those of validation records; generate draws your captions with the "
    "whole model"
)


def _check_sample_prior(config: dict, spec: dict) -> None:
    """Raise ValueError unless `sample_prior` can draw the image embeddings of a stage that reads `spec`."""
    path = config.get("sample_prior", "")
    if not spec.keys() & {"tokens", "text_states"}:
        raise ValueError(
            f"sample_captions: stage {config['stage']!r} reads image_embed and no captions. {_WITHOUT}"
        )
    if not path or "clip" not in frozen.paths(config):
        raise ValueError(
            f"sample_captions: stage {config['stage']!r} also reads image_embed, which a prior draws: give "
            "--config.sample_prior=WORKDIR_OR_MODEL, and its CLIP as --config.clip; or leave them out"
        )
    prior, reads = models.open_stage(path, "prior")[0].embed_dim, spec["image_embed"].shape[-1]
    if prior != reads:
        raise ValueError(
            f"sample_prior {path} draws embeddings of {prior} entries, the {config['stage']} reads {reads}: "
            "give a prior of the same CLIP"
        )

"""DDPM as folders of diffusers (google/ddpm-*): a UNet2DModel with its scheduler. Both ways.

The folder of a DDPMPipeline, or of its network alone, with scheduler_config.json beside config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.karlo import expect
from dalle2_jax.convert.formats.unet import diffusers_rows
from dalle2_jax.convert.tables import Imported
from dalle2_jax.convert.tensors import Tensors, open_tensors

HELP = "DDPM, a folder of diffusers' DDPMPipeline (google/ddpm-*)"
LICENCE = "Apache-2.0, those of google/ddpm-*; of other weights in this layout ask their makers"
# Types of down and up blocks, with attention and without.
BLOCK_TYPES = {True: ("AttnDownBlock2D", "AttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
# Names of attention's layers before diffusers 0.16 -> since.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
VARIANCES = {"fixed_small": 0.0, "fixed_large": 1.0}
FIXED = dict(
    act_fn="silu",
    center_input_sample=False,
    class_embed_type=None,
    downsample_type="conv",
    mid_block_scale_factor=1,
    resnet_time_scale_shift="default",
    time_embedding_type="positional",
    upsample_type="conv",
    in_channels=3,
    out_channels=3,
)


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The generator in the folder `source`."""
    parts = source / "unet" if (source / "unet").is_dir() else source
    found = [source / "scheduler", source, parts]
    scheduler = next((path for path in found if (path / "scheduler_config.json").is_file()), None)
    if scheduler is None:
        raise FileNotFoundError(f"{source} has no scheduler_config.json, which names the noise schedule")
    model = settings(read_json(parts / "config.json"), str(parts))
    model |= noise(read_json(scheduler / "scheduler_config.json"), str(scheduler))
    tensors = _renamed(
        open_tensors(parts, ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"))
    )
    config = {"stage": "decoder", "model": model}
    return Imported({"decoder": tables.read_stage(config, diffusers_rows, tensors)}, None, [tensors], LICENCE)


def settings(config: Mapping, where: str) -> dict:
    """Our settings of a U-Net from a UNet2DModel's config. Raises ValueError for what is not built."""
    expect(config, where, _class_name="UNet2DModel", **FIXED)
    widths, side = config["block_out_channels"], config["sample_size"]
    attends = [kind == BLOCK_TYPES[True][0] for kind in config["down_block_types"]]
    built = [[BLOCK_TYPES[yes][0] for yes in attends], [BLOCK_TYPES[yes][1] for yes in reversed(attends)]]
    types = [list(config["down_block_types"]), list(config["up_block_types"])]
    if types != built or not any(attends) or any(width % widths[0] for width in widths):
        raise ValueError(f"{where}: blocks of types {types[0]} and {types[1]}, widths {widths} are not built")
    head_dim = config.get("attention_head_dim")
    net = dict(
        resample="conv",
        resample_pad=[config.get("downsample_padding", 1), 1],
        sin_first=not config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        norm_epsilon=config.get("norm_eps", 1e-5),
        norm_groups=config.get("norm_num_groups", 32),
    )
    return dict(
        image_size=side,
        embed_dim=0,
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=[side // 2**level for level, yes in enumerate(attends) if yes],
        dropout=config.get("dropout", 0.0),
        scale_shift=False,
        net=net,
    ) | (dict(head_dim=head_dim) if head_dim else dict(num_heads=1))


def noise(config: Mapping, where: str) -> dict:
    """Our settings of the process from a DDPMScheduler's config."""
    schedule, variance = config.get("beta_schedule", "linear"), config.get("variance_type", "fixed_small")
    expect(
        config, where, prediction_type="epsilon", clip_sample=True, clip_sample_range=1.0, trained_betas=None
    )
    if schedule == "linear":
        scale = 1000 / config["num_train_timesteps"]
        expect(config, where, beta_start=1e-4 * scale, beta_end=0.02 * scale)
    if schedule not in SCHEDULES or variance not in VARIANCES:
        raise ValueError(f"{where}: beta_schedule {schedule!r} with variance_type {variance!r} is not built")
    return dict(
        schedule=SCHEDULES[schedule],
        num_timesteps=config["num_train_timesteps"],
        learned_variance=False,
        process=dict(fixed_variance=VARIANCES[variance]),
        num_steps=config["num_train_timesteps"],
        method="ddpm",
        guidance_scale=1.0,
    )


def _renamed(tensors: Tensors) -> Tensors:
    """`tensors` with the names that diffusers has today."""

    def now(name: str) -> str:
        *path, layer, kind = name.split(".")
        return ".".join([*path, OLD_NAMES[layer], kind]) if layer in OLD_NAMES else name

    return tensors.renamed({now(name): name for name in tensors.shapes})


def export(model: Mapping, params: Any) -> tuple[dict[str, dict], dict[str, dict]]:
    """(file -> JSON value, file -> tensors) of a DDPMPipeline; `model`: all settings of the stage.

    Raises ValueError for a setting that UNet2DModel or DDPMScheduler does not have.
    """
    net = dict(model["net"] or {})
    if net.pop("resample", "") != "conv" or model["embed_dim"] or model["text"] or model["num_classes"]:
        raise ValueError(
            "DDPMPipeline is an unconditional generator with net.resample='conv'; this is another"
        )
    wanted = dict(objective="eps", learned_variance=False, scale_shift=False, inpaint=False)
    for name, value in wanted.items():
        if model[name] != value:
            raise ValueError(f"decoder: model.{name} is {model[name]!r}, DDPMPipeline needs {value!r}")
    variances = {value: name for name, value in VARIANCES.items()}
    schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
    fraction = (model["process"] or {}).get("fixed_variance", 0.0)
    if fraction not in variances or model["schedule"] not in schedules:
        raise ValueError("DDPMScheduler needs process.fixed_variance 0 or 1, schedule 'linear' or 'cosine'")
    levels, pad = range(len(model["channel_mult"])), net.pop("resample_pad", (1, 1))
    attends = [model["image_size"] // 2**level in model["attention_resolutions"] for level in levels]
    one_head = model["num_heads"] == 1
    unet = FIXED | dict(
        _class_name="UNet2DModel",
        sample_size=model["image_size"],
        block_out_channels=[int(model["channels"] * mult) for mult in model["channel_mult"]],
        layers_per_block=model["num_res_blocks"],
        down_block_types=[BLOCK_TYPES[yes][0] for yes in attends],
        up_block_types=[BLOCK_TYPES[yes][1] for yes in reversed(attends)],
        downsample_padding=pad[0],
        flip_sin_to_cos=not net.pop("sin_first", False),
        freq_shift=net.pop("freq_shift", 0),
        norm_eps=net.pop("norm_epsilon", 1e-5),
        norm_num_groups=net.pop("norm_groups", 0),
        attention_head_dim=None if one_head else model["head_dim"],
        dropout=model["dropout"],
    )
    if net or not unet["norm_num_groups"] or model["num_heads"] > 1:
        raise ValueError(f"UNet2DModel needs net.norm_groups, num_heads 0 or 1, and no {sorted(net)}")
    scale = 1000 / model["num_timesteps"]
    scheduler = dict(
        _class_name="DDPMScheduler",
        num_train_timesteps=model["num_timesteps"],
        beta_schedule=schedules[model["schedule"]],
        beta_start=1e-4 * scale,
        beta_end=0.02 * scale,
        variance_type=variances[fraction],
        prediction_type="epsilon",
        clip_sample=True,
    )
    index: dict[str, Any] = dict(_class_name="DDPMPipeline", _diffusers_version="0.35.0")
    index |= dict(unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"])
    files: dict[str, dict] = {"model_index.json": index, "unet/config.json": unet}
    files["scheduler/scheduler_config.json"] = scheduler
    tensors = tables.exported(diffusers_rows(params), params)
    return files, {"unet/diffusion_pytorch_model.safetensors": tensors}

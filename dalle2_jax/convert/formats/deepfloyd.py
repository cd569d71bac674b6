"""DeepFloyd IF, stages I and II: folders of diffusers' IFPipeline and IFSuperResolutionPipeline.

IF is Imagen's open relative: a frozen T5, a decoder and an upsampler that read its states. The source is a
folder of one stage, or a folder with both (IF-I-XL-v1.0, IF-II-L-v1.0). Both ways; stage III is another
model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import t5
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.karlo import BLOCK_TYPES, demand, expect
from dalle2_jax.convert.formats.unet import diffusers_rows
from dalle2_jax.convert.tables import LEADING, Imported, Row, dense, leaf, norm, under
from dalle2_jax.convert.tensors import open_tensors

HELP = "DeepFloyd IF, stages I and II, folders of diffusers"
LICENCE = "DeepFloyd IF's are for research alone, not for commerce (its own licence); T5's Apache-2.0"
CONTEXT_LENGTH = 77
FIXED = dict(
    act_fn="gelu",
    addition_embed_type="text",
    cross_attention_norm="group_norm",
    encoder_hid_dim_type="text_proj",
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    norm_eps=1e-5,
    only_cross_attention=False,
    out_channels=6,
    resnet_time_scale_shift="scale_shift",
)
NOISE = dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type="epsilon")
# Settings of sampling in the pipelines' own defaults.
SAMPLING = {
    "decoder": dict(num_steps=100, guidance_scale=7.0),
    "upsampler": dict(num_steps=50, guidance_scale=4.0),
}


def rows(params: Mapping[str, Any]) -> list[Row]:
    """The table of a stage's UNet2DConditionModel; `params`: our shapes of the stage."""
    pool = [
        *norm("norm1", "norm1"),
        *leaf("position/embedding", "pool.positional_embedding", LEADING),
        *dense("q", "pool.q_proj"),
        *dense("kv", "pool.k_proj", "pool.v_proj"),
        *dense("proj", "proj"),
        *norm("norm2", "norm2"),
    ]
    found = diffusers_rows(params) + dense("text_states_proj", "encoder_hid_proj")
    found += under("text_pool", pool, "add_embedding.")
    if "low_res_time" in params:
        found += dense("low_res_time/fc1", "class_embedding.linear_1")
        found += dense("low_res_time/fc2", "class_embedding.linear_2")
    return found


def import_weights(source: Path, tokenizer=None) -> Imported:
    """T5 and the stages in the folder `source`."""
    folders = (
        [source] if (source / "unet").is_dir() else sorted(path.parent for path in source.glob("*/unet"))
    )
    if not folders:
        raise FileNotFoundError(f"{source} holds no folder unet: give a stage of IF, or a folder with stages")
    stages: dict[str, tuple[dict, Any]] = {}
    files, words = [], tokenizer
    for folder in folders:
        config, scheduler = (
            read_json(folder / name) for name in ("unet/config.json", "scheduler/scheduler_config.json")
        )
        stage, model = settings(config, scheduler, str(folder))
        tensors = open_tensors(
            folder / "unet", ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        )
        read = tables.read_stage({"stage": stage, "model": model}, rows, tensors)
        name = stage if stage == "decoder" else f"upsampler{model['image_size']}"
        if name in stages:
            raise ValueError(f"{source} holds two stages {name}: {folder} is one too many")
        stages[name] = read
        files.append(tensors)
        if "t5" not in stages and (folder / "text_encoder").is_dir():
            encoder, encoder_tensors = t5.read(folder / "text_encoder", CONTEXT_LENGTH)
            stages["t5"] = encoder
            files.append(encoder_tensors)
            words = words or t5.load_t5(folder / "tokenizer", CONTEXT_LENGTH)
    if "t5" not in stages:
        raise FileNotFoundError(f"{source} has no text_encoder, whose states the networks read")
    order = ["t5", *sorted(name for name in stages if name != "t5")]
    return Imported({name: stages[name] for name in order}, words, files, LICENCE)


def settings(config: Mapping, scheduler: Mapping, where: str) -> tuple[str, dict]:
    """(stage, our settings) of a UNet2DConditionModel and its DDPMScheduler. Raises ValueError for others."""
    level = config.get("class_embed_type")
    stage, channels = ("upsampler", 6) if level == "timestep" else ("decoder", 3)
    expect(
        config,
        where,
        class_embed_type="timestep" if level == "timestep" else None,
        in_channels=channels,
        **FIXED,
    )
    widths, side, skips = (
        config["block_out_channels"],
        config["sample_size"],
        config.get("resnet_out_scale_factor", 1),
    )
    expect(config, where, mid_block_scale_factor=skips)
    # The activation of the embedding stands once outside of the blocks, or in each of them: the same numbers.
    once = config.get("resnet_skip_time_act", False)
    expect(config, where, time_embedding_act_fn="gelu" if once else None)
    attends = [kind == BLOCK_TYPES[True][0] for kind in config["down_block_types"]]
    built = [[BLOCK_TYPES[yes][0] for yes in attends], [BLOCK_TYPES[yes][1] for yes in reversed(attends)]]
    if [list(config["down_block_types"]), list(config["up_block_types"])] != built or not any(attends):
        raise ValueError(f"{where}: blocks of types {config['down_block_types']} are not built")
    net = dict(activation="gelu", context_norm="group", norm_groups=config.get("norm_num_groups", 32))
    net |= dict(emb_dim=config["time_embedding_dim"]) if config.get("time_embedding_dim") else {}
    net |= dict(residual_scale=1 / skips) if skips != 1 else {}
    blocks = config["layers_per_block"]
    text = dict(states_width=config["encoder_hid_dim"], context_length=CONTEXT_LENGTH, masked=False)
    text |= dict(width=config["cross_attention_dim"], pool_heads=config["addition_embed_type_num_heads"])
    expect(scheduler, where, **NOISE)
    threshold = scheduler.get("thresholding", False)
    model = dict(
        image_size=side,
        channels=widths[0],
        channel_mult=[width / widths[0] if width % widths[0] else width // widths[0] for width in widths],
        num_res_blocks=blocks if isinstance(blocks, int) else list(blocks),
        attention_resolutions=[side // 2**level for level, yes in enumerate(attends) if yes],
        head_dim=config["attention_head_dim"],
        dropout=0.0,
        scale_shift=True,
        text=text,
        text_drop=0.1,
        schedule="cosine",
        num_timesteps=scheduler["num_train_timesteps"],
        learned_variance=True,
        threshold=100 * scheduler["dynamic_thresholding_ratio"] if threshold else None,
        process=dict(threshold_max=scheduler["sample_max_value"]) if threshold else None,
        method="ddpm",
        net=net,
        **SAMPLING[stage],
    )
    if stage == "decoder":
        return stage, model | dict(embed_dim=0, spacing="ddim")
    low = dict(low_res_size=side // 4, crop_size=side, resize="align_corners")
    return stage, model | low | dict(
        low_res_noise=1.0, low_res_level=0.25, noise_enlarged=True, spacing="ddim"
    )


def export(settings: Mapping[str, dict], params: Mapping) -> tuple[dict[str, dict], dict[str, dict]]:
    """(file -> JSON value, file -> tensors) of IF's pipelines: one folder, or one for each of two stages.

    settings: role -> all settings of the stage. T5 goes into the first folder. Raises ValueError for a
    setting that the pipelines do not have.
    """
    stages = [role for role in settings if role != "t5"]
    kinds = [role.rstrip("0123456789") for role in stages]
    if kinds not in (["decoder"], ["upsampler"], ["decoder", "upsampler"]):
        raise ValueError(f"IF has a T5, a decoder and an upsampler, or one of the two; this is {[*settings]}")
    files: dict[str, dict] = {}
    weights: dict[str, dict] = {}
    for role, kind in zip(stages, kinds, strict=True):
        below = f"{role}/" if len(stages) > 1 else ""
        scheduler = _scheduler(settings[role])
        parts = dict(unet="UNet2DConditionModel", scheduler="DDPMScheduler")
        parts |= dict(image_noising_scheduler="DDPMScheduler") if kind == "upsampler" else {}
        index: dict[str, Any] = dict(_diffusers_version="0.35.0", requires_safety_checker=False)
        index |= dict(_class_name="IFPipeline" if kind == "decoder" else "IFSuperResolutionPipeline")
        index |= {name: ["diffusers", of] for name, of in parts.items()}
        absent = ("safety_checker", "feature_extractor", "watermarker", "text_encoder", "tokenizer")
        index |= {name: [None, None] for name in absent}
        files[f"{below}unet/config.json"] = _unet_config(role, kind, settings[role])
        weights[f"{below}unet/diffusion_pytorch_model.safetensors"] = tables.exported(
            rows(params[role]), params[role]
        )
        for name in [*parts][1:]:
            files[f"{below}{name}/scheduler_config.json"] = scheduler
        if role == stages[0]:
            config, tensors = t5.export(settings["t5"], params["t5"])
            files[f"{below}text_encoder/config.json"] = config
            weights[f"{below}text_encoder/model.safetensors"] = tensors
            index |= dict(text_encoder=["transformers", "T5EncoderModel"])
            index |= dict(tokenizer=["transformers", "T5TokenizerFast"])
        files[f"{below}model_index.json"] = index
    return files, weights


def _scheduler(model: Mapping) -> dict:
    """The settings of a stage's DDPMScheduler."""
    config = NOISE | dict(_class_name="DDPMScheduler", num_train_timesteps=model["num_timesteps"])
    config |= dict(clip_sample=True, thresholding=model["threshold"] is not None)
    if model["threshold"] is not None:
        most = (model["process"] or {}).get("threshold_max")
        if most is None:
            raise ValueError("DDPMScheduler's thresholding needs process.threshold_max, such as 1.5")
        config |= dict(dynamic_thresholding_ratio=model["threshold"] / 100, sample_max_value=most)
    return config


def _unet_config(role: str, kind: str, model: Mapping) -> dict:
    """The settings of a stage's UNet2DConditionModel."""
    wanted = dict(objective="eps", learned_variance=True, scale_shift=True, schedule="cosine", inpaint=False)
    demand(role, model, **wanted, num_classes=0, num_heads=0)
    if kind == "upsampler":
        low = dict(low_res_size=model["image_size"] // 4, resize="align_corners", noise_enlarged=True)
        demand(role, model, **low, last_step=False)
    else:
        demand(role, model, embed_dim=0)
    text, net = dict(model["text"] or {}), dict(model["net"] or {})
    found = {"text.masked": text.get("masked", True), "text.context_length": text.get("context_length")}
    found |= {f"net.{name}": net.pop(name, "") for name in ("activation", "context_norm")}
    needed: dict[str, Any] = {"text.masked": False, "text.context_length": CONTEXT_LENGTH}
    demand(role, found, **needed, **{"net.activation": "gelu", "net.context_norm": "group"})
    groups, width, residual = (net.pop(name, 0) for name in ("norm_groups", "emb_dim", "residual_scale"))
    if net or not groups:
        raise ValueError(f"{role}: diffusers needs net.norm_groups and no net.{', net.'.join(net)}")
    side, levels = model["image_size"], range(len(model["channel_mult"]))
    attends = [side // 2**level in model["attention_resolutions"] for level in levels]
    scale = 1 / residual if residual else 1
    config = FIXED | dict(
        _class_name="UNet2DConditionModel",
        sample_size=side,
        in_channels=6 if kind == "upsampler" else 3,
        block_out_channels=[int(model["channels"] * mult) for mult in model["channel_mult"]],
        layers_per_block=model["num_res_blocks"],
        down_block_types=[BLOCK_TYPES[yes][0] for yes in attends],
        up_block_types=[BLOCK_TYPES[yes][1] for yes in reversed(attends)],
        encoder_hid_dim=text["states_width"],
        cross_attention_dim=text["width"],
        addition_embed_type_num_heads=text["pool_heads"],
        attention_head_dim=model["head_dim"],
        norm_num_groups=groups,
        resnet_out_scale_factor=scale,
        mid_block_scale_factor=scale,
        time_embedding_dim=width or None,
    )
    if kind == "upsampler":  # the activation stands once outside of the blocks, as in the released stage
        config |= dict(class_embed_type="timestep", time_embedding_act_fn="gelu", resnet_skip_time_act=True)
    return config

"""DeepFloyd IF, stages I and II: folders of diffusers' IFPipeline and IFSuperResolutionPipeline.

IF is Imagen's open relative: a frozen T5, a decoder and an upsampler that read its states. The source is a
folder of one stage, or a folder with both (IF-I-XL-v1.0, IF-II-L-v1.0). Stage III is another model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import t5
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.karlo import BLOCK_TYPES, expect
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
    expect(scheduler, where, beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    expect(scheduler, where, prediction_type="epsilon")
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

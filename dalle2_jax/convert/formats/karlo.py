"""Karlo as diffusers' UnCLIPPipeline: a folder of prior, text_proj, decoder, super_res_first and _last.

Karlo differs from the recipes here by settings alone: embeddings keep CLIP's norm, prior and decoder read the
states of CLIP's text tower, the null caption is "" (`null_tokens`), time embeddings are added in the
upsampler's blocks (`scale_shift=False`), and a second network takes the upsampler's last step.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import hf_clip
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.unet import diffusers_rows, read_stage
from dalle2_jax.convert.tables import LEADING, BlockNames, Imported, Layout, Row, dense, leaf, norm, under
from dalle2_jax.convert.tensors import Tensors, joined, open_tensors
from dalle2_jax.data.tokenizer import load_tokenizer
from dalle2_jax.models import models
from dalle2_jax.models.null_caption import LEAVES, encode

HELP = "Karlo, a folder of diffusers' UnCLIPPipeline"
LICENCE = (
    "Karlo's are CreativeML OpenRAIL-M, its CLIP's MIT; of other weights in this layout ask their makers"
)
BLOCKS = BlockNames(
    norm1="norm1",
    norm2="norm3",
    qkv=("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    out="attn1.to_out.0",
    fc1="ff.net.0.proj",
    fc2="ff.net.2",
)
# Our layers -> theirs.
PRIOR_NAMES = dict(
    text_states_proj="encoder_hidden_states_proj",
    text_embed_proj="embedding_proj",
    image_embed_proj="proj_in",
    time_fc1="time_embedding.linear_1",
    time_fc2="time_embedding.linear_2",
    out_proj="proj_to_clip_embeddings",
    position="positional_embedding",
    query="prd_embedding",
    norm_out="norm_out",
)
DECODER_NAMES = dict(
    image_emb_proj="text_proj.clip_image_embeddings_project_to_time_embeddings",
    text_emb_proj="text_proj.embedding_proj",
    text_states_proj="text_proj.encoder_hidden_states_proj",
    image_token_proj="text_proj.clip_extra_context_tokens_proj",
    text_states_norm="text_proj.text_encoder_hidden_states_norm",
    null_image_embed="text_proj.learned_classifier_free_guidance_embeddings",
)
UPSAMPLER_PREFIXES = ("first.", "last.")
# [1, 1, D], which is a vector of ours
QUERY = Layout(lambda x, n: [x[None, None]], lambda xs: xs[0][0, 0])
# Sampling settings of Karlo and training settings of its decoder, for both of its formats.
PRIOR_SAMPLING = dict(num_steps=25, guidance_scale=4.0)
DECODER_SAMPLING = dict(text_drop=0.3, num_steps=25, guidance_scale=8.0)
UPSAMPLER_SAMPLING = dict(num_steps=7, method="ddpm", last_step=True)
# Types of down and up blocks, with attention and without.
BLOCK_TYPES = {
    True: ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
    False: ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
EPSILON_NOISE = dict(prediction_type="epsilon", clip_sample_range=1)


def prior_rows(names: Mapping[str, str], blocks: list[Row]) -> list[Row]:
    """The table of a prior without the statistics of its embeddings; `names` as PRIOR_NAMES."""
    layers = [name for name in names if name.endswith("_proj") or name.startswith("time_")]
    return [
        *(row for name in layers for row in dense(name, names[name])),
        *leaf("position/embedding", names["position"], LEADING),
        *leaf("query/embedding", names["query"], QUERY),
        *blocks,
        *norm("norm_out", names["norm_out"]),
    ]


def diffusers_prior_rows(depth: int) -> list[Row]:
    """The table of a PriorTransformer."""
    net = prior_rows(PRIOR_NAMES, BLOCKS.rows("transformer", "transformer_blocks.{}", depth))
    stats = leaf("embed_mean", "clip_mean", LEADING) + leaf("embed_std", "clip_std", LEADING)
    return under("net", net) + under("stats", stats)


def decoder_rows(names: Mapping[str, str], num_image_tokens: int) -> list[Row]:
    """The table of a decoder's conditions; `names` as DECODER_NAMES."""
    layers = ("image_emb_proj", "text_emb_proj", "text_states_proj")
    tokens = tables.regrouped(num_image_tokens)
    return [
        *(row for name in layers for row in dense(name, names[name])),
        *dense("image_token_proj", names["image_token_proj"], layouts=tokens),
        *norm("text_states_norm", names["text_states_norm"]),
        *leaf("null_image_embed", names["null_image_embed"]),
    ]


def diffusers_decoder_rows(params: Mapping, num_image_tokens: int) -> list[Row]:
    """The table of a decoder: U-Net below decoder., conditions below text_proj."""
    return diffusers_rows(params, "decoder.") + decoder_rows(DECODER_NAMES, num_image_tokens)


def upsampler_rows(
    params: Mapping,
    network: Callable[[Mapping, str], list[Row]] = diffusers_rows,
    prefixes: tuple[str, str] = UPSAMPLER_PREFIXES,
) -> list[Row]:
    """The table of an upsampler's network and, if it has one, its network for the last step."""
    rows = network(params, prefixes[0])
    return rows + (under("last", network(params["last"], prefixes[1])) if "last" in params else [])


def expect(config: Mapping, where: str, **values) -> None:
    """Raise ValueError for a value in `config` that our networks do not have, with both values."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}, only {value!r} is built")


def demand(role: str, settings: Mapping, **values) -> None:
    """Raise ValueError for a setting of ours that diffusers does not support, with both values."""
    for name, value in values.items():
        if settings[name] != value:
            raise ValueError(f"{role}: model.{name} is {settings[name]!r}, diffusers needs {value!r}")


def _levels(config: Mapping, where: str, attends: bool) -> dict:
    """Our settings of a U-Net from diffusers' config."""
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{where}: block_out_channels {widths} are no multiples of the first")
    fixed = dict(act_fn="silu", norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1)
    expect(config, where, center_input_sample=False, dropout=0.0, **fixed)
    attending = [kind == BLOCK_TYPES[True][0] for kind in config["down_block_types"]]
    built = [[BLOCK_TYPES[yes][0] for yes in attending], [BLOCK_TYPES[yes][1] for yes in reversed(attending)]]
    types = [list(config["down_block_types"]), list(config["up_block_types"])]
    if types != built or (any(attending) and not attends):
        raise ValueError(f"{where}: blocks of types {types[0]} and {types[1]} are not built")
    sides = [config["sample_size"] // 2**level for level, yes in enumerate(attending) if yes]
    return dict(
        image_size=config["sample_size"],
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        dropout=0.0,
    ) | ({"attention_resolutions": sides} if attends else {})


def _scheduler(folder: Path, **values) -> dict:
    config = read_json(folder / "scheduler_config.json")
    expect(config, str(folder), clip_sample=True, **values)
    return config


def prior_config(config: Mapping, scheduler: Mapping, where: str, null_tokens: int) -> dict:
    """A prior's config from those of a PriorTransformer and its scheduler."""
    fixed = dict(encoder_hid_proj_type="linear", added_emb_type="prd", time_embed_act_fn="silu", dropout=0.0)
    absent = ("norm_in_type", "embedding_proj_norm_type", "time_embed_dim", "embedding_proj_dim")
    expect(config, where, additional_embeddings=4, clip_embed_dim=None, **fixed, **dict.fromkeys(absent))
    heads = config["num_attention_heads"]
    text = dict(
        width=heads * config["attention_head_dim"],
        depth=config["num_layers"],
        num_heads=heads,
        context_length=config["num_embeddings"],
        states_width=config["embedding_dim"],
        null_tokens=null_tokens,
    )
    model = dict(
        embed_dim=config["embedding_dim"],
        text=text,
        embed_scale=dict(mode="meanstd"),
        text_drop=0.2,
        num_timesteps=scheduler["num_train_timesteps"],
        num_candidates=1,
        clip_range=float(scheduler["clip_sample_range"]),
    )
    return {"stage": "prior", "model": model | PRIOR_SAMPLING}


def null_leaves(null: tuple[np.ndarray, np.ndarray], role: str) -> dict[str, np.ndarray]:
    """`null_caption` under our names of a stage's leaves."""
    return dict(zip(LEAVES[role], null, strict=True))


def null_caption(clip: dict, params: Any, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """CLIP's outputs for the caption "": (text embedding [E], text states [n, D] of its n tokens)."""
    text_params = {"text": jax.tree.map(np.asarray, params["text"])}
    embed, states = encode(models.build_stage(clip), text_params, tokenizer)
    return np.asarray(embed), np.asarray(states)


def read_pipeline(source: Path, kind: str, scheduler: str, tokenizer) -> tuple[Imported, tuple]:
    """(CLIP and prior of a pipeline of diffusers of class `kind`, the `null_caption`).

    Sampling settings are those of UnCLIPPipeline and Kandinsky's pipeline: 25 steps, guidance 4.
    """
    found = read_json(source / "model_index.json").get("_class_name")
    if found != kind:
        raise ValueError(f"{source} holds a {found!r}, not {'an' if kind[0] == 'U' else 'a'} {kind}")
    vision = source / "image_encoder"
    vision_folder = vision if vision.is_dir() else None
    clip, clip_tensors = hf_clip.import_towers(source / "text_encoder", vision_folder, unit_embeds=False)
    length = clip[0]["model"]["text"]["context_length"]
    tokenizer = tokenizer or load_tokenizer(source / "tokenizer", length)
    null = null_caption(*clip, tokenizer)
    noise = _scheduler(source / scheduler, variance_type="fixed_small_log", prediction_type="sample")
    folder = source / "prior"
    config = prior_config(read_json(folder / "config.json"), noise, str(folder), len(null[1]))
    rows, tensors = diffusers_prior_rows(config["model"]["text"]["depth"]), open_tensors(folder)
    prior = tables.read_stage(config, lambda params: rows, tensors, leaves=null_leaves(null, "prior"))
    return Imported({"clip": clip, "prior": prior}, tokenizer, [clip_tensors, tensors]), null


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The cascade in the folder `source`."""
    read, null = read_pipeline(source, "UnCLIPPipeline", "prior_scheduler", tokenizer)
    decoder, decoder_tensors = _decoder(source, read.stages["clip"][0]["model"], null)
    upsampler, upsampler_tensors = _upsampler(source, decoder[0]["model"]["image_size"])
    read.stages |= {"decoder": decoder, f"upsampler{upsampler[0]['model']['image_size']}": upsampler}
    return Imported(read.stages, read.tokenizer, [*read.tensors, decoder_tensors, upsampler_tensors], LICENCE)


def _decoder(source: Path, clip: dict, null: tuple) -> tuple[tuple[dict, dict], Tensors]:
    """((config, parameters), the files that they are read from)."""
    config, where = read_json(source / "decoder" / "config.json"), str(source / "decoder")
    fixed = dict(class_embed_type="identity", mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    absent = dict.fromkeys(("encoder_hid_dim", "addition_embed_type"))
    expect(config, where, in_channels=3, out_channels=6, **fixed, **absent)
    proj = read_json(source / "text_proj" / "config.json")
    expect(proj, str(source / "text_proj"), time_embed_dim=4 * config["block_out_channels"][0])
    scheduler = _scheduler(source / "decoder_scheduler", variance_type="learned_range", **EPSILON_NOISE)
    text = dict(
        states_width=proj["clip_embeddings_dim"],
        context_length=clip["text"]["context_length"],
        width=config["cross_attention_dim"],
        null_tokens=len(null[1]),
    )
    model = dict(
        embed_dim=proj["clip_embeddings_dim"],
        embed_scale=1.0,
        **_levels(config, where, attends=True),
        head_dim=config["attention_head_dim"],
        num_image_tokens=proj.get("clip_extra_context_tokens", 4),
        text=text,
        num_timesteps=scheduler["num_train_timesteps"],
        **DECODER_SAMPLING,
    )
    tensors = joined({f"{name}.": open_tensors(source / name) for name in ("decoder", "text_proj")})
    stage = read_stage(
        {"stage": "decoder", "model": model},
        lambda params: diffusers_decoder_rows(params, model["num_image_tokens"]),
        tensors,
        config["norm_num_groups"],
        leaves=null_leaves(null, "decoder"),
    )
    return stage, tensors


def _upsampler(source: Path, low_res_size: int) -> tuple[tuple[dict, dict], Tensors]:
    """((config, parameters), the files that they are read from)."""
    folders = dict(
        zip(UPSAMPLER_PREFIXES, (source / "super_res_first", source / "super_res_last"), strict=True)
    )
    first, last = (read_json(folder / "config.json") for folder in folders.values())
    where = str(source / "super_res_first")
    differing = [n for n in first if not n.startswith("_") and first[n] != last.get(n)]
    if differing:
        raise ValueError(f"{source}: super_res_first and super_res_last differ in {', '.join(differing)}")
    expect(first, where, add_attention=False, in_channels=6, out_channels=3, time_embedding_type="positional")
    scheduler = _scheduler(source / "super_res_scheduler", variance_type="fixed_small_log", **EPSILON_NOISE)
    model = dict(
        low_res_size=low_res_size,
        **_levels(first, where, attends=False),
        num_timesteps=scheduler["num_train_timesteps"],
        **UPSAMPLER_SAMPLING,
    )
    tensors = joined({prefix: open_tensors(folder) for prefix, folder in folders.items()})
    config = {"stage": "upsampler", "model": model}
    return read_stage(config, upsampler_rows, tensors, first["norm_num_groups"]), tensors

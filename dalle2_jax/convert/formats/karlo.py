"""Karlo as diffusers' UnCLIPPipeline: a folder of prior, text_proj, decoder, super_res_first and _last.

Karlo differs from the recipes here by settings alone: embeddings keep CLIP's norm, prior and decoder read the
states of CLIP's text tower, the null caption is "" (`null_tokens`), time embeddings are added in the
upsampler's blocks (`scale_shift=False`), and a second network takes the upsampler's last step.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import hf_clip
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.unet import check_groups, diffusers_rows
from dalle2_jax.convert.tables import (
    LEADING,
    BlockNames,
    Imported,
    Layout,
    Row,
    dense,
    entry_major,
    leaf,
    norm,
    under,
)
from dalle2_jax.convert.tensors import joined, open_tensors
from dalle2_jax.data.tokenizer import load_tokenizer
from dalle2_jax.models import models

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
# [1, 1, D], which is a vector of ours
QUERY = Layout(lambda x, n: [x[None, None]], lambda xs: xs[0][0, 0])
# Sampling settings of Karlo and training settings of its decoder, for its own checkpoints and diffusers'
# folder.
PRIOR_SAMPLING = dict(num_steps=25, guidance_scale=4.0)
DECODER_SAMPLING = dict(text_drop=0.3, num_steps=25, guidance_scale=8.0)
UPSAMPLER_SAMPLING = dict(num_steps=7, method="ddpm", last_step=True)
# Types of down and up blocks, with attention and without.
BLOCK_TYPES = {
    True: ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
    False: ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}


def prior_rows(depth: int) -> list[Row]:
    """The table of a PriorTransformer."""
    net = [
        *dense("text_states_proj", "encoder_hidden_states_proj"),
        *dense("text_embed_proj", "embedding_proj"),
        *dense("image_embed_proj", "proj_in"),
        *dense("time_fc1", "time_embedding.linear_1"),
        *dense("time_fc2", "time_embedding.linear_2"),
        *leaf("position/embedding", "positional_embedding", LEADING),
        *leaf("query/embedding", "prd_embedding", QUERY),
        *BLOCKS.rows("transformer", "transformer_blocks.{}", depth),
        *norm("norm_out", "norm_out"),
        *dense("out_proj", "proj_to_clip_embeddings"),
    ]
    stats = leaf("embed_mean", "clip_mean", LEADING) + leaf("embed_std", "clip_std", LEADING)
    return under("net", net) + under("stats", stats)


def decoder_rows(net: Mapping, num_image_tokens: int) -> list[Row]:
    """The table of a decoder: U-Net below decoder., conditions below text_proj."""
    proj = "text_proj."
    return [
        *under("net", diffusers_rows(net["net"], "decoder.")),
        *dense("time/fc1", "decoder.time_embedding.linear_1"),
        *dense("time/fc2", "decoder.time_embedding.linear_2"),
        *dense("image_emb_proj", f"{proj}clip_image_embeddings_project_to_time_embeddings"),
        *dense("text_emb_proj", f"{proj}embedding_proj"),
        *dense(
            "image_token_proj",
            f"{proj}clip_extra_context_tokens_proj",
            layout=entry_major(num_image_tokens),
            bias_layout=entry_major(num_image_tokens),
        ),
        *leaf("null_image_embed", f"{proj}learned_classifier_free_guidance_embeddings"),
        *dense("text_states_proj", f"{proj}encoder_hidden_states_proj"),
        *norm("text_states_norm", f"{proj}text_encoder_hidden_states_norm"),
    ]


def upsampler_rows(net: Mapping) -> list[Row]:
    """The table of both networks of an upsampler: below first. and, if there is one, last."""
    rows = []
    for ours, theirs in (("", "first."), ("last/", "last.")):
        part = net["last"] if ours else net
        both = [
            *under("net", diffusers_rows(part["net"], theirs)),
            *dense("time/fc1", f"{theirs}time_embedding.linear_1"),
            *dense("time/fc2", f"{theirs}time_embedding.linear_2"),
        ]
        rows += [dataclasses.replace(row, ours=ours + row.ours) for row in both]
        if "last" not in net:
            break
    return rows


def expect(config: Mapping, where: str, **values) -> None:
    """Raise ValueError for a value in `config` that our networks do not have, with both values."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}, only {value!r} is built")


def _levels(config: Mapping, where: str, attends: bool) -> dict:
    """Our settings of a U-Net from diffusers' config."""
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{where}: block_out_channels {widths} are no multiples of the first")
    expect(
        config,
        where,
        act_fn="silu",
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        center_input_sample=False,
        dropout=0.0,
        mid_block_scale_factor=1,
    )
    attending = [kind == BLOCK_TYPES[True][0] for kind in config["down_block_types"]]
    built = [[BLOCK_TYPES[yes][0] for yes in attending], [BLOCK_TYPES[yes][1] for yes in reversed(attending)]]
    types = [list(config["down_block_types"]), list(config["up_block_types"])]
    if types != built or (any(attending) and not attends):
        raise ValueError(f"{where}: blocks of types {types[0]} and {types[1]} are not built")
    sides = [config["sample_size"] // 2**level for level, yes in enumerate(attending) if yes]
    return dict(
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


def prior_stage(config: Mapping, scheduler: Mapping, where: str, null_tokens: int) -> dict:
    """A prior's config from those of a PriorTransformer and its scheduler."""
    expect(
        config,
        where,
        additional_embeddings=4,
        norm_in_type=None,
        embedding_proj_norm_type=None,
        encoder_hid_proj_type="linear",
        added_emb_type="prd",
        time_embed_act_fn="silu",
        time_embed_dim=None,
        embedding_proj_dim=None,
        clip_embed_dim=None,
        dropout=0.0,
    )
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


def null_leaves(null: Mapping[str, np.ndarray], embed: str, states: str) -> dict[str, np.ndarray]:
    """`null_caption` under our names of these leaves."""
    return {embed: null["text_embed"], states: null["text_states"]}


def read_prior(folder: Path, scheduler: Path, null: dict[str, np.ndarray]) -> tuple[dict, Any, Any]:
    """(config, parameters, their source) of a PriorTransformer. null: the `null_caption` of its CLIP.

    Sampling settings are those of UnCLIPPipeline and Kandinsky's pipeline: 25 steps, guidance 4.
    """
    noise = _scheduler(scheduler, variance_type="fixed_small_log", prediction_type="sample")
    config = prior_stage(read_json(folder / "config.json"), noise, str(folder), len(null["text_states"]))
    tensors = open_tensors(folder)
    abstract = models.abstract_params(models.build_stage(config))
    leaves = null_leaves(null, "net/null_text_embed/embedding", "net/null_text_states/embedding")
    rows = prior_rows(config["model"]["text"]["depth"])
    return config, tables.imported(rows, tensors, abstract, leaves=leaves), tensors


def null_caption(clip: dict, params: Any, tokenizer) -> dict[str, np.ndarray]:
    """CLIP's outputs for the caption "": text_embed [E], text_states [n, D] of its n tokens."""
    stage = models.build_stage(clip)
    tokens, mask = models.crop_tokens(*map(jnp.asarray, tokenizer([""])), stage.context_length)
    text_params = {"text": jax.tree.map(np.asarray, params["text"])}
    embed, states = jax.jit(stage.encode_text)(text_params, tokens, mask)
    return {"text_embed": np.asarray(embed[0]), "text_states": np.asarray(states[0, : int(mask.sum())])}


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The cascade in the folder `source`."""
    index = read_json(source / "model_index.json")
    if index.get("_class_name") != "UnCLIPPipeline":
        raise ValueError(f"{source} holds a {index.get('_class_name')!r}, not an UnCLIPPipeline")
    vision = source / "image_encoder"
    vision = vision if vision.is_dir() else None
    clip, clip_params, clip_file = hf_clip.import_towers(source / "text_encoder", vision, unit_embeds=False)
    tokenizer = tokenizer or load_tokenizer(source / "tokenizer", clip["model"]["text"]["context_length"])
    null = null_caption(clip, clip_params, tokenizer)

    prior, prior_params, prior_file = read_prior(source / "prior", source / "prior_scheduler", null)
    decoder, decoder_params, decoder_file = _decoder(source, clip["model"], null)
    upsampler, upsampler_params, upsampler_file = _upsampler(source, decoder["model"]["image_size"])
    stages = {
        "clip": (clip, clip_params),
        "prior": (prior, prior_params),
        "decoder": (decoder, decoder_params),
        f"upsampler{upsampler['model']['image_size']}": (upsampler, upsampler_params),
    }
    return Imported(stages, tokenizer, [clip_file, prior_file, decoder_file, upsampler_file], LICENCE)


def _decoder(source: Path, clip: dict, null: dict[str, np.ndarray]) -> tuple[dict, Any, Any]:
    config, where = read_json(source / "decoder" / "config.json"), str(source / "decoder")
    expect(
        config,
        where,
        class_embed_type="identity",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=None,
        addition_embed_type=None,
    )
    proj = read_json(source / "text_proj" / "config.json")
    expect(proj, str(source / "text_proj"), time_embed_dim=4 * config["block_out_channels"][0])
    scheduler = _scheduler(
        source / "decoder_scheduler",
        variance_type="learned_range",
        prediction_type="epsilon",
        clip_sample_range=1,
    )
    text = dict(
        states_width=proj["clip_embeddings_dim"],
        context_length=clip["text"]["context_length"],
        width=config["cross_attention_dim"],
        null_tokens=len(null["text_states"]),
    )
    model = dict(
        image_size=config["sample_size"],
        embed_dim=proj["clip_embeddings_dim"],
        embed_scale=1.0,
        **_levels(config, where, attends=True),
        head_dim=config["attention_head_dim"],
        num_image_tokens=proj.get("clip_extra_context_tokens", 4),
        text=text,
        num_timesteps=scheduler["num_train_timesteps"],
        **DECODER_SAMPLING,
    )
    stage = {"stage": "decoder", "model": model}
    tensors = joined({f"{name}.": open_tensors(source / name) for name in ("decoder", "text_proj")})
    abstract = models.abstract_params(models.build_stage(stage))
    check_groups(abstract["net"], config["norm_num_groups"], where)
    leaves = null_leaves(null, "null_text_embed", "null_text_states/embedding")
    rows = decoder_rows(abstract, model["num_image_tokens"])
    return stage, tables.imported(rows, tensors, abstract, leaves=leaves), tensors


def _upsampler(source: Path, low_res_size: int) -> tuple[dict, Any, Any]:
    folders = {"first.": source / "super_res_first", "last.": source / "super_res_last"}
    first, last = (read_json(folder / "config.json") for folder in folders.values())
    where = str(source / "super_res_first")
    differing = [n for n in first if not n.startswith("_") and first[n] != last.get(n)]
    if differing:
        raise ValueError(f"{source}: super_res_first and super_res_last differ in {', '.join(differing)}")
    expect(first, where, add_attention=False, in_channels=6, out_channels=3, time_embedding_type="positional")
    scheduler = _scheduler(
        source / "super_res_scheduler",
        variance_type="fixed_small_log",
        prediction_type="epsilon",
        clip_sample_range=1,
    )
    model = dict(
        image_size=first["sample_size"],
        low_res_size=low_res_size,
        **_levels(first, where, attends=False),
        num_timesteps=scheduler["num_train_timesteps"],
        **UPSAMPLER_SAMPLING,
    )
    stage = {"stage": "upsampler", "model": model}
    tensors = joined({prefix: open_tensors(folder) for prefix, folder in folders.items()})
    abstract = models.abstract_params(models.build_stage(stage))
    check_groups(abstract["net"], first["norm_num_groups"], where)
    return stage, tables.imported(upsampler_rows(abstract), tensors, abstract), tensors

"""Karlo's own checkpoints: a folder with prior-*.ckpt, decoder-*.ckpt, improved-sr-*.ckpt, ViT-L-14.pt and
ViT-L-14_stats.th.

The networks are karlo.py's with the names of OpenAI's code. Sizes follow from the tensors; heads have 64
entries, and the sides are Karlo's, 64 and 256.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import karlo, openai_clip
from dalle2_jax.convert.formats.unet import adm_rows, adm_settings, check_groups
from dalle2_jax.convert.tables import (
    BlockNames,
    Imported,
    Row,
    dense,
    entry_major,
    leaf,
    norm,
    per_head,
    under,
)
from dalle2_jax.convert.tensors import Tensors, joined, open_tensors
from dalle2_jax.models import models

HELP = "Karlo's checkpoints, a folder; needs --tokenizer"
HEAD_DIM = 64
SIDES = (64, 256)
NUM_IMAGE_TOKENS = 4
PATTERNS = {
    "prior": "prior-*.ckpt",
    "decoder": "decoder-*.ckpt",
    "upsampler": "improved-sr-*.ckpt",
    "clip": "ViT-L-14.pt",
    "stats": "ViT-L-14_stats.th",
}
BLOCKS = BlockNames(
    norm1="ln_1", norm2="ln_2", qkv=("attn.c_qkv",), out="attn.c_proj", fc1="mlp.c_fc", fc2="mlp.c_proj"
)


def prior_rows(depth: int) -> list[Row]:
    """The table of the prior; the mean and deviation of embeddings are the tuple stats.0, stats.1."""
    names = {
        "text_states_proj": "text_enc_proj",
        "text_embed_proj": "text_emb_proj",
        "image_embed_proj": "clip_img_proj",
        "time_fc1": "time_embed.0",
        "time_fc2": "time_embed.2",
        "out_proj": "out_proj",
    }
    blocks = BLOCKS.rows("transformer", "transformer.resblocks.{}", depth, per_head(3, HEAD_DIM))
    net = [row for ours, theirs in names.items() for row in dense(ours, theirs)]
    net += leaf("position/embedding", "positional_embedding", tables.LEADING)
    net += leaf("query/embedding", "prd_emb", karlo.QUERY) + norm("norm_out", "final_ln")
    rows = [dataclasses.replace(row, theirs=tuple(f"prior.{t}" for t in row.theirs)) for row in net + blocks]
    stats = leaf("embed_mean", "stats.0") + leaf("embed_std", "stats.1")
    return under("net", rows) + under("stats", stats)


def decoder_rows(net: Mapping) -> list[Row]:
    """The table of the decoder."""
    tokens = entry_major(NUM_IMAGE_TOKENS)
    return [
        *under("net", adm_rows(net["net"], HEAD_DIM)),
        *dense("time/fc1", "time_embed.0"),
        *dense("time/fc2", "time_embed.2"),
        *dense("image_emb_proj", "clip_emb"),
        *dense("text_emb_proj", "text_feat_proj"),
        *dense("image_token_proj", "clip_tok_proj", layout=tokens, bias_layout=tokens),
        *leaf("null_image_embed", "cf_param"),
        *dense("text_states_proj", "text_seq_proj.0"),
        *norm("text_states_norm", "text_seq_proj.1"),
    ]


def upsampler_rows(net: Mapping) -> list[Row]:
    """The table of both networks of the upsampler."""
    rows = []
    for ours, theirs in (("", "model_first_steps."), ("last/", "model_last_step.")):
        both = [
            *under("net", adm_rows(net["net"], HEAD_DIM, theirs)),
            *dense("time/fc1", f"{theirs}time_embed.0"),
            *dense("time/fc2", f"{theirs}time_embed.2"),
        ]
        rows += [dataclasses.replace(row, ours=ours + row.ours) for row in both]
    return rows


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The cascade in the folder `source`; the tokenizer is CLIP's, which is not among these files."""
    if tokenizer is None:
        raise ValueError(
            f"{source} comes without a tokenizer: give a folder with CLIP's vocab.json and merges.txt as "
            "--tokenizer=FOLDER"
        )
    opened = {role: open_tensors(_only(source, pattern)) for role, pattern in PATTERNS.items()}
    read = openai_clip.import_tensors(opened["clip"], "quick_gelu", unit_embeds=False)
    clip, clip_params = read.stages["clip"]
    null = karlo.null_caption(clip, clip_params, tokenizer)
    parts = {"prior.": opened["prior"], "stats.": opened["stats"]}
    stages = {
        "clip": (clip, clip_params),
        "prior": _prior(joined(parts), null),
        "decoder": _decoder(
            opened["decoder"],
            null,
            clip["model"]["text"]["context_length"],
        ),
        f"upsampler{SIDES[1]}": _upsampler(opened["upsampler"]),
    }
    return Imported(stages, None, list(opened.values()), karlo.LICENCE)


def _only(source: Path, pattern: str) -> Path:
    found = sorted(source.glob(pattern)) if source.is_dir() else []
    if len(found) != 1:
        raise FileNotFoundError(f"{source} is to hold one file {pattern}, it holds {len(found)}")
    return found[0]


def _prior(tensors: Tensors, null: dict) -> tuple[dict, dict]:
    depth = sum(name.endswith(".attn.c_qkv.weight") for name in tensors.shapes)
    width, embed_dim = tensors.shape("prior.clip_img_proj.weight")
    theirs = dict(
        num_attention_heads=width // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=depth,
        embedding_dim=embed_dim,
        num_embeddings=tensors.shape("prior.positional_embedding")[1] - 4,
    )
    noise = dict(num_train_timesteps=1000, clip_sample_range=10.0)  # the clipping range of Karlo's code
    config = karlo.prior_stage(theirs, noise, tensors.source, len(null["text_states"]))
    abstract = models.abstract_params(models.build_stage(config))
    leaves = karlo.null_leaves(null, "net/null_text_embed/embedding", "net/null_text_states/embedding")
    params = tables.imported(prior_rows(depth), tensors, abstract, leaves=leaves, ignored=r"prior\..*mask")
    return config, params


def _decoder(tensors: Tensors, null: dict, context_length: int) -> tuple[dict, dict]:
    settings, attending = adm_settings(tensors)
    embed_dim = tensors.shape("cf_param")[0]
    text = dict(
        states_width=embed_dim,
        context_length=context_length,
        width=tensors.shape("text_seq_proj.0.weight")[0],
        null_tokens=len(null["text_states"]),
    )
    model = settings | dict(
        image_size=SIDES[0],
        embed_dim=embed_dim,
        embed_scale=1.0,
        attention_resolutions=[SIDES[0] // 2**level for level in attending],
        head_dim=HEAD_DIM,
        num_image_tokens=NUM_IMAGE_TOKENS,
        text=text,
        **karlo.DECODER_SAMPLING,
    )
    config = {"stage": "decoder", "model": model}
    abstract = models.abstract_params(models.build_stage(config))
    check_groups(abstract["net"], 32, tensors.source)
    leaves = karlo.null_leaves(null, "null_text_embed", "null_text_states/embedding")
    return config, tables.imported(decoder_rows(abstract), tensors, abstract, leaves=leaves)


def _upsampler(tensors: Tensors) -> tuple[dict, dict]:
    settings, _ = adm_settings(tensors, "model_first_steps.")
    sizes = dict(low_res_size=SIDES[0], image_size=SIDES[1])
    config = {"stage": "upsampler", "model": settings | sizes | karlo.UPSAMPLER_SAMPLING}
    abstract = models.abstract_params(models.build_stage(config))
    check_groups(abstract["net"], 32, tensors.source)
    return config, tables.imported(upsampler_rows(abstract), tensors, abstract)

"""Karlo's original checkpoints: a folder with prior-*.ckpt, decoder-*.ckpt, improved-sr-*.ckpt, ViT-L-14.pt
and ViT-L-14_stats.th.

The networks are karlo.py's with the names of OpenAI's code. Sizes follow from the tensors; heads have 64
entries, and the sides are Karlo's, 64 and 256.
"""

from pathlib import Path

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import karlo, openai_clip
from dalle2_jax.convert.formats.unet import HEAD_DIM, adm_rows, adm_settings, read_stage
from dalle2_jax.convert.tables import BlockNames, Imported, Row, leaf, regrouped, under
from dalle2_jax.convert.tensors import Tensors, joined, open_tensors

HELP = "Karlo's checkpoints, a folder; needs --tokenizer"
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
# Our layers -> theirs.
PRIOR_NAMES = dict(
    text_states_proj="text_enc_proj",
    text_embed_proj="text_emb_proj",
    image_embed_proj="clip_img_proj",
    time_fc1="time_embed.0",
    time_fc2="time_embed.2",
    out_proj="out_proj",
    position="positional_embedding",
    query="prd_emb",
    norm_out="final_ln",
)
DECODER_NAMES = dict(
    image_emb_proj="clip_emb",
    text_emb_proj="text_feat_proj",
    text_states_proj="text_seq_proj.0",
    image_token_proj="clip_tok_proj",
    text_states_norm="text_seq_proj.1",
    null_image_embed="cf_param",
)
UPSAMPLER_PREFIXES = ("model_first_steps.", "model_last_step.")


def prior_rows(depth: int) -> list[Row]:
    """The table of the prior; the mean and deviation of embeddings are the tuple stats.0, stats.1."""
    blocks = BLOCKS.rows("transformer", "transformer.resblocks.{}", depth, regrouped(3, HEAD_DIM))
    stats = leaf("embed_mean", "stats.0") + leaf("embed_std", "stats.1")
    return under("net", karlo.prior_rows(PRIOR_NAMES, blocks), "prior.") + under("stats", stats)


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The cascade in the folder `source`; the tokenizer is CLIP's, which is not among these files."""
    if tokenizer is None:
        raise ValueError(
            f"{source} comes without a tokenizer: give a folder with CLIP's vocab.json and merges.txt as "
            "--tokenizer=FOLDER"
        )
    opened = {role: open_tensors(_only(source, pattern)) for role, pattern in PATTERNS.items()}
    clip = openai_clip.import_tensors(opened["clip"], "quick_gelu", unit_embeds=False).stages["clip"]
    null = karlo.null_caption(*clip, tokenizer)
    parts = {"prior.": opened["prior"], "stats.": opened["stats"]}
    stages = {
        "clip": clip,
        "prior": _prior(joined(parts), null),
        "decoder": _decoder(opened["decoder"], null, clip[0]["model"]["text"]["context_length"]),
        f"upsampler{SIDES[1]}": _upsampler(opened["upsampler"]),
    }
    return Imported(stages, None, list(opened.values()), karlo.LICENCE)


def _only(source: Path, pattern: str) -> Path:
    found = sorted(source.glob(pattern)) if source.is_dir() else []
    if len(found) != 1:
        raise FileNotFoundError(f"{source} must hold one file {pattern}, it holds {len(found)}")
    return found[0]


def _prior(tensors: Tensors, null: tuple) -> tuple[dict, dict]:
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
    config = karlo.prior_config(theirs, noise, tensors.source, len(null[1]))
    leaves = karlo.null_leaves(null, "prior")
    return tables.read_stage(
        config, lambda params: prior_rows(depth), tensors, leaves=leaves, ignored=r"prior\..*mask"
    )


def _decoder(tensors: Tensors, null: tuple, context_length: int) -> tuple[dict, dict]:
    settings, attending = adm_settings(tensors)
    embed_dim = tensors.shape("cf_param")[0]
    text = dict(
        states_width=embed_dim,
        context_length=context_length,
        width=tensors.shape("text_seq_proj.0.weight")[0],
        null_tokens=len(null[1]),
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
    conditions = karlo.decoder_rows(DECODER_NAMES, NUM_IMAGE_TOKENS)
    return read_stage(
        {"stage": "decoder", "model": model},
        lambda params: adm_rows(params) + conditions,
        tensors,
        leaves=karlo.null_leaves(null, "decoder"),
    )


def _upsampler(tensors: Tensors) -> tuple[dict, dict]:
    settings, _ = adm_settings(tensors, UPSAMPLER_PREFIXES[0])
    sizes = dict(low_res_size=SIDES[0], image_size=SIDES[1])
    config = {"stage": "upsampler", "model": settings | sizes | karlo.UPSAMPLER_SAMPLING}
    return read_stage(
        config, lambda params: karlo.upsampler_rows(params, adm_rows, UPSAMPLER_PREFIXES), tensors
    )

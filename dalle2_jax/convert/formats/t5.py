"""The text encoder of T5 v1.1 (google/t5-v1_1-*), a folder with config.json, weights and a tokenizer.

Weights of the decoder are left out. `tokenizer.json` is made once from spiece.model, by transformers with
sentencepiece (the extra of that name), so that drawing needs neither.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.karlo import expect
from dalle2_jax.convert.tables import Imported, Row, dense, leaf, under
from dalle2_jax.convert.tensors import Tensors, open_tensors
from dalle2_jax.data.tokenizer import load_t5

HELP = "a folder of T5 v1.1, of which the encoder is read (google/t5-v1_1-xxl)"
LICENCE = "Apache-2.0, that of google/t5-v1_1-*; of other weights in this layout ask their makers"
CONTEXT_LENGTH = 128
FIXED = dict(
    model_type="t5",
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
)
# Our settings -> theirs.
SIZES = dict(
    vocab_size="vocab_size",
    width="d_model",
    depth="num_layers",
    num_heads="num_heads",
    mlp_width="d_ff",
    head_dim="d_kv",
)
# The decoder, and the token table under other names.
IGNORED = r"decoder\..*|lm_head\..*|encoder\.embed_tokens\.weight"


def rows(depth: int) -> list[Row]:
    """The table of the encoder."""
    found = leaf("token_embedding/embedding", "shared.weight")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found += leaf("position_bias", bias) + leaf("norm_out/scale", "encoder.final_layer_norm.weight")
    attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    block = [
        *leaf("norm1/scale", "layer.0.layer_norm.weight"),
        *dense("qkv", *(f"{attention}.{part}" for part in "qkv"), bias=False),
        *dense("out", f"{attention}.o", bias=False),
        *leaf("norm2/scale", "layer.1.layer_norm.weight"),
        *dense("fc_gate", f"{mlp}.wi_0", bias=False),
        *dense("fc1", f"{mlp}.wi_1", bias=False),
        *dense("fc2", f"{mlp}.wo", bias=False),
    ]
    for number in range(depth):
        found += under(f"block_{number}", block, f"encoder.block.{number}.")
    return found


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The encoder in the folder `source`."""
    stage, tensors = read(source, CONTEXT_LENGTH)
    return Imported({"t5": stage}, tokenizer or load_t5(source, CONTEXT_LENGTH), [tensors], LICENCE)


def read(source: Path, context_length: int) -> tuple[tuple[dict, dict], Tensors]:
    """((config, parameters) of the encoder in the folder `source`, its files)."""
    config = read_json(source / "config.json")
    expect(config, str(source / "config.json"), **FIXED)
    model = {ours: config[theirs] for ours, theirs in SIZES.items()}
    model |= dict(context_length=context_length, mask_token=min(32_099, config["vocab_size"] - 1))
    tensors, table = open_tensors(source), rows(config["num_layers"])
    stage = {"stage": "t5", "model": model}
    return tables.read_stage(stage, lambda params: table, tensors, ignored=IGNORED), tensors


def export(model: Mapping, params: Any) -> tuple[dict, dict]:
    """(config, tensors) of a T5EncoderModel; `model`: all settings of the stage."""
    config = FIXED | dict(architectures=["T5EncoderModel"], is_encoder_decoder=False, use_cache=False)
    config |= {theirs: model[ours] for ours, theirs in SIZES.items()}
    return config, tables.exported(rows(model["depth"]), params)

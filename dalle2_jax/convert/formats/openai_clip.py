"""OpenAI's CLIP archives (ViT-L-14.pt, RN50.pt, ...): TorchScript, whose tensors alone are read.

Sizes follow from the tensors; heads have 64 entries, and transformers have QuickGELU.
"""

import dataclasses
import re
from pathlib import Path

from dalle2_jax.convert import tables
from dalle2_jax.convert.tables import (
    CONV,
    OPENAI_LICENCE,
    BlockNames,
    Imported,
    Row,
    conv,
    dense,
    leaf,
    norm,
    under,
)
from dalle2_jax.convert.tensors import Tensors, open_tensors

HELP = "OpenAI's CLIP: a .pt archive with a ViT or a ResNet"
HEAD_DIM = 64
BLOCKS = BlockNames(
    norm1="ln_1", norm2="ln_2", qkv=("attn.in_proj_",), out="attn.out_proj", fc1="mlp.c_fc", fc2="mlp.c_proj"
)
# A CLIP that was scripted again has the attention mask in every block, and sizes in both towers.
IGNORED = (
    r"(.*\.)?(input_resolution|image_size|patch_size|context_length|vocab_size|attn_mask|num_batches_tracked)"
)


def _blocks(tensors: Tensors, pattern: str) -> int:
    """The number of distinct matches of the pattern's group in the tensors' names."""
    found = (re.fullmatch(pattern, name) for name in tensors.shapes)
    return len({match[1] for match in found if match})


def text_model(tensors: Tensors) -> dict:
    """Our settings of the text tower, and its embeddings' size."""
    vocab, width = tensors.shape("token_embedding.weight")
    return dict(
        vocab_size=vocab,
        context_length=tensors.shape("positional_embedding")[0],
        width=width,
        depth=_blocks(tensors, r"transformer\.resblocks\.(\d+)\.ln_1\.weight"),
        num_heads=width // HEAD_DIM,
    )


def text_rows(depth: int) -> list[Row]:
    """The table of the text tower."""
    rows = leaf("token_embedding/embedding", "token_embedding.weight")
    rows += leaf("position/embedding", "positional_embedding") + norm("norm_out", "ln_final")
    rows += leaf("proj/kernel", "text_projection")
    return under("text", rows + BLOCKS.rows("transformer", "transformer.resblocks.{}", depth))


def vit_rows(depth: int) -> list[Row]:
    """The table of a vision transformer."""
    rows = leaf("patch_embedding/kernel", "conv1.weight", CONV) + leaf("proj/kernel", "proj")
    rows += leaf("class_token/embedding", "class_embedding")
    rows += leaf("position/embedding", "positional_embedding")
    rows += norm("norm_pre", "ln_pre") + norm("norm_post", "ln_post")
    rows += BLOCKS.rows("transformer", "transformer.resblocks.{}", depth)
    return under("vision", rows, "visual.")


def resnet_rows(depths: list[int]) -> list[Row]:
    """The table of a modified ResNet."""

    def layer(end: str, conv_name: str, norm_name: str) -> list[Row]:
        """A convolution and its batch norm, which are called conv + `end` and norm + `end`."""
        batch_norm = norm(f"norm{end}", norm_name) + leaf(f"norm{end}/mean", f"{norm_name}.running_mean")
        batch_norm += leaf(f"norm{end}/var", f"{norm_name}.running_var")
        return conv(f"conv{end}", conv_name, bias=False) + batch_norm

    three = [row for number in "123" for row in layer(number, f"conv{number}", f"bn{number}")]
    skip = layer("_skip", "downsample.0", "downsample.1")
    pool = leaf("position/embedding", "positional_embedding") + dense("q", "q_proj")
    pool += dense("kv", "k_proj", "v_proj") + dense("out", "c_proj")
    rows = three + under("pool", pool, "attnpool.")
    for level, depth in enumerate(depths):
        for block in range(depth):
            layers = three if block else three + skip
            rows += under(f"stage_{level}_block_{block}", layers, f"layer{level + 1}.{block}.")
    return under("vision", rows, "visual.")


def vision_model(tensors: Tensors, head_dim: int = HEAD_DIM) -> tuple[dict, int]:
    """(our settings of the image tower, the side of its pictures); head_dim: of a vision transformer."""
    if "visual.proj" in tensors.shapes:
        width, _, _, patch = tensors.shape("visual.conv1.weight")
        side = round((tensors.shape("visual.positional_embedding")[0] - 1) ** 0.5)
        depth = _blocks(tensors, r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.weight")
        model = dict(kind="vit", patch_size=patch, width=width, depth=depth, num_heads=width // head_dim)
        mlp_width = tensors.shape("visual.transformer.resblocks.0.mlp.c_fc.bias")[0]
        return model | ({} if mlp_width == 4 * width else {"mlp_width": mlp_width}), side * patch
    width = tensors.shape("visual.layer1.0.conv1.weight")[0]
    depths = [_blocks(tensors, rf"visual\.layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4)]
    side = round((tensors.shape("visual.attnpool.positional_embedding")[0] - 1) ** 0.5)
    heads = 32 * width // HEAD_DIM
    return dict(kind="resnet", width=width, depths=depths, num_heads=heads, norm="frozen_batch"), 32 * side


def import_tensors(tensors: Tensors, activation: str, *, head_dim: int = HEAD_DIM, **settings) -> Imported:
    """The CLIP of tensors in this layout; head_dim: of a vision transformer; `settings` are further ones of
    the model."""
    text, (vision, side) = text_model(tensors), vision_model(tensors, head_dim)
    embed_dim = tensors.shape("text_projection")[1]
    model = dict(embed_dim=embed_dim, image_size=side, vision=vision, text=text, activation=activation)
    rows = text_rows(text["depth"]) + leaf("logit_scale", "logit_scale")
    rows += vit_rows(vision["depth"]) if vision["kind"] == "vit" else resnet_rows(vision["depths"])
    config = {"stage": "clip", "model": model | settings}
    clip = tables.read_stage(config, lambda params: rows, tensors, ignored=IGNORED)
    return Imported({"clip": clip}, None, [tensors])


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The CLIP in the archive `source`."""
    return dataclasses.replace(import_tensors(open_tensors(source), "quick_gelu"), licence=OPENAI_LICENCE)

"""OpenAI's CLIP archives (ViT-L-14.pt, RN50.pt, ...): TorchScript, whose tensors alone are read.

Sizes follow from the tensors; heads have 64 entries, and transformers have QuickGELU.
"""

import dataclasses
import re
from pathlib import Path

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats.hf_clip import stage
from dalle2_jax.convert.tables import CONV, BlockNames, Imported, Layout, Row, conv, dense, leaf, norm
from dalle2_jax.convert.tensors import Tensors, open_tensors
from dalle2_jax.models import models

HELP = "OpenAI's CLIP: a .pt archive with a ViT or a ResNet"
LICENCE = "OpenAI's are MIT; of other weights in this layout ask their makers"
HEAD_DIM = 64
BLOCKS = BlockNames(
    norm1="ln_1",
    norm2="ln_2",
    qkv=("attn.in_proj_",),
    out="attn.out_proj",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
)
# A CLIP that was scripted again has the attention mask in every block, and sizes in both towers.
IGNORED = (
    r"(.*\.)?(input_resolution|image_size|patch_size|context_length|vocab_size|attn_mask|num_batches_tracked)"
)
# A parameter [in, out], multiplied from the right as our kernels are.
PLAIN = Layout(lambda x, n: [x], lambda xs: xs[0])


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
    return [
        *leaf("text/token_embedding/embedding", "token_embedding.weight"),
        *leaf("text/position/embedding", "positional_embedding"),
        *BLOCKS.rows("text/transformer", "transformer.resblocks.{}", depth),
        *norm("text/norm_out", "ln_final"),
        *leaf("text/proj/kernel", "text_projection", PLAIN),
    ]


def vit_rows(depth: int) -> list[Row]:
    """The table of a vision transformer."""
    return [
        *leaf("vision/patch_embedding/kernel", "visual.conv1.weight", CONV),
        *leaf("vision/class_token/embedding", "visual.class_embedding"),
        *leaf("vision/position/embedding", "visual.positional_embedding"),
        *norm("vision/norm_pre", "visual.ln_pre"),
        *BLOCKS.rows("vision/transformer", "visual.transformer.resblocks.{}", depth),
        *norm("vision/norm_post", "visual.ln_post"),
        *leaf("vision/proj/kernel", "visual.proj", PLAIN),
    ]


def _batch_norm(ours: str, theirs: str) -> list[Row]:
    return [
        *norm(ours, theirs),
        *leaf(f"{ours}/mean", f"{theirs}.running_mean"),
        *leaf(f"{ours}/var", f"{theirs}.running_var"),
    ]


def resnet_rows(depths: tuple[int, ...]) -> list[Row]:
    """The table of a modified ResNet."""
    rows = []

    def layer(ours, theirs, conv_name, norm_name, number):
        return conv(f"{ours}conv{number}", theirs + conv_name, bias=False) + _batch_norm(
            f"{ours}norm{number}", theirs + norm_name
        )

    for number in (1, 2, 3):
        rows += layer("vision/", "visual.", f"conv{number}", f"bn{number}", number)
    for level, depth in enumerate(depths):
        for block in range(depth):
            ours, theirs = f"vision/stage_{level}_block_{block}/", f"visual.layer{level + 1}.{block}."
            for number in (1, 2, 3):
                rows += layer(ours, theirs, f"conv{number}", f"bn{number}", number)
            if block == 0:
                rows += layer(ours, theirs, "downsample.0", "downsample.1", "_skip")
    pool = "visual.attnpool"
    rows += leaf("vision/pool/position/embedding", f"{pool}.positional_embedding")
    rows += dense("vision/pool/q", f"{pool}.q_proj") + dense("vision/pool/out", f"{pool}.c_proj")
    return rows + dense("vision/pool/kv", f"{pool}.k_proj", f"{pool}.v_proj")


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
    config = stage(model | settings)
    rows = text_rows(text["depth"]) + leaf("logit_scale", "logit_scale")
    rows += vit_rows(vision["depth"]) if vision["kind"] == "vit" else resnet_rows(tuple(vision["depths"]))
    abstract = models.abstract_params(models.build_stage(config))
    params = tables.imported(rows, tensors, abstract, ignored=IGNORED)
    return Imported({"clip": (config, params)}, None, [tensors])


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The CLIP in the archive `source`."""
    return dataclasses.replace(import_tensors(open_tensors(source), "quick_gelu"), licence=LICENCE)

"""GLIDE's checkpoints: base.pt and optionally upsample.pt, or the pair for inpainting, in a folder.

GLIDE has no CLIP and no prior: its decoder reads no image embedding, and each network has its own text
transformer. Sizes follow from the tensors; heads have 64 entries, and the sides are GLIDE's, 64 and 256.
Sampling settings are those of its notebooks: 100 steps and guidance 3 at 64 x 64, 27 selected steps above.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats.karlo_original import BLOCKS
from dalle2_jax.convert.formats.unet import adm_rows, adm_settings, check_groups, known_apart
from dalle2_jax.convert.tables import Imported, Row, dense, leaf, norm, per_head, under
from dalle2_jax.convert.tensors import Tensors, open_tensors
from dalle2_jax.models import models

HELP = "GLIDE's checkpoints, a folder with base*.pt and optionally upsample*.pt; needs --tokenizer"
LICENCE = "OpenAI's are MIT; of other weights in this layout ask their makers"
HEAD_DIM = 64
SIDES = (64, 256)
TOKENIZER = (
    "give the folder of their encoder.json.gz and vocab.bpe.gz (glide_text2im/tokenizer) as "
    "--tokenizer=FOLDER"
)


def rows(net: Mapping) -> list[Row]:
    """The table of either network; `net`: our shapes."""
    depth = sum(name.startswith("block_") for name in net["text_net"]["transformer"])
    transformer = BLOCKS.rows("transformer", "transformer.resblocks.{}", depth, per_head(3, HEAD_DIM))
    return [
        *under("net", adm_rows(net["net"], HEAD_DIM)),
        *dense("time/fc1", "time_embed.0"),
        *dense("time/fc2", "time_embed.2"),
        *dense("text_emb_proj", "transformer_proj"),
        *leaf("text_net/token_embedding/embedding", "token_embedding.weight"),
        *leaf("text_net/position/embedding", "positional_embedding"),
        *leaf("text_net/padding/embedding", "padding_embedding"),
        *under("text_net", transformer + norm("norm_out", "final_ln")),
    ]


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The cascade in the folder `source`; the tokenizer is GLIDE's, which is not among these files."""
    if tokenizer is None or tokenizer.kind != "gpt2":
        found = "without a tokenizer" if tokenizer is None else "with another tokenizer than CLIP's"
        raise ValueError(f"{source} comes {found}: {TOKENIZER}")
    files = {role: _only(source, role) for role in ("base", "upsample")}
    opened = {role: open_tensors(path) for role, path in files.items() if path}
    if "base" not in opened:
        raise FileNotFoundError(f"{source} is to be a folder with one file base*.pt, which it does not hold")
    stages = {"decoder": _stage(opened["base"], "decoder")}
    if "upsample" in opened:
        stages[f"upsampler{SIDES[1]}"] = _stage(opened["upsample"], "upsampler")
    return Imported(stages, None, list(opened.values()), LICENCE)


def _only(source: Path, role: str) -> Path | None:
    found = sorted(source.glob(f"{role}*.pt")) if source.is_dir() else []
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{source} holds {names}: give a folder with the pair that you want")
    return found[0] if found else None


def _stage(tensors: Tensors, stage: str) -> tuple[dict, dict]:
    low_res, channels = stage == "upsampler", tensors.shape("input_blocks.0.0.weight")[1]
    plain = 6 if low_res else 3
    if channels not in (plain, plain + 4):
        raise ValueError(
            f"{tensors.source} has {channels} input channels: a network of this role has {plain}, or "
            f"{plain + 4} for repainting"
        )
    inpaint = channels == plain + 4
    if inpaint:
        tensors = known_apart(tensors, low_res)
    settings, attending = adm_settings(tensors)
    vocab_size, width = tensors.shape("token_embedding.weight")
    side = SIDES[low_res]
    model = settings | dict(
        image_size=side,
        attention_resolutions=[side // 2**level for level in attending],
        head_dim=HEAD_DIM,
        text=dict(
            vocab_size=vocab_size,
            context_length=tensors.shape("positional_embedding")[0],
            width=width,
            depth=sum(name.endswith(".attn.c_qkv.weight") for name in tensors.shapes),
            num_heads=width // HEAD_DIM,
        ),
        inpaint=inpaint,
        learned_variance=True,
    )
    if low_res:
        how = dict(method="ddpm" if inpaint else "ddim", num_steps=27, spacing="fast27")
        model |= how | dict(low_res_size=SIDES[0], resize="linear", schedule="linear")
    else:
        model |= dict(embed_dim=0, schedule="cosine", text_drop=0.2, num_steps=100, guidance_scale=3.0)
    config = {"stage": stage, "model": model}
    abstract = models.abstract_params(models.build_stage(config))
    check_groups(abstract["net"], 32, tensors.source)
    # Their network has one convolution and one bias for the noised picture and the kept pixels.
    bias = np.zeros(abstract["net"]["conv_in"]["bias"].shape, np.float32)
    leaves = {"net/conv_in_known/bias": bias} if inpaint else {}
    return config, tables.imported(rows(abstract), tensors, abstract, leaves=leaves)

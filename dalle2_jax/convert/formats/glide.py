"""GLIDE's checkpoints: base.pt and optionally upsample.pt, or the pair for inpainting, in a folder.

GLIDE has no CLIP and no prior: its decoder reads no image embedding, and each network has a text
transformer. Sizes follow from the tensors; heads have 64 entries, and the sides are GLIDE's, 64 and 256.
Sampling settings are those of its notebooks: 100 steps and guidance 3 at 64 x 64, 27 selected steps above.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle2_jax.convert.formats.karlo_original import BLOCKS
from dalle2_jax.convert.formats.unet import HEAD_DIM, adm_rows, adm_settings, read_stage, split_inpaint_input
from dalle2_jax.convert.tables import OPENAI_LICENCE, Imported, Row, dense, leaf, norm, regrouped, under
from dalle2_jax.convert.tensors import Tensors, open_tensors

HELP = "GLIDE's checkpoints, a folder with base*.pt and optionally upsample*.pt; needs --tokenizer"
SIDES = (64, 256)
TOKENIZER = (
    "give the folder of their encoder.json.gz and vocab.bpe.gz (glide_text2im/tokenizer) as "
    "--tokenizer=FOLDER"
)


def rows(params: Mapping) -> list[Row]:
    """The table of either network; `params`: our shapes."""
    depth = sum(name.startswith("block_") for name in params["text_net"]["transformer"])
    text = BLOCKS.rows("transformer", "transformer.resblocks.{}", depth, regrouped(3, HEAD_DIM))
    text += leaf("token_embedding/embedding", "token_embedding.weight")
    text += leaf("position/embedding", "positional_embedding") + norm("norm_out", "final_ln")
    text += leaf("padding/embedding", "padding_embedding")
    return adm_rows(params) + dense("text_emb_proj", "transformer_proj") + under("text_net", text)


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The cascade in the folder `source`; the tokenizer is GLIDE's, which is not among these files."""
    if tokenizer is None or tokenizer.kind != "gpt2":
        found = "without a tokenizer" if tokenizer is None else "with another tokenizer than CLIP's"
        raise ValueError(f"{source} comes {found}: {TOKENIZER}")
    files = {role: _only(source, role) for role in ("base", "upsample")}
    opened = {role: open_tensors(path) for role, path in files.items() if path}
    if "base" not in opened:
        raise FileNotFoundError(f"{source} must be a folder with one file base*.pt")
    stages = {"decoder": _stage(opened["base"], "decoder")}
    if "upsample" in opened:
        stages[f"upsampler{SIDES[1]}"] = _stage(opened["upsample"], "upsampler")
    return Imported(stages, None, list(opened.values()), OPENAI_LICENCE)


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
        expected = f"a network of this role has {plain}, or {plain + 4} for repainting"
        raise ValueError(f"{tensors.source} has {channels} input channels: {expected}")
    inpaint = channels == plain + 4
    if inpaint:
        tensors = split_inpaint_input(tensors, low_res)
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
        model |= how | dict(low_res_size=SIDES[0], crop_size=side, resize="linear", schedule="linear")
        model |= dict(process=dict(noise_scale=0.997))
    else:
        model |= dict(embed_dim=0, schedule="cosine", text_drop=0.2, guidance_scale=3.0)
        model |= dict(num_steps=100, spacing="adm")
    # Their network has one convolution and one bias for the noised picture and the kept pixels.
    bias = np.zeros(settings["channels"], np.float32)
    leaves = {"net/conv_in_known/bias": bias} if inpaint else {}
    return read_stage({"stage": stage, "model": model}, rows, tensors, leaves=leaves)

"""OpenCLIP's models with CLIP's architecture: OpenAI's layout, in safetensors or an archive.

The source is a folder of the hub with open_clip_config.json, or a file of weights such as a training
checkpoint. In a folder, transformers' files of the same model may lie beside OpenCLIP's. Transformers have
exact GELU unless open_clip_config.json has `quick_gelu`; without that config, GELU is assumed. A folder's
tokenizer is read if it is in CLIP's layout.
"""

import dataclasses
from pathlib import Path

from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.formats.openai_clip import HEAD_DIM, import_tensors
from dalle2_jax.convert.tables import Imported
from dalle2_jax.convert.tensors import OPEN_CLIP_WEIGHTS, WEIGHTS, Tensors, open_tensors
from dalle2_jax.data.tokenizer import load_tokenizer

HELP = "OpenCLIP: a folder with open_clip_config.json, or a file of weights, also a checkpoint of training"
CONFIG = "open_clip_config.json"


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The CLIP in a folder or a file. Raises ValueError for towers of other architectures."""
    folder = source if source.is_dir() else source.parent
    settings = _settings(folder / CONFIG) if (folder / CONFIG).is_file() else {"activation": "gelu"}
    tensors = _opened(source)
    if not (folder / CONFIG).is_file():
        tensors.notes += (f"{CONFIG}, which may name quick_gelu, is absent: GELU is assumed",)
    read = import_tensors(tensors, **settings)
    if tokenizer is None and source.is_dir() and _has_tokenizer(source):
        length = read.stages["clip"][0]["model"]["text"]["context_length"]
        read = dataclasses.replace(read, tokenizer=load_tokenizer(source, length))
    return read


def _opened(source: Path) -> Tensors:
    tensors = open_tensors(source, (*OPEN_CLIP_WEIGHTS, *WEIGHTS))
    if "text_model.embeddings.token_embedding.weight" in tensors.shapes:
        raise ValueError(f"{tensors.source} is in transformers' layout: convert it as hf-clip")
    if "text.token_embedding.weight" in tensors.shapes:  # `custom_text`: a separate text module
        tensors = tensors.renamed({name.removeprefix("text."): name for name in tensors.shapes})
    return tensors


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _settings(path: Path) -> dict:
    """The settings in open_clip_config.json that do not follow from tensors; ValueError for other towers."""
    config = read_json(path)
    described, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    vision, text = described.get("vision_cfg", {}), described.get("text_cfg", {})
    # settings of a tower, and the values with which it has CLIP's architecture
    same = {
        "timm_model_name": (None, ""),
        "hf_model_name": (None, ""),
        "head_width": (None, HEAD_DIM),
        "mlp_ratio": (None, 4, 4.0),
        "heads": (None, text.get("width", 512) // HEAD_DIM),
        "ls_init_value": (None,),
        "no_causal_mask": (None, False),
        "pool_type": (None, "tok", "argmax"),
        "attentional_pool": (None, False),
        "no_ln_pre": (None, False),
        "final_ln_after_pool": (None, False),
        "pos_embed_type": (None, "learnable"),
        "act_kwargs": (None, {}),
        "norm_kwargs": (None, {}, {"eps": 1e-5}),
    }
    for part, settings in (("vision_cfg", vision), ("text_cfg", text)):
        any_width = ("head_width", "mlp_ratio") if part == "vision_cfg" else ()
        for name, allowed in same.items():
            if settings.get(name) not in allowed and name not in any_width:
                raise ValueError(
                    f"{path}: {part}.{name} is {settings[name]!r}: only CLIP's architecture is read, "
                    f"its text with heads of {HEAD_DIM} and MLPs of four times the width"
                )
    named = {"image_mean": "mean", "image_std": "std"}
    statistics = {ours: list(preprocess[name]) for ours, name in named.items() if name in preprocess}
    return dict(
        activation="quick_gelu" if described.get("quick_gelu") else "gelu",
        head_dim=vision.get("head_width") or HEAD_DIM,
        **statistics,
    )

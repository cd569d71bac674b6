"""OpenCLIP's models that have CLIP's own architecture: OpenAI's layout, in safetensors or an archive.

Transformers have exact GELU unless open_clip_config.json says `quick_gelu`; a file without that config beside
it is taken to have GELU.
"""

from pathlib import Path

from dalle2_jax.formats.hf_clip import read_json
from dalle2_jax.formats.openai_clip import HEAD_DIM, import_tensors
from dalle2_jax.formats.tables import Imported
from dalle2_jax.formats.tensors import open_tensors

HELP = "OpenCLIP: a folder with open_clip_config.json, or its file of weights"


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The CLIP in a folder or a file. Raises ValueError for towers that CLIP does not have."""
    path = (source if source.is_dir() else source.parent) / "open_clip_config.json"
    if not path.is_file():
        return import_tensors(open_tensors(source), "gelu")
    config = read_json(path)
    described, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    vision, text = described.get("vision_cfg", {}), described.get("text_cfg", {})
    # what a tower may say of itself, and the values that leave it CLIP's
    same = {
        "timm_model_name": (None, ""),
        "hf_model_name": (None, ""),
        "head_width": (None, HEAD_DIM),
        "mlp_ratio": (None, 4, 4.0),
        "heads": (None, text.get("width", 512) // HEAD_DIM),
        "ls_init_value": (None,),
        "no_causal_mask": (None, False),
        "pool_type": (None, "tok", "argmax"),
    }
    for part, settings in (("vision_cfg", vision), ("text_cfg", text)):
        any_width = ("head_width", "mlp_ratio") if part == "vision_cfg" else ()
        for name, allowed in same.items():
            if settings.get(name) not in allowed and name not in any_width:
                raise ValueError(
                    f"{path}: {part}.{name} is {settings[name]!r}: only CLIP's own architecture is read, "
                    f"its text with heads of {HEAD_DIM} and MLPs of four times the width"
                )
    named = {"image_mean": "mean", "image_std": "std"}
    statistics = {ours: list(preprocess[name]) for ours, name in named.items() if name in preprocess}
    activation = "quick_gelu" if described.get("quick_gelu") else "gelu"
    head_dim = vision.get("head_width") or HEAD_DIM
    return import_tensors(open_tensors(source), activation, head_dim=head_dim, **statistics)

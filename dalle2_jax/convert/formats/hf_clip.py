"""Hugging Face's CLIPModel: a folder with config.json, model.safetensors and a tokenizer. Both ways.

The towers may also have separate folders (CLIPTextModelWithProjection, CLIPVisionModelWithProjection), as in
pipelines of diffusers.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.convert import tables
from dalle2_jax.convert.tables import CONV, BlockNames, Imported, Row, dense, leaf, norm, under
from dalle2_jax.convert.tensors import Tensors, joined, open_tensors
from dalle2_jax.data.tokenizer import load_tokenizer

HELP = "a folder of transformers' CLIPModel"
BLOCKS = BlockNames(
    norm1="layer_norm1",
    norm2="layer_norm2",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
IGNORED = r".*\.position_ids"
# exp(logit_scale) for towers without one: the maximum of OpenAI's training.
MAX_SCALE = 100.0


def text_rows(depth: int) -> list[Row]:
    """The table of a text tower."""
    rows = leaf("token_embedding/embedding", "embeddings.token_embedding.weight")
    rows += leaf("position/embedding", "embeddings.position_embedding.weight")
    rows += BLOCKS.rows("transformer", "encoder.layers.{}", depth) + norm("norm_out", "final_layer_norm")
    return under("text", rows, "text_model.") + dense("text/proj", "text_projection", bias=False)


def vision_rows(depth: int) -> list[Row]:
    """The table of an image tower."""
    rows = leaf("patch_embedding/kernel", "embeddings.patch_embedding.weight", CONV)
    rows += leaf("class_token/embedding", "embeddings.class_embedding")
    rows += leaf("position/embedding", "embeddings.position_embedding.weight")
    rows += norm("norm_pre", "pre_layrnorm") + norm("norm_post", "post_layernorm")  # their spelling
    rows += BLOCKS.rows("transformer", "encoder.layers.{}", depth)
    return under("vision", rows, "vision_model.") + dense("vision/proj", "visual_projection", bias=False)


def rows(model: dict) -> list[Row]:
    """The table of a CLIPModel."""
    towers = [*text_rows(model["text"]["depth"]), *vision_rows(model["vision"]["depth"])]
    return towers + leaf("logit_scale", "logit_scale")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _transformer(settings: dict, where: str) -> dict:
    """width, depth, num_heads, mlp_width of a tower. Raises ValueError for values that ours do not have."""
    usual_width, usual_heads = (512, 8) if where == "text_config" else (768, 12)
    width = settings.get("hidden_size", usual_width)
    mlp, epsilon = settings.get("intermediate_size", 4 * usual_width), settings.get("layer_norm_eps", 1e-5)
    if mlp != 4 * width and where == "text_config":
        raise ValueError(f"{where}.intermediate_size is {mlp}: only 4 * hidden_size ({4 * width}) is built")
    if not math.isclose(epsilon, 1e-5):
        raise ValueError(f"{where}.layer_norm_eps is {epsilon}: only 1e-5 is built")
    depth, heads = settings.get("num_hidden_layers", 12), settings.get("num_attention_heads", usual_heads)
    wider = {} if mlp == 4 * width else {"mlp_width": mlp}
    return dict(width=width, depth=depth, num_heads=heads) | wider


def text_model(settings: dict) -> dict:
    """Our settings of a text tower."""
    return dict(
        vocab_size=settings.get("vocab_size", 49408),
        context_length=settings.get("max_position_embeddings", 77),
        **_transformer(settings, "text_config"),
    )


def vision_model(settings: dict) -> dict:
    """Our settings of an image tower."""
    patch = settings.get("patch_size", 32)
    return dict(kind="vit", patch_size=patch, **_transformer(settings, "vision_config"))


def _activation(*settings: dict) -> str:
    named = {part.get("hidden_act", "quick_gelu") for part in settings}
    if len(named) > 1 or not named <= {"gelu", "quick_gelu"}:
        raise ValueError(f"hidden_act {sorted(named)}: both towers need 'quick_gelu' or both 'gelu'")
    return named.pop()


def _image_statistics(folder: Path) -> dict:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    return {name: list(found[name]) for name in ("image_mean", "image_std") if name in found}


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The CLIP in the folder `source`."""
    config = read_json(source / "config.json")
    if config.get("model_type") != "clip" or "vision_config" not in config:
        kind = f"a {config.get('model_type')!r} of {config.get('architectures')}"
        raise ValueError(f"{source} holds {kind}, not a CLIPModel")
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    model = dict(
        embed_dim=config.get("projection_dim", 512),
        image_size=vision.get("image_size", 224),
        vision=vision_model(vision),
        text=text_model(text),
        activation=_activation(text, vision),
        **_image_statistics(source),
    )
    tensors = open_tensors(source)
    config = {"stage": "clip", "model": model}
    clip = tables.read_stage(config, lambda params: rows(model), tensors, ignored=IGNORED)
    return Imported({"clip": clip}, tokenizer or load_tokenizer(source), [tensors])


def import_towers(text: Path, vision: Path | None, **model) -> tuple[tuple[dict, Any], Tensors]:
    """((config, parameters), their source) of a CLIP with a folder for each tower.

    vision: None: no image tower. model: further settings.
    """
    configs, files = [read_json(text / "config.json")], {"text.": open_tensors(text)}
    sizes = dict(embed_dim=configs[0].get("projection_dim", 512), image_size=1)
    model = sizes | dict(text=text_model(configs[0]), vision=None) | model
    if vision is not None:
        configs.append(read_json(vision / "config.json"))
        model |= dict(vision=vision_model(configs[1]), image_size=configs[1].get("image_size", 224))
        files["vision."] = open_tensors(vision)
    model["activation"] = _activation(*configs)
    both = joined(files)
    config, ignored = {"stage": "clip", "model": model}, r"(text|vision)\." + IGNORED
    scale = {"logit_scale": np.float32(math.log(MAX_SCALE))}
    rows = tower_rows(model)
    return tables.read_stage(config, lambda params: rows, both, leaves=scale, ignored=ignored), both


def tower_rows(model: dict) -> list[Row]:
    """The table of towers in separate folders; names of the text tower begin with text."""
    vision = vision_rows(model["vision"]["depth"]) if model["vision"] else []
    return under("", text_rows(model["text"]["depth"]), "text.") + under("", vision, "vision.")


def _tower_config(part: dict, activation: str, embed_dim: int) -> dict:
    return dict(
        hidden_size=part["width"],
        intermediate_size=part.get("mlp_width") or 4 * part["width"],
        num_hidden_layers=part["depth"],
        num_attention_heads=part["num_heads"],
        hidden_act=activation,
        layer_norm_eps=1e-5,
        projection_dim=embed_dim,
    )


def text_config(model: dict) -> dict:
    """transformers' config of a text tower."""
    text, vocab = model["text"], model["text"]["vocab_size"]
    return _tower_config(text, model["activation"], model["embed_dim"]) | dict(
        model_type="clip_text_model",
        vocab_size=vocab,
        max_position_embeddings=text["context_length"],
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=0,
    )


def vision_config(model: dict) -> dict:
    """transformers' config of an image tower."""
    return _tower_config(model["vision"], model["activation"], model["embed_dim"]) | dict(
        model_type="clip_vision_model",
        image_size=model["image_size"],
        patch_size=model["vision"]["patch_size"],
        num_channels=3,
    )


def settings_files(model: dict) -> dict[str, dict]:
    """{file: JSON value} of a CLIPModel's folder."""
    settings = dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=model["embed_dim"],
        text_config=text_config(model),
        vision_config=vision_config(model),
    )
    return {"config.json": settings, "preprocessor_config.json": preprocessor(model)}


def preprocessor(model: dict) -> dict:
    """transformers' settings of the preparation of pictures for the image tower."""
    side = model["image_size"]
    return dict(
        image_processor_type="CLIPImageProcessor",
        crop_size=dict(height=side, width=side),
        size=dict(shortest_edge=side),
        do_resize=True,
        do_center_crop=True,
        do_rescale=True,
        do_normalize=True,
        resample=3,
        rescale_factor=1 / 255,
        image_mean=model["image_mean"],
        image_std=model["image_std"],
    )

"""A model directory with random weights, small enough to sample from in a second."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np

from dalle2_jax.data.tokenizer import train_bpe
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir

CAPTIONS = [
    "a red star above a blue ring",
    "a yellow circle",
    "a drawing of a green cross left of a purple square",
]
RECIPES = {"clip": "clip", "prior": "prior", "decoder": "decoder64", "upsampler32": "upsampler256"}
# Less than the presets have, so that a stage compiles in a few seconds.
SMALLER = {
    "decoder": dict(image_size=8, channel_mult=[1], attention_resolutions=[8]),
    "upsampler32": dict(image_size=32, low_res_size=8, crop_size=8, channel_mult=[1]),
}


CLASSIFIER = dict(
    num_classes=3,
    image_size=8,
    channels=16,
    channel_mult=[1],
    num_res_blocks=1,
    attention_resolutions=[8],
    head_dim=16,
)

# What `make_model(extended=True)` has besides, and instead of the diffusion prior.
EXTENDED = {"prior": "ar_prior", "noisy_clip": "clip"}


def configs(extended: bool = False) -> dict[str, dict]:
    """Stage -> the `debug` preset of its recipe, made smaller: 8 x 8, one upsampler to 32 x 32."""
    made = {}
    for folder, recipe in (RECIPES | (EXTENDED if extended else {})).items():
        config = importlib.import_module(f"configs.{recipe}").get_config("debug")
        made[folder] = json.loads(json.dumps(models.to_plain(config)))
        made[folder]["model"] |= SMALLER.get(folder, {})
    if extended:
        vision = dict(kind="vit", patch_size=4, width=32, depth=1, num_heads=2)
        made["noisy_clip"]["model"] |= dict(image_size=8, vision=vision, noise=dict(schedule="cosine"))
        made["classifier"] = json.loads(json.dumps(made["clip"])) | {
            "stage": "classifier",
            "model": CLASSIFIER,
        }
        made["classifier"]["data"]["classes"] = ["red star", "blue ring", "yellow circle"]
    return made


def random_params(stage, seed: int) -> dict:
    """Random float32 parameters with the shapes of `init`, none of them zero; nothing is compiled."""
    draw = np.random.default_rng(seed)

    def one(path, leaf):
        noise = np.asarray(draw.standard_normal(leaf.shape), np.float32)
        if path[-1].key == "scale":
            return np.float32(1) + np.float32(0.1) * noise
        return (
            noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
            if leaf.ndim > 1
            else np.float32(0.1) * noise
        )

    return jax.tree_util.tree_map_with_path(one, models.abstract_params(stage))


def tokenizer():
    """A byte-level BPE trained on CAPTIONS, of the size that the recipes expect."""
    return train_bpe(CAPTIONS * 4, vocab_size=512, context_length=32)


def make_model(directory: Path, dtype: str = "float32", extended: bool = False) -> Path:
    """Write the model directory; returns `directory`. `extended`: see EXTENDED; with a classifier too."""
    made = configs(extended)
    for seed, (folder, config) in enumerate(made.items()):
        stage = models.build_stage(config)
        modeldir.save_stage(directory / folder, config, random_params(stage, seed), dtype)
    tokenizer().save(directory / "tokenizer")
    stages = {name: name for name in made}
    modeldir.write_index(directory, stages, tokenizer="tokenizer", extra={"name": "tiny"})
    return directory


def make_class_model(directory: Path, classes: tuple[str, ...] = (), guide: bool = False, **model) -> Path:
    """Write a model directory of a decoder alone, 8 x 8, as ADM's: of classes, or of nothing; no CLIP.

    guide: with a classifier of three classes. model: further settings of the decoder.
    """
    config = configs()["decoder"]
    config["model"] |= dict(
        embed_dim=0, text=None, num_classes=len(classes), text_drop=0.0, image_drop=0.0, num_steps=2, **model
    )
    config["data"] = {"classes": list(classes)}
    modeldir.save_stage(directory / "decoder", config, random_params(models.build_stage(config), 0))
    stages = {"decoder": "decoder"} | ({"classifier": "classifier"} if guide else {})
    if guide:
        config = configs(extended=True)["classifier"]
        params = random_params(models.build_stage(config), 1)
        modeldir.save_stage(directory / "classifier", config, params)
    modeldir.write_index(directory, stages, extra={"name": "classes"})
    return directory

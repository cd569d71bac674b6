"""A model directory with random weights, small enough to sample from in a second."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import modeldir, models
from dalle2_jax.data.tokenizer import train_bpe

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


def configs() -> dict[str, dict]:
    """Stage -> the `debug` preset of its recipe, made smaller: 8 x 8, one upsampler to 32 x 32."""
    made = {}
    for folder, recipe in RECIPES.items():
        config = importlib.import_module(f"configs.{recipe}").get_config("debug")
        made[folder] = json.loads(json.dumps(models.to_plain(config)))
        made[folder]["model"] |= SMALLER.get(folder, {})
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


def make_model(directory: Path, dtype: str = "float32") -> Path:
    """Write the model directory; returns `directory`."""
    for seed, (folder, config) in enumerate(configs().items()):
        stage = models.build_stage(config)
        modeldir.save_stage(directory / folder, config, random_params(stage, seed), dtype)
    tokenizer().save(directory / "tokenizer")
    stages = {name: name for name in ("clip", "prior", "decoder")} | {"upsamplers": ["upsampler32"]}
    modeldir.write_index(directory, stages, extra={"name": "tiny"})
    return directory

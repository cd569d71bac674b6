"""The dataset `scenes` as a tensorflow-datasets builder: drawn on this machine, nothing is downloaded.

A config is a preset of the grammar at one picture size, such as 'quickstart_64'; example i of a split is
`scenes.sample_scene(preset, split, i)`, in that order, so pictures of one scene at different sizes agree.
`caption` and `caption_zh` are the plain wordings, `captions` and `captions_zh` all of them, `scene` is
`Scene.to_json()`. This module imports TensorFlow; `scenes` does not.
"""

import dataclasses
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dalle2_jax.data import scenes

# Examples in each of validation, test_pairs and test_relations, where a config says nothing else.
HELD_OUT_EXAMPLES = 512


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """`preset` of `scenes` at `image_size`, `num_examples` to train on, `num_held_out` in each split else."""

    preset: str = ""
    image_size: int = 0
    num_examples: int = 0
    num_held_out: int = HELD_OUT_EXAMPLES


def _config(
    preset: str, image_size: int, num_examples: int, num_held_out: int = HELD_OUT_EXAMPLES, name: str = ""
) -> ScenesConfig:
    return ScenesConfig(
        name=name or f"{preset}_{image_size}",
        description=f"preset {preset!r} at {image_size} x {image_size}",
        preset=preset,
        image_size=image_size,
        num_examples=num_examples,
        num_held_out=num_held_out,
    )


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Captioned drawings of one to three objects."""

    VERSION = tfds.core.Version("4.1.0")  # changes when a preset or the renderer does
    BUILDER_CONFIGS = [
        _config("quickstart", 64, 20_000),
        _config("quickstart", 256, 2_000, 128),
        _config("quickstart", 1024, 500, 32),
        _config("full", 64, 100_000),
        _config("full", 256, 100_000),
        _config("full", 1024, 10_000),
        _config("quickstart", 64, 64, 64, name="debug_64"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": text,
                    "caption_zh": text,
                    "captions": tfds.features.Sequence(text),
                    "captions_zh": tfds.features.Sequence(text),
                    "scene": text,
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        count = self.builder_config.num_examples
        return {
            split: self._generate_examples(
                split, count if split == "train" else self.builder_config.num_held_out
            )
            for split in scenes.SPLITS
        }

    def _generate_examples(self, split: str, count: int):
        config = scenes.preset(self.builder_config.preset)
        for index in range(count):
            scene = scenes.sample_scene(config, split, index)
            english, chinese = scenes.captions(scene, "en"), scenes.captions(scene, "zh")
            yield (
                index,
                {
                    "image": encode_png(scenes.render(scene, self.builder_config.image_size)),
                    "caption": english[0],
                    "caption_zh": chinese[0],
                    "captions": english,
                    "captions_zh": chinese,
                    "scene": scene.to_json(),
                },
            )


def encode_png(image: np.ndarray) -> io.BytesIO:
    """A picture uint8 [H, W, 3] as a PNG, packed for speed rather than size."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    file.seek(0)
    return file

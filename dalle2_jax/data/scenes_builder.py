"""The dataset `scenes` as TFRecord files, drawn on this machine.

A config is a preset of the grammar at one picture size, such as 'quickstart_64'; example i of a split is
`scenes.sample_scene(preset, split, i)`, so pictures of one scene at different sizes agree. `caption` and
`caption_zh` are the plain wordings, `captions` and `captions_zh` all of them, `scene` is `Scene.to_json()`.
Files and descriptions are the ones that tensorflow-datasets would write, which can read them.
"""

import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from dalle2_jax.data import examples, scenes

VERSION = "4.1.0"  # changes when a preset or the renderer does
HELD_OUT_EXAMPLES = 512  # in each of validation, test_pairs and test_relations, by default
_MIN_SHARD_BYTES = 64 << 20  # tensorflow-datasets' rule; no split comes near its largest shard, 1 GiB
_OVERHEAD_BYTES = 16  # of a record in a TFRecord file: its length and two checksums


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """A preset of `scenes` at `image_size`, with `num_examples` in train and `num_held_out` in other
    splits."""

    preset: str
    image_size: int
    num_examples: int
    num_held_out: int = HELD_OUT_EXAMPLES
    name: str = ""


CONFIGS = {
    config.name or f"{config.preset}_{config.image_size}": config
    for config in (
        ScenesConfig("quickstart", 64, 20_000),
        ScenesConfig("quickstart", 256, 2_000, 128),
        ScenesConfig("quickstart", 1024, 500, 32),
        ScenesConfig("uneven", 64, 20_000),
        ScenesConfig("complete", 64, 20_000),
        ScenesConfig("full", 64, 100_000),
        ScenesConfig("full", 256, 100_000),
        ScenesConfig("full", 1024, 10_000),
        ScenesConfig("quickstart", 64, 64, 64, name="debug_64"),
        ScenesConfig("quickstart", 256, 64, 64, name="debug_256"),
    )
}


def write(name: str, folder: str) -> None:
    """Draw the config `name` into `folder`, which exists and is empty."""
    splits = []
    for split in scenes.SPLITS:
        lengths, num_bytes = _write_split(CONFIGS[name], split, folder)
        entry = {"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "name": split}
        splits.append(entry | {"numBytes": str(num_bytes), "shardLengths": list(map(str, lengths))})
    size = CONFIGS[name].image_size
    info = {
        "configDescription": f"preset {CONFIGS[name].preset!r} at {size} x {size}",
        "configName": name,
        "disableShuffling": True,
        "fileFormat": "tfrecord",
        "moduleName": "dalle2_jax.data.scenes_builder",
        "name": "scenes",
        "splits": splits,
        "version": VERSION,
    }
    for file, content, indent in (("features.json", _features(size), 4), ("dataset_info.json", info, 2)):
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            json.dump(content, out, indent=indent, sort_keys=True)


def _features(size: int) -> dict:
    """The features' types, in tensorflow-datasets' format."""

    def feature(name: str, key: str, content: dict) -> dict:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", key: content}

    text = feature("text_feature.Text", "text", {})
    texts = feature("sequence_feature.Sequence", "sequence", {"feature": text, "length": "-1"})
    shape = {"dimensions": [str(size), str(size), "3"]}
    image = {"dtype": "uint8", "encodingFormat": "png", "shape": shape}
    features = {"caption": text, "caption_zh": text, "captions": texts, "captions_zh": texts, "scene": text}
    features["image"] = feature("image_feature.Image", "image", image)
    return feature("features_dict.FeaturesDict", "featuresDict", {"features": features})


def _write_split(config: ScenesConfig, split: str, folder: str) -> tuple[list[int], int]:
    """Write the shards of a split. Returns (their numbers of records, the bytes of all records)."""
    ends, partial = [0], os.path.join(folder, f"{split}.partial")
    with open(partial, "wb") as file:  # the number of shards, in their names, follows from its size
        for example in examples_of(config, split):
            ends.append(ends[-1] + file.write(examples.tfrecord(examples.serialize(example))))
    count = len(ends) - 1
    num_shards = _num_shards(ends[-1], count)
    firsts = [round(count * shard / num_shards) for shard in range(num_shards + 1)]
    with open(partial, "rb") as file:
        for shard, (first, last) in enumerate(itertools.pairwise(firsts)):
            name = f"scenes-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"
            with open(os.path.join(folder, name), "wb") as out:
                _copy(file, out, ends[last] - ends[first])
    os.remove(partial)
    lengths = [last - first for first, last in itertools.pairwise(firsts)]
    return lengths, ends[-1] - count * _OVERHEAD_BYTES


def _copy(file, out, size: int) -> None:
    """Copy the next `size` bytes of one file to another."""
    while size:
        data = file.read(min(size, 1 << 20))
        if not data:
            raise EOFError(f"{file.name} was cut while its shards were written")
        size -= out.write(data)


def _num_shards(num_bytes: int, count: int) -> int:
    """tensorflow-datasets' number of shards: a power of two up to 1024, each of at least 64 MiB."""
    most = max(1, min(num_bytes // _MIN_SHARD_BYTES, count))
    return min(1024, 1 << most.bit_length() - 1)


def examples_of(config: ScenesConfig, split: str) -> Iterator[dict[str, list[bytes]]]:
    """Yield {field: values} of the examples of a split."""
    preset = scenes.preset(config.preset)
    for index in range(config.num_examples if split == "train" else config.num_held_out):
        scene = scenes.sample_scene(preset, split, index)
        english, chinese = (
            [text.encode() for text in scenes.captions(scene, language)] for language in ("en", "zh")
        )
        yield {
            "image": [encode_png(scenes.render(scene, config.image_size))],
            "caption": english[:1],
            "caption_zh": chinese[:1],
            "captions": english,
            "captions_zh": chinese,
            "scene": [scene.to_json().encode()],
        }


def encode_png(image: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3] as a PNG, compressed fast."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return file.getvalue()

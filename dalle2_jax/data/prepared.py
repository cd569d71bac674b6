"""Datasets that tensorflow-datasets prepares: our own scenes, and any with an image and a caption.

The prepared TFRecord files are read through our own index, not through tf.data, so that any record is one
`pread` away.
"""

import contextlib
import fcntl
import os
import re

from absl import logging

from dalle2_jax.data import records
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.data.shards import ExampleSource, language_of


@contextlib.contextmanager
def locked(path: str):
    """Hold an exclusive lock on the file `path`; a process that dies lets go of it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process to finish with %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tfds_fields(features, image_field: str, caption_field: str, name: str) -> tuple[str, dict[str, str]]:
    """(image field, {caption field: language}) of a tfds dataset, given or detected by type and name."""
    import tensorflow_datasets as tfds

    flat = {}

    def walk(feature, path):
        if isinstance(feature, tfds.features.FeaturesDict):
            for key, value in feature.items():
                walk(value, f"{path}/{key}" if path else key)
        elif isinstance(feature, tfds.features.Sequence):
            walk(feature.feature, path)
        else:
            flat[path] = feature

    walk(features, "")
    images = [path for path, feature in flat.items() if isinstance(feature, tfds.features.Image)]
    texts = [path for path, feature in flat.items() if isinstance(feature, tfds.features.Text)]
    if image_field and image_field not in images:
        raise ValueError(
            f"tfds {name} has no image field {image_field!r}" + did_you_mean(image_field, images)
        )
    if caption_field and caption_field not in texts:
        raise ValueError(
            f"tfds {name} has no text field {caption_field!r}" + did_you_mean(caption_field, texts)
        )
    if not image_field and len(images) != 1:
        raise ValueError(f"tfds {name}: give data.image_field, one of its image fields {images}")
    captions = {path: language_of(path) for path in texts if language_of(path)}
    if caption_field:
        captions = {caption_field: language_of(caption_field) or "en"}
    if not captions:
        raise ValueError(f"tfds {name}: give data.caption_field, one of its text fields {texts}")
    return image_field or images[0], captions


def _open_builder(builder, split: str, image_field: str, caption_field: str, name: str) -> ExampleSource:
    """The records of one split of a prepared tfds builder whose files are TFRecords."""
    info = builder.info
    base = re.split(r"[\[+]", split)[0]
    if base not in info.splits:
        raise ValueError(f"{name} has no split {split!r}" + did_you_mean(base, info.splits))
    if info.file_format.value != "tfrecord":
        raise ValueError(
            f"{name} in {builder.data_dir} is stored as {info.file_format.value}; prepare it as TFRecord: "
            "`tfds build --file_format=tfrecord`"
        )
    paths, indexes = [], []
    for part in info.splits[split].file_instructions:
        index = records.index_tfrecord(part.filename)
        if len(index.rows) != part.examples_in_shard:
            raise ValueError(
                f"{part.filename} holds {len(index.rows)} records where its manifest has "
                f"{part.examples_in_shard} ({index.damage or index.refused or 'cut between two records'}): "
                f"delete {builder.data_dir} and prepare it again"
            )
        rows = index.rows[part.skip : part.skip + part.take if part.take >= 0 else None]
        paths.append(part.filename)
        indexes.append(records.Index(rows, index.refused, examples=index.examples))
    image, captions = _tfds_fields(info.features, image_field, caption_field, name)
    return ExampleSource(paths, indexes, image, captions)


def _prepare(make_builder, data_dir: str, name: str):
    """Prepare a tfds dataset once, whatever number of processes start together. Returns the builder."""
    builder = make_builder()
    if builder.is_prepared():
        return builder
    with locked(os.path.join(data_dir, f".{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lock")):
        builder = make_builder()  # another process may have prepared it while we waited for the lock
        if not builder.is_prepared():
            logging.info("preparing %s in %s (once)", name, builder.data_dir)
            builder.download_and_prepare(file_format="tfrecord")
        return builder


def open_scenes(path: str, split: str, data_dir: str = "") -> ExampleSource:
    """Our own scenes, drawn into `data_dir` at first use; `path` names a config, such as 'quickstart_64'."""
    from dalle2_jax.data import scenes_builder

    configs = {config.name: config for config in scenes_builder.Scenes.BUILDER_CONFIGS}
    if path not in configs:
        raise ValueError(f"scenes have no config {path!r}" + did_you_mean(path, configs))
    data_dir = os.path.expanduser(data_dir or os.path.join(records.cache_dir(), "tfds"))

    def make_builder():
        return scenes_builder.Scenes(config=path, data_dir=data_dir, file_format="tfrecord")

    return _open_builder(
        _prepare(make_builder, data_dir, f"scenes-{path}"), split, "image", "", f"scenes/{path}"
    )


def open_tfds(
    path: str, split: str, data_dir: str = "", image_field: str = "", caption_field: str = ""
) -> ExampleSource:
    """Any tfds dataset with an image and a caption, such as 'coco_captions'; prepared where it is not yet.

    Args:
        path: name, name/config or name:version.
        split: 'train', 'validation', or a slice such as 'train[:10%]'.
        data_dir: the tfds folder; '' for tfds's own default.
        image_field: which image feature; '' where there is only one.
        caption_field: which text feature, 'captions/text' for a sequence; '' finds those named caption,
        text, caption_zh.
    """
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(data_dir) or str(tfds.core.constants.DATA_DIR)

    def make_builder():
        return tfds.builder(path, data_dir=folder)

    try:
        builder = _prepare(make_builder, folder, path)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(f"tfds knows no dataset {path!r}: {error}") from None
    return _open_builder(builder, split, image_field, caption_field, path)

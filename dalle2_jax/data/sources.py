"""Datasets by name. To add one, write a function that returns a `records.RecordSource` and name it below."""

import os
from collections.abc import Sequence

from dalle2_jax.data import embeddings as embeddings_module
from dalle2_jax.data import paired, prepared, records, shards
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.runtime import files

SOURCES = ("scenes", "tfds", "tar", "tfrecord", "embeddings")


def open_source(
    source: str,
    path: str,
    split: str,
    *,
    data_dir: str = "",
    image_field: str = "",
    caption_field: str = "",
    embeddings: str = "",
    verify_sha256: bool = False,
    allow_damaged: str | Sequence[str] = "",
) -> records.RecordSource:
    """Open a dataset as random-access records.

    Args:
        source: 'scenes' | 'tfds' | 'tar' | 'tfrecord' | 'embeddings'.
        path: config of scenes, name of a tfds dataset, or folder, file or pattern of shards.
        split: which part; for folders see `find.find_files`, for embeddings FOLDER/SPLIT where that exists.
        data_dir: where 'scenes' and 'tfds' prepare their files.
        image_field, caption_field: of 'tfds', where they cannot be detected.
        verify_sha256: for 'tar', see `shards.TarSource`.
        allow_damaged: for 'tar' and 'tfrecord', the damaged files that are read as far as they are whole,
            with commas between; see `damage.check`.
        embeddings: a folder of embeddings whose rows match the records, to be read beside them; FOLDER/SPLIT
            where that exists.

    Raises:
        ValueError: no such source, path or split; the message names what exists. Files are damaged.
    """
    if source not in SOURCES:
        raise ValueError(f"data.source {source!r} is unknown" + did_you_mean(source, SOURCES))
    path, data_dir, embeddings = (files.expand(place) for place in (path, data_dir, embeddings))
    if source == "scenes":
        opened = prepared.open_scenes(path, split, data_dir)
    elif source == "tfds":
        opened = prepared.open_tfds(path, split, data_dir, image_field, caption_field)
    elif source == "tar":
        opened = shards.open_tar(path, split, verify_sha256, allow_damaged)
    elif source == "tfrecord":
        opened = shards.open_tfrecord(path, split, allow_damaged)
    else:
        folder = os.path.join(path, split)
        opened = embeddings_module.EmbeddingSource(folder if split and os.path.isdir(folder) else path)
    if not embeddings:
        return opened
    folder = os.path.join(embeddings, split)
    return paired.Paired(opened, folder if split and os.path.isdir(folder) else embeddings)

"""Datasets by name. To add one, write a function that returns a `records.RecordSource`; name it in
`SOURCES`."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from dalle2_jax.data import embeddings, folders, paired, prepared, records, shards
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """The source of records.

    source: a name of `SOURCES`. path: config of scenes, name of a tfds dataset, or folder, file or pattern of
    shards, or folder of folders of classes. split: for folders see `find.find_files`, for those of classes
    `folders.open_folder`; of embeddings FOLDER/SPLIT if it exists. data_dir: the files of 'scenes' and
    'tfds'. image_field, caption_field, label_field: of 'tfds', if they cannot be detected.
    embeddings: a folder (or FOLDER/SPLIT) of embeddings whose rows match the records. verify_sha256: for
    'tar', see `shards.TarSource`. allow_damaged: for 'tar' and 'tfrecord', damaged files whose intact part is
    read, separated by commas; see `damage.check`.
    """

    source: str
    path: str
    split: str
    data_dir: str = ""
    image_field: str = ""
    caption_field: str = ""
    label_field: str = ""
    embeddings: str = ""
    verify_sha256: bool = False
    allow_damaged: str | Sequence[str] = ""


SOURCES: dict[str, Callable[[SourceSettings], records.RecordSource]] = {
    "scenes": lambda s: prepared.open_scenes(s.path, s.split, s.data_dir),
    "tfds": lambda s: prepared.open_tfds(
        s.path, s.split, s.data_dir, s.image_field, s.caption_field, s.label_field
    ),
    "folder": lambda s: folders.open_folder(s.path, s.split),
    "tar": lambda s: shards.open_tar(s.path, s.split, s.verify_sha256, s.allow_damaged),
    "tfrecord": lambda s: shards.open_tfrecord(s.path, s.split, s.allow_damaged),
    "embeddings": lambda s: embeddings.EmbeddingSource(_folder(s.path, s.split)),
}


def _folder(path: str, split: str) -> str:
    """PATH/SPLIT if that folder exists, else `path`."""
    folder = os.path.join(path, split)
    return folder if split and os.path.isdir(folder) else path


def open_source(settings: SourceSettings) -> records.RecordSource:
    """Open a dataset as random-access records.

    Raises ValueError for an unknown source, path or split, naming existing ones, and for damaged files.
    """
    if settings.source not in SOURCES:
        raise ValueError(
            f"data.source {settings.source!r} is unknown" + did_you_mean(settings.source, SOURCES)
        )
    places: dict[str, Any] = {
        name: files.expand(getattr(settings, name)) for name in ("path", "data_dir", "embeddings")
    }
    settings = dataclasses.replace(settings, **places)
    opened = SOURCES[settings.source](settings)
    if not settings.embeddings:
        return opened
    return paired.Paired(opened, _folder(settings.embeddings, settings.split))

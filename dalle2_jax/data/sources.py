"""Datasets by name. To add one, write a function that returns a `records.RecordSource`, and name it in
`SOURCES`."""

import dataclasses
import os
from collections.abc import Callable, Sequence

from dalle2_jax.data import embeddings, paired, prepared, records, shards
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """Which records.

    source: a name of `SOURCES`. path: config of scenes, name of a tfds dataset, or folder, file or pattern of
    shards. split: which part; for folders see `find.find_files`, for embeddings FOLDER/SPLIT where that
    exists. data_dir: where 'scenes' and 'tfds' prepare their files. image_field, caption_field: of 'tfds',
    where they cannot be detected. embeddings: a folder of embeddings whose rows match the records, to be read
    beside them; FOLDER/SPLIT where that exists. verify_sha256: for 'tar', see `shards.TarSource`.
    allow_damaged: for 'tar' and 'tfrecord', the damaged files that are read as far as they are whole, with
    commas between; see `damage.check`.
    """

    source: str
    path: str
    split: str
    data_dir: str = ""
    image_field: str = ""
    caption_field: str = ""
    embeddings: str = ""
    verify_sha256: bool = False
    allow_damaged: str | Sequence[str] = ""


SOURCES: dict[str, Callable[[SourceSettings], records.RecordSource]] = {
    "scenes": lambda s: prepared.open_scenes(s.path, s.split, s.data_dir),
    "tfds": lambda s: prepared.open_tfds(s.path, s.split, s.data_dir, s.image_field, s.caption_field),
    "tar": lambda s: shards.open_tar(s.path, s.split, s.verify_sha256, s.allow_damaged),
    "tfrecord": lambda s: shards.open_tfrecord(s.path, s.split, s.allow_damaged),
    "embeddings": lambda s: embeddings.EmbeddingSource(_folder(s.path, s.split)),
}


def _folder(path: str, split: str) -> str:
    """PATH/SPLIT where there is such a folder, else `path`."""
    folder = os.path.join(path, split)
    return folder if split and os.path.isdir(folder) else path


def open_source(settings: SourceSettings) -> records.RecordSource:
    """Open a dataset as random-access records.

    Raises:
        ValueError: no such source, path or split; the message names what exists. Files are damaged.
    """
    if settings.source not in SOURCES:
        raise ValueError(
            f"data.source {settings.source!r} is unknown" + did_you_mean(settings.source, SOURCES)
        )
    places = {name: files.expand(getattr(settings, name)) for name in ("path", "data_dir", "embeddings")}
    settings = dataclasses.replace(settings, **places)
    opened = SOURCES[settings.source](settings)
    if not settings.embeddings:
        return opened
    return paired.Paired(opened, _folder(settings.embeddings, settings.split))

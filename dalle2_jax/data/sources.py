"""Datasets by name. To add one, write a function that returns a `records.RecordSource`; name it in
`SOURCES`."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dalle2_jax.data import embeddings, folders, mixture, paired, parquet, prepared, records, shards
from dalle2_jax.data.find import did_you_mean, is_folder, split_names
from dalle2_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """The source of records.

    source: a name of `SOURCES`. path: config of scenes, name of a tfds dataset, or folder, file or pattern of
    shards, or folder of pictures. split: for folders see `find.find_files`, for those of pictures
    `folders.open_folder`; of embeddings FOLDER/SPLIT if it exists. data_dir: the files of 'scenes' and
    'tfds'. image_field ('tfds', 'parquet'), caption_field (these, 'scenes', 'tar', 'folder'), label_field
    ('tfds', 'parquet'): fields that cannot be detected by type and name. class_captions: for 'folder', see
    `folders.FolderSource`.
    embeddings: a folder (or FOLDER/SPLIT) of embeddings whose rows match the records. verify_sha256: for
    'tar', see `shards.TarSource`. allow_damaged: for 'tar', 'tfrecord' and 'parquet', damaged files whose
    intact part is read, separated by commas; see `damage.check`. leave_out: a file with the keys of records
    that are not read, a line each; see `_leave_out`. sources: several sources, each a path or a dict of
    `path`, `weight` (1) and the settings above, but for split, that differ from these; see `mixture`.
    """

    source: str
    path: str
    split: str
    data_dir: str = ""
    image_field: str = ""
    caption_field: str = ""
    label_field: str = ""
    class_captions: bool = False
    embeddings: str = ""
    verify_sha256: bool = False
    allow_damaged: str | Sequence[str] = ""
    leave_out: str = ""
    sources: Sequence[str | Mapping[str, Any]] = ()


SOURCES: dict[str, Callable[[SourceSettings], records.RecordSource]] = {
    "scenes": lambda s: prepared.open_scenes(s.path, s.split, s.data_dir, s.caption_field),
    "tfds": lambda s: prepared.open_tfds(
        s.path, s.split, s.data_dir, s.image_field, s.caption_field, s.label_field
    ),
    "folder": lambda s: folders.open_folder(s.path, s.split, s.caption_field, s.class_captions),
    "tar": lambda s: shards.open_tar(s.path, s.split, s.verify_sha256, s.allow_damaged, s.caption_field),
    "tfrecord": lambda s: shards.open_tfrecord(s.path, s.split, s.allow_damaged),
    "parquet": lambda s: parquet.open_parquet(
        s.path, s.split, s.image_field, s.caption_field, s.label_field, s.allow_damaged
    ),
    "embeddings": lambda s: embeddings.EmbeddingSource(_folder(s.path, s.split)),
}


def _folder(path: str, split: str) -> str:
    """PATH/SPLIT if that folder exists, under one of the `find.split_names`, else `path`."""
    folders = [os.path.join(path, name) for name in split_names(split) if split]
    return next(filter(is_folder, folders), path)


def open_source(settings: SourceSettings) -> records.RecordSource:
    """Open a dataset as random-access records.

    Raises ValueError for an unknown source, path or split, naming existing ones, and for damaged files.
    """
    if settings.source not in SOURCES:
        raise ValueError(
            f"data.source {settings.source!r} is unknown" + did_you_mean(settings.source, SOURCES)
        )
    places: dict[str, Any] = {
        name: files.expand(getattr(settings, name))
        for name in ("path", "data_dir", "embeddings", "leave_out")
    }
    settings = dataclasses.replace(settings, **places)
    if settings.sources:
        return _open_mixture(settings)
    opened = SOURCES[settings.source](settings)
    if settings.embeddings:
        opened = paired.Paired(opened, _folder(settings.embeddings, settings.split))
    if settings.leave_out:
        _leave_out(opened, settings.leave_out)
    return opened


def _leave_out(source: records.RecordSource, path: str) -> None:
    """Leave out the records whose keys are the lines of a file: the fingerprint follows from them.

    All keys are read once. Raises ValueError for a line that is no record's key.
    """
    wanted = {line.removesuffix("\r") for line in files.read_text(path).split("\n")} - {""}
    found = {number: key for number, key in enumerate(source.keys()) if key in wanted}
    if unknown := wanted - set(found.values()):
        raise ValueError(
            f"data.leave_out: {len(unknown)} of {len(wanted)} lines of {path} are keys of no record, such as "
            f"{min(unknown)!r}"
        )
    if len(found) == len(source):
        raise ValueError(f"data.leave_out: {path} leaves out all {len(source)} records")
    source.left_out = frozenset(found)
    source.passed = {**source.passed, "left_out": len(found)}
    numbers = ((f"left out {number}", 0, 0) for number in found)
    source.fingerprint = records.fingerprint([(source.fingerprint, 0, len(source)), *numbers])


def _open_mixture(settings: SourceSettings) -> mixture.Mixture:
    """The sources of `settings.sources`, whose other settings are those of `settings`."""
    for name, what in (("embeddings", "folder"), ("leave_out", "file")):
        if getattr(settings, name):
            raise ValueError(f"data.{name}: give the {what} of each source, as {name} in data.sources")
    names = {field.name for field in dataclasses.fields(SourceSettings)} - {"split", "sources"} | {"weight"}
    entries: list[dict[str, Any]] = [
        {"path": one} if isinstance(one, str) else dict(one) for one in settings.sources
    ]
    weights = [entry.pop("weight", 1) for entry in entries]
    for entry, weight in zip(entries, weights, strict=True):
        for name in entry:
            if name not in names:
                raise ValueError(f"data.sources has no setting {name!r}" + did_you_mean(name, names))
        if not entry.get("path") or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(
                f"data.sources: {entry | {'weight': weight}} needs a path and a weight above 0, such as "
                "--config.data.sources=\"({'path': 'A', 'weight': 3}, {'path': 'B'})\""
            )
    plain = dataclasses.replace(settings, sources=())
    opened = [open_source(dataclasses.replace(plain, **entry)) for entry in entries]
    named = mixture.named([entry["path"] for entry in entries])
    return mixture.Mixture(dict(zip(named, opened, strict=True)), weights)

"""Parquet files that hold pictures, in Hugging Face's layout: a record is a row.

The picture is a column of struct {bytes, path}, or of bytes; captions are texts or lists of texts; a label is
a whole number. A column of a row group is the least that can be read. Row groups are kept in memory up to
`CACHE_BYTES`, so that records of one row group that are read together (`data.group`) read it once.
"""

import collections
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.data import damage, records, remote, shards
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.data.records import BadRecord, Index, Record
from dalle2_jax.runtime import extras

CACHE_BYTES = 1 << 30  # of row groups in memory
MAX_GROUP_BYTES = 1 << 30  # of the pictures of a row group
_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")  # of the pictures, the likeliest first
_NO_LABEL = -2


class _Fields(NamedTuple):
    """The columns of a file by their use, '' for none; the names of the classes, and of all columns."""

    image: str
    has_path: bool
    captions: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    names: tuple[str, ...]


def index_parquet(path: str) -> Index:
    """Index one file by its footer: a row (row group, row within it) for each record.

    A file without a readable footer has no records and is damaged.
    """
    import pyarrow

    found, rows = "", np.zeros((0, 2), np.int64)
    try:
        with reader(path) as file:
            about = file.metadata
            counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        groups = np.repeat(np.arange(len(counts)), counts)
        starts = np.cumsum([0, *counts[:-1]]) if counts else np.zeros(0, np.int64)
        rows = np.stack([groups, np.arange(len(groups)) - starts[groups]], 1) if counts else rows
    except pyarrow.ArrowInvalid:
        with remote.open_file(path) as opened:
            head = opened.read(512)
        found = "truncated_archive" if head[:4] == b"PAR1" else damage.of_beginning(head, "not_an_archive")
    return Index(rows.astype(np.int64), {}, damage=found)


class ParquetSource(shards.IndexedSource):
    """Parquet files with pictures, captions and labels; see the module.

    image_field, caption_field, label_field: columns; '': by type and name. Raises ValueError, with a remedy,
    for a column that is not there or holds something else.
    """

    def __init__(
        self,
        paths: list[str],
        indexes: list[records.Index],
        image_field: str = "",
        caption_field: str = "",
        label_field: str = "",
    ):
        super().__init__(paths, indexes)
        self._paths, self._caption_field = paths, caption_field
        self._cache = _Cache(CACHE_BYTES)
        self._footers: dict[str, Any] = {}  # of the files that were opened
        first = next(number for number, index in enumerate(indexes) if len(index.rows))
        with self._open(paths[first]) as file:
            self._fields = _fields(paths[first], file.schema_arrow, image_field, caption_field, label_field)
        self.classes, self._labels = self._fields.classes, None
        if self._fields.label:
            read = [number for number, index in enumerate(indexes) if len(index.rows)]
            self._labels = np.concatenate([self._read_labels(paths[number]) for number in read])
        count = 0 if self._labels is None else int(self._labels.max()) + 1
        self.num_classes = max(0, len(self.classes) or count)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """One record; see `records.RecordSource`."""
        fields, key, encoded = self._fields, self._key(index), None
        texts: dict[str, list[str]] = {}
        if fields.has_path and (path := (self._value(index, f"{fields.image}.path") or {}).get("path")):
            key = f"{self._names[self._file_of[index]]}:{shards.encodable(path)}"
        if image:
            encoded = self._value(index, fields.image)
            if isinstance(encoded, dict):
                encoded = encoded["bytes"]
            if not encoded:
                raise BadRecord("no_image", f"{key}: {fields.image} holds no bytes")
            if len(encoded) > records.MAX_MEMBER_BYTES:
                raise BadRecord("member_too_large", f"{key}: {len(encoded)} bytes")
        if captions:
            for field in fields.captions:
                shards.add_fields(texts, {field: self._value(index, field)}, self._caption_field)
        label = None if self._labels is None else int(self._labels[index])
        return Record(
            key,
            encoded,
            shards.freeze(texts),
            fields=fields.names,
            label=None if label == _NO_LABEL else label,
        )

    def _value(self, index: int, column: str) -> Any:
        """The value of a record in a column, None for null. Raises BadRecord."""
        file, (group, row) = int(self._file_of[index]), self._rows[index].tolist()
        try:
            values = self._cache.get((file, group, column), lambda: self._group(file, group, column))
            return values[row].as_py()
        except UnicodeDecodeError as error:
            raise BadRecord("invalid_utf8", f"{column}: {error}") from None

    def _group(self, file: int, group: int, column: str):
        """A column of a row group as a pyarrow array. Raises BadRecord; ValueError: the file lacks it."""
        import pyarrow

        path = self._paths[file]
        with self._open(path) as opened:
            field = column.partition(".")[0]
            if field not in opened.schema_arrow.names:
                raise ValueError(f"{path} has no column {field!r}, which {self._paths[0]} has")
            about = opened.metadata.row_group(group)
            for stored in map(about.column, range(about.num_columns)):
                size = stored.total_uncompressed_size
                if stored.path_in_schema.startswith(column) and size > MAX_GROUP_BYTES:
                    raise ValueError(
                        f"{path}: row group {group} has {size >> 20} MiB in {column}: write the file with "
                        "row groups of about 100 rows (row_group_size=100)"
                    )
            try:
                table = opened.read_row_group(group, columns=[column], use_threads=False)
            except remote.Unreachable:
                raise
            except (pyarrow.ArrowException, OSError) as error:
                raise BadRecord("damaged_row_group", f"{path}: row group {group}: {error}") from None
        return table.column(0).combine_chunks()

    def _open(self, path: str):
        opened = reader(path, metadata=self._footers.get(path))
        self._footers[path] = opened.metadata
        return opened

    def _read_labels(self, path: str) -> np.ndarray:
        with self._open(path) as file:
            column = file.read(columns=[self._fields.label], use_threads=False).column(0)
        return column.fill_null(_NO_LABEL).to_numpy().astype(np.int32)


class _Cache:
    """Values by key, the last used ones, up to a number of bytes; each is loaded once by one thread."""

    def __init__(self, limit: int):
        self._limit, self._lock, self._bytes = limit, threading.Lock(), 0
        self._locks: dict[Any, threading.Lock] = collections.defaultdict(threading.Lock)
        self._values: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def _find(self, key):
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def get(self, key, load: Callable[[], Any]) -> Any:
        """The value of a key: a pyarrow array that `load` returns."""
        if (value := self._find(key)) is not None:
            return value
        with self._lock:
            loading = self._locks[key]
        with loading:
            if (value := self._find(key)) is not None:
                return value
            value = load()
            with self._lock:
                self._locks.pop(key, None)
                self._values[key] = value
                self._bytes += value.nbytes
                while self._bytes > self._limit and len(self._values) > 1:
                    self._bytes -= self._values.popitem(last=False)[1].nbytes
        return value


def reader(path: str, **options):
    """A pyarrow ParquetFile of a file, on the disk or in an object store, with these options."""
    import pyarrow.parquet

    source = remote.RemoteFile(path, block=0) if remote.is_remote(path) else path
    return pyarrow.parquet.ParquetFile(source, **options)


def _fields(path: str, schema, image_field: str, caption_field: str, label_field: str) -> _Fields:
    """The columns of the first file by the settings, else by type and name. Raises ValueError."""
    import pyarrow.types as types

    def is_bytes(kind) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    kinds = dict(zip(schema.names, schema.types, strict=True))
    structs = [name for name, kind in kinds.items() if types.is_struct(kind)]
    nested = [name for name in structs if kinds[name].get_field_index("bytes") >= 0]
    pictures = nested + [name for name, kind in kinds.items() if is_bytes(kind)]
    for setting, field in dict(image=image_field, caption=caption_field, label=label_field).items():
        if field and field not in kinds:
            hint = did_you_mean(field, kinds)
            raise ValueError(f"{path} has no column {field!r} (data.{setting}_field)" + hint)
    named = [name for name in _NAMES if name in pictures]
    image = image_field or next(iter(named or (pictures if len(pictures) == 1 else [])), "")
    if image not in pictures:
        raise ValueError(
            f"{path}: {f'column {image!r} holds no pictures' if image else 'no column holds pictures'}, as "
            "struct {bytes, path} or as bytes: write the files' bytes, not their paths, or name the column "
            f"by --config.data.image_field; there are {', '.join(f'{n}: {k}' for n, k in kinds.items())}"
        )
    has_path = image in nested and kinds[image].get_field_index("path") >= 0
    captions = [name for name in kinds if shards.language_of(name) and name != image]
    captions = [caption_field] if caption_field else captions
    named_classes = _class_labels(schema)
    whole = [name for name, kind in kinds.items() if types.is_integer(kind)]
    label = label_field or next((name for name in ("label", *named_classes) if name in whole), "")
    if label and label not in whole:
        raise ValueError(f"{path}: column {label!r} holds no whole numbers, the labels of classes")
    return _Fields(image, has_path, tuple(captions), label, named_classes.get(label, ()), tuple(kinds))


def _class_labels(schema) -> dict[str, tuple[str, ...]]:
    """{column: names of its classes} that Hugging Face's datasets stored in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def open_parquet(
    path: str,
    split: str,
    image_field: str = "",
    caption_field: str = "",
    label_field: str = "",
    allow_damaged: str | Sequence[str] | None = None,
) -> ParquetSource:
    """Parquet files with pictures; see `find_files` for path and split, `ParquetSource` for the others.

    Raises ValueError also for damaged files that `allow_damaged` does not name, and without pyarrow.
    """
    extras.check("data.source=parquet", "pyarrow")
    opened = shards.open_files(path, split, ".parquet", index_parquet, True, allow_damaged)
    return ParquetSource(*opened, image_field, caption_field, label_field)

"""Folders of precomputed CLIP embeddings as clip-retrieval writes them, read and written.

FOLDER/img_emb/img_emb_N.npy and FOLDER/text_emb/text_emb_N.npy hold floats [n, E],
FOLDER/metadata/metadata_N.parquet (or .jsonl) their captions; row i of all of them is record i. Arrays are
mapped, never unpickled. A folder that `dalle2_jax.embed` wrote has embed.json besides, which says what data
set and CLIP it is of and whether it is complete, and each record's key in the metadata.
"""

import collections
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from dalle2_jax import files
from dalle2_jax.data import records
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.data.records import BadRecord, Record
from dalle2_jax.data.shards import add_caption, freeze, language_of


def _embedding_shards(folder: str) -> list[np.ndarray]:
    """The arrays of a folder of .npy files, in numeric order, mapped. Raises ValueError for what is none."""
    names = [name for name in os.listdir(folder) if name.endswith(".npy")] if os.path.isdir(folder) else []
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    shards = []
    for name in names:
        try:
            shard = np.load(os.path.join(folder, name), mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{os.path.join(folder, name)} is no plain array of numbers: {error}") from None
        if shard.ndim != 2 or shard.dtype.kind != "f":
            raise ValueError(
                f"{os.path.join(folder, name)}: expected floats [N, E], found {shard.dtype} {shard.shape}"
            )
        if shards and shard.shape[1] != shards[0].shape[1]:
            raise ValueError(
                f"{folder}: {name} has {shard.shape[1]} columns, {names[0]} has {shards[0].shape[1]}"
            )
        shards.append(shard)
    return shards


class Embeddings:
    """Rows of img_emb/*.npy and text_emb/*.npy as one table."""

    def __init__(self, path: str):
        path = os.path.expanduser(os.fspath(path))
        if not os.path.isdir(path):
            parent = os.path.dirname(os.path.abspath(path))
            listing = os.listdir(parent) if os.path.isdir(parent) else []
            raise ValueError(f"{path} does not exist" + did_you_mean(os.path.basename(path), listing))
        folders = {"image_embed": "img_emb", "text_embed": "text_emb"}
        self._shards = {
            name: _embedding_shards(os.path.join(path, folder)) for name, folder in folders.items()
        }
        self._shards = {name: shards for name, shards in self._shards.items() if shards}
        if not self._shards:
            raise ValueError(
                f"{path} holds neither img_emb/*.npy nor text_emb/*.npy"
                + did_you_mean("img_emb", os.listdir(path))
            )
        counts = {name: [len(shard) for shard in shards] for name, shards in self._shards.items()}
        if len({tuple(count) for count in counts.values()}) > 1:
            raise ValueError(f"{path}: the shards of img_emb and text_emb differ in rows: {counts}")
        self._first = np.concatenate([[0], np.cumsum(next(iter(counts.values())))])
        self.dims = {name: shards[0].shape[1] for name, shards in self._shards.items()}
        self.entries = [
            (f"{folders[name]}/{i}", shard.nbytes, len(shard))
            for name, shards in self._shards.items()
            for i, shard in enumerate(shards)
        ]

    def __len__(self):
        return int(self._first[-1])

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Those of {'image_embed': float32 [E], 'text_embed': [E]} that exist. Raises BadRecord."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        found = {}
        for name, shards in self._shards.items():
            found[name] = np.asarray(shards[shard][index - self._first[shard]], np.float32)
            if not np.isfinite(found[name]).all():
                raise BadRecord("embedding_not_finite", name)
        return found


PLAN = "embed.json"
MAX_COLUMN_BYTES = 256 << 20  # of a column of captions within a row group of parquet
_CHECKED_KEYS = 64  # rows, spread over a folder, whose keys are compared with the records beside them


def read_plan(folder: str) -> dict | None:
    """What embed.json says; None where there is none. Raises ValueError while shards are missing."""
    if not os.path.isfile(os.path.join(os.path.expanduser(folder), PLAN)):
        return None
    plan = _stored_plan(folder)
    if "left_out" not in plan:
        raise ValueError(
            f"the embeddings of {folder} are not complete: run the command that writes them again"
        )
    return plan


def _clip_sha256(plan: dict | None) -> str:
    """Of the CLIP that embed.json names; '' without one."""
    return str((plan or {}).get("clip_sha256", ""))


def _stored_plan(folder: str | os.PathLike) -> dict:
    """embed.json as it stands. Raises ValueError for what is no object, or above MAX_TEXT_BYTES."""
    path = epath.Path(os.path.expanduser(folder)) / PLAN
    with path.open("r", encoding="utf-8") as file:
        try:
            return dict(json.loads(file.read(records.MAX_TEXT_BYTES)))
        except (ValueError, TypeError, RecursionError) as error:
            limit = f"an object in JSON of at most {records.MAX_TEXT_BYTES >> 20} MiB"
            raise ValueError(f"{path} is not {limit}: {error}") from None


def keep_plan(folder: epath.Path, plan: dict) -> None:
    """Write embed.json before the first shard, or compare with what is there.

    Raises ValueError with what differs, where the folder holds the embeddings of something else.
    """
    path = folder / PLAN
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_plan(path, plan)
    stored = _stored_plan(folder)
    differing = [
        f"  {name}: {stored.get(name)!r} there, {value!r} now"
        for name, value in json.loads(json.dumps(plan)).items()
        if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} holds other embeddings; use another --out, or remove it:\n" + "\n".join(differing)
        )


def _write_plan(path: epath.Path, plan: dict) -> None:
    with files.whole(path) as partial:
        partial.write_text(json.dumps(plan, indent=2))


class Parts:
    """The shards of a folder that is being written: part p holds `rows(p)`, and exists with its metadata."""

    def __init__(self, folder: epath.Path, records: int, rows_per_shard: int):
        self._folder, self._records, self._size = folder, records, rows_per_shard
        self.count = -(-records // rows_per_shard)

    def rows(self, part: int) -> range:
        """Its records."""
        return range(part * self._size, min(self._records, (part + 1) * self._size))

    def _paths(self, part: int) -> tuple[epath.Path, epath.Path, epath.Path]:
        names = ("img_emb", "npy"), ("text_emb", "npy"), ("metadata", "parquet")
        return tuple(self._folder / name / f"{name}_{part:05d}.{suffix}" for name, suffix in names)

    def is_complete(self, part: int) -> bool:
        """Whether it is all there: the metadata are written last."""
        return all(path.exists() for path in self._paths(part))

    def write(self, part: int, image, text, keys: list[str], captions: list[str], reasons: list[str]) -> None:
        """Write a part: arrays [n, E], and what is known of each of its rows."""
        import pyarrow
        import pyarrow.parquet

        image_path, text_path, metadata_path = self._paths(part)
        for path in (image_path, text_path, metadata_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        for path, array in ((image_path, image), (text_path, text)):
            with files.whole(path) as partial, partial.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        language = _stored_plan(self._folder)["data"]["language"]
        column = "caption" if language in ("en", "any") else f"caption_{language}"
        table = pyarrow.table({"key": keys, column: captions, "left_out": reasons})
        with files.whole(metadata_path) as partial, partial.open("wb") as file:
            pyarrow.parquet.write_table(table, file)


def missing_parts(folder: epath.Path) -> int:
    """How many shards of a folder with embed.json are not there yet."""
    plan = _stored_plan(folder)
    parts = Parts(folder, plan["records"], plan["rows_per_shard"])
    return sum(not parts.is_complete(part) for part in range(parts.count))


def finish(folder: epath.Path) -> dict[str, int]:
    """Say in embed.json that all shards are there, and return how many records were left out by reason."""
    plan, counted = _stored_plan(folder), collections.Counter()
    for _, values in _columns(_metadata(folder), plan["records"], ("left_out",)):
        counted.update(reason for reason in values if reason)
    _write_plan(folder / PLAN, plan | {"left_out": dict(counted)})
    return dict(counted)


class EmbeddingSource:
    """Precomputed CLIP embeddings with their captions, as clip-retrieval writes them; there are no images."""

    has_images = False

    def __init__(self, path: str):
        self.clip_sha256, self._table = _clip_sha256(read_plan(path)), Embeddings(path)
        self._captions = _metadata_captions(path, len(self._table))
        counts = {language: len(texts) for language, texts in self._captions.items()}
        if any(count != len(self._table) for count in counts.values()):
            raise ValueError(f"{path}: {len(self._table)} embeddings but captions {counts} in metadata")
        self.refused, self.passed, self.examples = {}, {}, {}
        self.embed_dims = self._table.dims
        self.files, self.fingerprint = self._table.entries, records.fingerprint(self._table.entries)

    def __len__(self):
        return len(self._table)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        if image:
            raise ValueError("source 'embeddings' holds no images")
        texts: dict[str, list[str]] = {}
        if captions:
            for language, column in self._captions.items():
                add_caption(texts, language, column[index] or "")
        return Record(f"row:{index}", None, freeze(texts), self._table.row(index))


def _metadata_captions(path: str, most: int) -> dict[str, list]:
    """{language: captions in order} from metadata/metadata_N.parquet or .jsonl; empty without metadata."""
    captions: dict[str, list] = {}
    for field, values in _columns(_metadata(path), most):
        captions.setdefault(language_of(field), []).extend(values)
    return captions


def _metadata(path: str | os.PathLike) -> str:
    return os.path.join(os.path.expanduser(path), "metadata")


def _columns(
    folder: str, most: int, wanted: tuple[str, ...] | None = None
) -> Iterator[tuple[str, list[str | None]]]:
    """(field, values) of the metadata in their order, in pieces: those `wanted`, by default the captions.

    A value that is no text, or one above MAX_TEXT_BYTES, is None. Raises ValueError for more than `most` rows
    and for a piece that would take more memory than its texts may; in parquet also for columns that share a
    name, or hold lists, structs or maps.
    """
    names = (
        [name for name in os.listdir(folder) if name.endswith((".parquet", ".jsonl"))]
        if os.path.isdir(folder)
        else []
    )
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])

    def asked(fields) -> list[str]:
        return [field for field in fields if (language_of(field) if wanted is None else field in wanted)]

    for name in names:
        read = _parquet if name.endswith(".parquet") else _json_lines
        for columns in read(os.path.join(folder, name), asked, most):
            most -= max(map(len, columns.values()), default=0)
            yield from columns.items()


def _parquet(path: str, asked: Callable, most: int) -> Iterator[dict[str, list[str | None]]]:
    """The columns of each row group. A text that the file holds once for many rows is held once."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        fields = asked(file.schema_arrow.names)
        columns = [file.schema.column(i) for i in range(len(file.schema))]
        plain = [column.path for column in columns if not column.max_repetition_level]
    for field in fields:
        # What is nested has other names in the file, and other numbers of values than rows: no limit holds.
        if fields.count(field) > 1 or field not in plain:
            raise ValueError(
                f"{path}: {field!r} must be one column of texts, and is several or nested: write one text a "
                "row, or give what is no caption another name"
            )
    with pyarrow.parquet.ParquetFile(path, read_dictionary=fields) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        _check_rows(path, sum(group.num_rows for group in groups), most)
        for i, group in enumerate(groups):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema in fields and column.total_uncompressed_size > MAX_COLUMN_BYTES:
                    raise ValueError(
                        f"{path}: {column.path_in_schema} has more than {MAX_COLUMN_BYTES >> 20} MiB in a "
                        "row group: write the file with smaller row groups"
                    )
            table, columns = file.read_row_group(i, columns=fields), {}
            for field in fields:
                columns[field] = values = []
                for piece in table.column(field).chunks:
                    if pyarrow.types.is_dictionary(piece.type):
                        texts = [_text(text) for text in piece.dictionary.to_pylist()]
                        values += [None if i is None else texts[i] for i in piece.indices.to_pylist()]
                    else:
                        values += [None] * len(piece)
            yield columns


def _json_lines(path: str, asked: Callable, most: int) -> Iterator[dict[str, list[str | None]]]:
    """The columns of a file with one object a line; the first line has all the fields."""
    columns = None
    with open(path, encoding="utf-8") as file:
        for number in itertools.count(1):
            line = file.readline(records.MAX_TEXT_BYTES)
            if not line:
                break
            _check_rows(path, number, most)
            try:
                row = json.loads(line)
                columns = {field: [] for field in asked(row)} if columns is None else columns
                for field, values in columns.items():
                    values.append(_text(row.get(field)))
            except (ValueError, AttributeError, TypeError, RecursionError) as error:
                limit = f"an object in JSON of at most {records.MAX_TEXT_BYTES >> 20} MiB"
                raise ValueError(f"{path}: line {number} is not {limit}: {error}") from None
    yield columns or {}


def _text(value) -> str | None:
    return value if isinstance(value, str) and len(value) <= records.MAX_TEXT_BYTES else None


def _check_rows(path: str, rows: int, most: int) -> None:
    if rows > most:
        raise ValueError(f"{path} has {rows} rows or more, where there are embeddings for {most}")


class Paired:
    """Records of a source with the rows of an embedding folder beside them, in the same order.

    Where the folder has embeddings of captions and the captions, a record's captions are the embedded one.
    Raises ValueError for embeddings of other records: by their number, embed.json, or some of their keys.
    """

    def __init__(self, source, path: str):
        plan, self._source, self._table = read_plan(path), source, Embeddings(path)
        again = "they belong to another dataset, or some records are lost; embed this one again"
        if len(source) != len(self._table):
            raise ValueError(
                f"{path} holds {len(self._table)} embeddings, the dataset {len(source)} records: {again}"
            )
        if plan and plan["fingerprint"] != source.fingerprint:
            raise ValueError(
                f"the embeddings of {path} are of a dataset with fingerprint {plan['fingerprint'][:12]}, "
                f"this one's is {source.fingerprint[:12]}: {again}"
            )
        columns = _columns(_metadata(path), len(self._table), ("key",)) if plan else ()
        keys = [key for _, values in columns for key in values]
        for row in np.unique(np.linspace(0, len(keys) - 1, _CHECKED_KEYS).astype(int)) if keys else ():
            try:
                found = source.read(int(row), image=False, captions=False).key
            except BadRecord:
                continue
            former = getattr(source, "former_key", None)  # of embeddings that older versions wrote
            if found != keys[row] and not (former and former(int(row)) == keys[row]):
                raise ValueError(f"row {row} of {path} is of record {keys[row]!r}, not {found!r}: {again}")
        embedded = "text_embed" in self._table.dims
        self._captions = _metadata_captions(path, len(self._table)) if embedded else {}
        self.refused, self.passed, self.examples = source.refused, source.passed, source.examples
        self.has_images, self.embed_dims = source.has_images, self._table.dims
        self.clip_sha256 = _clip_sha256(plan)
        beside = [(f"embeddings/{name}", size, count) for name, size, count in self._table.entries]
        self.files = [*source.files, *beside]
        self.fingerprint = records.fingerprint([(source.fingerprint, 0, len(source)), *self._table.entries])

    def __len__(self):
        return len(self._source)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        record = self._source.read(index, image, captions)
        texts = record.captions
        if captions and self._captions:
            found: dict[str, list[str]] = {}
            for language, column in self._captions.items():
                add_caption(found, language, column[index] or "")
            texts = freeze(found)
        return Record(record.key, record.image, texts, self._table.row(index))

"""Folders of precomputed CLIP embeddings as clip-retrieval writes them, read and written.

FOLDER/img_emb/img_emb_N.npy and FOLDER/text_emb/text_emb_N.npy hold floats [n, E],
FOLDER/metadata/metadata_N.parquet (or .jsonl) their captions; row i of all of them is record i. Arrays are
mapped, never unpickled. A folder that `dalle2_jax.embed` wrote has embed.json besides, which says what data
set and CLIP it is of and whether it is complete, and each record's key in the metadata.
"""

import collections
import json
import os
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from dalle2_jax.data import records
from dalle2_jax.data.records import BadRecord, Record
from dalle2_jax.data.shards import add_caption, did_you_mean, freeze, language_of


def _embedding_shards(folder: str) -> list[np.ndarray]:
    """The arrays of a folder of .npy files, in numeric order, mapped. Raises ValueError for what is none."""
    names = [name for name in os.listdir(folder) if name.endswith(".npy")] if os.path.isdir(folder) else []
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    shards = []
    for name in names:
        try:
            shard = np.load(os.path.join(folder, name), mmap_mode="r", allow_pickle=False)
        except ValueError as error:
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
_CHECKED_KEYS = 64  # rows, spread over a folder, whose keys are compared with the records beside them


def read_plan(folder: str) -> dict | None:
    """What embed.json says; None where there is none. Raises ValueError while shards are missing."""
    path = os.path.join(os.path.expanduser(folder), PLAN)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        plan = json.load(file)
    if "left_out" not in plan:
        raise ValueError(
            f"the embeddings of {folder} are not complete: run the command that writes them again"
        )
    return plan


def keep_plan(folder: epath.Path, plan: dict) -> None:
    """Write embed.json before the first shard, or compare with what is there.

    Raises ValueError with what differs, where the folder holds the embeddings of something else.
    """
    path = folder / PLAN
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(plan, indent=2).encode())
    stored = json.loads(path.read_text())
    differing = [
        f"  {name}: {stored.get(name)!r} there, {value!r} now"
        for name, value in json.loads(json.dumps(plan)).items()
        if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} holds other embeddings; use another --out, or remove it:\n" + "\n".join(differing)
        )


def _write(path: epath.Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    partial.write_bytes(data)
    partial.replace(path)


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
            partial = path.parent / f".{path.name}.{os.getpid()}.partial"
            with partial.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            partial.replace(path)
        language = json.loads((self._folder / PLAN).read_text())["data"]["language"]
        column = "caption" if language in ("en", "any") else f"caption_{language}"
        table = pyarrow.table({"key": keys, column: captions, "left_out": reasons})
        partial = metadata_path.parent / f".{metadata_path.name}.{os.getpid()}.partial"
        with partial.open("wb") as file:
            pyarrow.parquet.write_table(table, file)
        partial.replace(metadata_path)


def missing_parts(folder: epath.Path) -> int:
    """How many shards of a folder with embed.json are not there yet."""
    plan = json.loads((folder / PLAN).read_text())
    parts = Parts(folder, plan["records"], plan["rows_per_shard"])
    return sum(not parts.is_complete(part) for part in range(parts.count))


def finish(folder: epath.Path) -> dict[str, int]:
    """Say in embed.json that all shards are there, and return how many records were left out by reason."""
    plan, counted = json.loads((folder / PLAN).read_text()), collections.Counter()
    for _, values in _columns(str(folder / "metadata"), ("left_out",)):
        counted.update(reason for reason in values if reason)
    _write(folder / PLAN, json.dumps(plan | {"left_out": dict(counted)}, indent=2).encode())
    return dict(counted)


class EmbeddingSource:
    """Precomputed CLIP embeddings with their captions, as clip-retrieval writes them; there are no images."""

    has_images = False

    def __init__(self, path: str):
        read_plan(path)
        self._table = Embeddings(path)
        self._captions = _metadata_captions(os.path.join(os.path.expanduser(path), "metadata"))
        counts = {language: len(texts) for language, texts in self._captions.items()}
        if any(count != len(self._table) for count in counts.values()):
            raise ValueError(f"{path}: {len(self._table)} embeddings but captions {counts} in metadata")
        self.refused, self.embed_dims = {}, self._table.dims
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


def _metadata_captions(folder: str) -> dict[str, list]:
    """{language: captions in order} from metadata_N.parquet or .jsonl; empty without metadata."""
    captions: dict[str, list] = {}
    for field, values in _columns(folder):
        captions.setdefault(language_of(field), []).extend(values)
    return captions


def _columns(folder: str, wanted: tuple[str, ...] | None = None) -> Iterator[tuple[str, list]]:
    """(field, values) of each file of metadata in its order: those `wanted`, by default the captions."""
    names = (
        [name for name in os.listdir(folder) if name.endswith((".parquet", ".jsonl"))]
        if os.path.isdir(folder)
        else []
    )
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])

    def asked(fields) -> list[str]:
        return [field for field in fields if (language_of(field) if wanted is None else field in wanted)]

    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            fields = asked(pyarrow.parquet.read_schema(path).names)
            table = pyarrow.parquet.read_table(path, columns=fields)
            columns = {field: table.column(field).to_pylist() for field in fields}
        else:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            columns = {field: [row.get(field) for row in rows] for field in asked(rows[0] if rows else {})}
        yield from columns.items()


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
        metadata = os.path.join(os.path.expanduser(path), "metadata")
        keys = [key for _, values in _columns(metadata, ("key",)) for key in values] if plan else []
        for row in np.unique(np.linspace(0, len(keys) - 1, _CHECKED_KEYS).astype(int)) if keys else ():
            try:
                found = source.read(int(row), image=False, captions=False).key
            except BadRecord:
                continue
            if found != keys[row]:
                raise ValueError(f"row {row} of {path} is of record {keys[row]!r}, not {found!r}: {again}")
        embedded = "text_embed" in self._table.dims
        self._captions = _metadata_captions(metadata) if embedded else {}
        self.refused, self.has_images, self.embed_dims = source.refused, source.has_images, self._table.dims
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

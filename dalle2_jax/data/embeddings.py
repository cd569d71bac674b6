"""Folders of precomputed CLIP embeddings as clip-retrieval writes them.

FOLDER/img_emb/img_emb_N.npy and FOLDER/text_emb/text_emb_N.npy hold floats [n, E],
FOLDER/metadata/metadata_N.parquet (or .jsonl) their captions; row i of all of them is record i. Arrays are
mapped, never unpickled.
"""

import json
import os
import re

import numpy as np

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


class EmbeddingSource:
    """Precomputed CLIP embeddings with their captions, as clip-retrieval writes them; there are no images."""

    has_images = False

    def __init__(self, path: str):
        self._table = Embeddings(path)
        self._captions = _metadata_captions(os.path.join(os.path.expanduser(path), "metadata"))
        counts = {language: len(texts) for language, texts in self._captions.items()}
        if any(count != len(self._table) for count in counts.values()):
            raise ValueError(f"{path}: {len(self._table)} embeddings but captions {counts} in metadata")
        self.refused, self.embed_dims = {}, self._table.dims
        self.fingerprint = records.fingerprint(self._table.entries)

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
    names = (
        [name for name in os.listdir(folder) if name.endswith((".parquet", ".jsonl"))]
        if os.path.isdir(folder)
        else []
    )
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    captions: dict[str, list] = {}
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            wanted = [field for field in pyarrow.parquet.read_schema(path).names if language_of(field)]
            table = pyarrow.parquet.read_table(path, columns=wanted)
            columns = {field: table.column(field).to_pylist() for field in wanted}
        else:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            wanted = [field for field in (rows[0] if rows else {}) if language_of(field)]
            columns = {field: [row.get(field) for row in rows] for field in wanted}
        for field, values in columns.items():
            captions.setdefault(language_of(field), []).extend(values)
    return captions


class Paired:
    """Records of a source with the rows of an embedding folder beside them, in the same order."""

    def __init__(self, source, path: str):
        self._source, self._table = source, Embeddings(path)
        if len(source) != len(self._table):
            raise ValueError(
                f"{path} holds {len(self._table)} embeddings, the dataset {len(source)} records: "
                "they belong to another dataset, or some records are lost; embed this one again"
            )
        self.refused, self.has_images, self.embed_dims = source.refused, source.has_images, self._table.dims
        self.fingerprint = records.fingerprint([(source.fingerprint, 0, len(source)), *self._table.entries])

    def __len__(self):
        return len(self._source)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        record = self._source.read(index, image, captions)
        return Record(record.key, record.image, record.captions, self._table.row(index))

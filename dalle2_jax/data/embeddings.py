"""Folders of precomputed CLIP embeddings in clip-retrieval's layout, of text states or of codes.

FOLDER/img_emb/img_emb_N.npy and FOLDER/text_emb/text_emb_N.npy have floats [n, E],
FOLDER/metadata/metadata_N.parquet (or .jsonl) their captions; row i of each belongs to record i. FOLDER may
lie in an object store: rows are then read one by one; those on the disk are mapped, and nothing is unpickled.
A folder of `dalle2_jax.embed` also has embed.json, which names the dataset and the encoder and says whether
it is complete, and each record's key in the metadata. See `text_states` for states. FOLDER/codes/codes_N.npy
has a tokenizer's codes, integers [n, L]; a record without codes has the largest number of their type.
"""

import collections
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath

from dalle2_jax.data import metadata, npy, records, remote, text_states
from dalle2_jax.data.find import did_you_mean, entries, is_folder
from dalle2_jax.data.records import BadRecord, Record
from dalle2_jax.data.shards import language_of
from dalle2_jax.runtime import files
from dalle2_jax.runtime.files import AnyPath

OF_CLIP, CODES = ("img_emb", "text_emb"), "codes"
KINDS = (*OF_CLIP, CODES, *text_states.KINDS, "metadata")
_ENDINGS = dict.fromkeys(KINDS, (".npy",)) | {"metadata": (".parquet", ".jsonl")}
# field of a record -> folder
_COLUMNS = {"image_embed": "img_emb", "text_embed": "text_emb", "codes": CODES}


def _part_files(folder: str, kind: str) -> dict[tuple[int, ...], str]:
    """{number: path} of one kind of file, ascending, by the digits in its name: `img_emb_007` is 7.

    Raises ValueError for two files of one number.
    """
    folder = os.path.join(folder, kind)
    found: dict[tuple[int, ...], str] = {}
    for name in sorted(name for name, _ in entries(folder)) if is_folder(folder) else ():
        stem, ending = os.path.splitext(name)
        if ending not in _ENDINGS[kind] or name.startswith("."):
            continue
        number, path = tuple(map(int, re.findall(r"[0-9]+", stem))), os.path.join(folder, name)
        if number in found:
            raise ValueError(
                f"{found[number]} and {path} have one number, and nothing says which of them is meant: "
                "move one of them away"
            )
        found[number] = path
    return dict(sorted(found.items()))


def _files_by_kind(path: str) -> dict[str, dict[tuple[int, ...], str]]:
    """{kind: {number: path}} of the kinds in a folder. Raises ValueError unless all have the same numbers."""
    found = {kind: _part_files(path, kind) for kind in KINDS}
    found = {kind: parts for kind, parts in found.items() if parts}
    everything = {number: file for parts in reversed(found.values()) for number, file in parts.items()}
    lacking = [
        f"{kind} has no file beside {os.path.relpath(everything[number], path)}"
        for kind, parts in found.items()
        for number in sorted(everything.keys() - parts.keys())
    ]
    if lacking:
        more = f" and {len(lacking) - 3} more like it" if len(lacking) > 3 else ""
        raise ValueError(
            f"{path}: {'; '.join(lacking[:3])}{more}. Files belong together by the numbers in their names: "
            "add what is missing, or move away what it belongs to"
        )
    return found


def packed_codes(rows: Sequence[np.ndarray | None], length: int, num_codes: int) -> dict[str, np.ndarray]:
    """{kind: array to write} of the codes [length] of each record, None for one without; all are below
    num_codes."""
    dtype = np.uint16 if num_codes < np.iinfo(np.uint16).max else np.int32
    table = np.full((len(rows), length), np.iinfo(dtype).max, dtype)
    for place, row in enumerate(rows):
        if row is not None:
            table[place] = row
    return {CODES: table}


def _row_shards(paths: Iterable[str], kinds: str) -> list[np.ndarray | npy.RemoteRows]:
    """The arrays of .npy files of these kinds of numbers. Raises ValueError for other files and shapes."""
    shards: list[np.ndarray | npy.RemoteRows] = []
    first = ""
    for path in paths:
        shard = npy.open_rows(path)
        if shard.ndim != 2 or shard.dtype.kind not in kinds:
            what = "floats [N, E]" if kinds == "f" else "integers [N, L]"
            raise ValueError(f"{path}: expected {what}, found {shard.dtype} {shard.shape}")
        first = first or path
        if shards and shard.shape[1] != shards[0].shape[1]:
            raise ValueError(
                f"{path} has {shard.shape[1]} columns, {os.path.basename(first)} has {shards[0].shape[1]}"
            )
        shards.append(shard)
    return shards


class Embeddings:
    """Rows of img_emb/*.npy and text_emb/*.npy, of codes, or of text states, as one table.

    metadata: the metadata files and the number of rows that each must have, in the order of the table; may be
    empty. dims: field -> entries of a row, of a state for text_states. most_tokens: of a caption with states.
    """

    def __init__(self, path: AnyPath):
        path = os.fspath(path)
        if remote.is_remote(path):
            remote.refresh(path)
        if not is_folder(path):
            parent = os.path.dirname(path if remote.is_remote(path) else os.path.abspath(path))
            listing = [name for name, _ in entries(parent)] if is_folder(parent) else []
            raise ValueError(f"{path} does not exist" + did_you_mean(os.path.basename(path), listing))
        found = _files_by_kind(path)
        self._shards = {
            name: _row_shards(found[kind].values(), "iu" if name == "codes" else "f")
            for name, kind in _COLUMNS.items()
            if kind in found
        }
        self._states = None
        if kinds := [kind for kind in text_states.KINDS if kind in found]:
            if len(kinds) == 1:
                raise ValueError(
                    f"{path} holds {kinds[0]} alone: states need {' and '.join(text_states.KINDS)}"
                )
            self._states = text_states.StateFiles(*(found[kind].values() for kind in kinds))
        if not self._shards and not self._states:
            raise ValueError(
                f"{path} holds none of img_emb/*.npy, text_emb/*.npy, codes/*.npy"
                + did_you_mean("img_emb", [name for name, _ in entries(path)])
            )
        counts = {_COLUMNS[name]: [len(x) for x in shards] for name, shards in self._shards.items()}
        counts |= {"token_counts": self._states.rows} if self._states else {}
        (kind, rows), *others = counts.items()
        for other, theirs in others:
            files = zip(found[kind].values(), found[other].values(), strict=True)
            for (one, beside), a, b in zip(files, rows, theirs, strict=True):
                if a != b:
                    differing = f"{one} has {a} rows, {beside} {b}"
                    raise ValueError(f"the shards of {kind} and {other} differ in rows: {differing}")
        self.metadata = (
            list(zip(found["metadata"].values(), rows, strict=True)) if "metadata" in found else []
        )
        self._first = np.concatenate([[0], np.cumsum(rows)])
        self.dims = {name: shards[0].shape[1] for name, shards in self._shards.items()}
        self.entries = [
            (f"{_COLUMNS[name]}/{i}", shard.nbytes, len(shard))
            for name, shards in self._shards.items()
            for i, shard in enumerate(shards)
        ]
        self.most_tokens = 0
        if self._states:
            self.dims["text_states"], self.most_tokens = self._states.width, self._states.most
            sizes = enumerate(zip(self._states.sizes, rows, strict=True))
            self.entries += [(f"text_states/{i}", size, count) for i, (size, count) in sizes]

    def __len__(self):
        return int(self._first[-1])

    def row(self, index: int) -> dict[str, np.ndarray]:
        """{'image_embed': float32 [E], 'text_embed': [E], 'codes': int32 [L], 'text_states': uint16
        [tokens, D]}, some of them.

        Raises BadRecord.
        """
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        found = {}
        for name, shards in self._shards.items():
            row = shards[shard][index - self._first[shard]]
            if name == "codes":
                if (row == np.iinfo(row.dtype).max).any():
                    raise BadRecord("no_codes")
                found[name] = np.asarray(row, np.int32)
                continue
            found[name] = np.asarray(row, np.float32)
            if not np.isfinite(found[name]).all():
                raise BadRecord("embedding_not_finite", name)
        if self._states:
            found["text_states"] = self._states.row(shard, int(index - self._first[shard]))
        return found


PLAN = "embed.json"


def read_plan(folder: str) -> dict | None:
    """The contents of embed.json; None: no such file. Raises ValueError while shards are missing."""
    if not remote.is_file(os.path.join(folder, PLAN)):
        return None
    plan = _stored_plan(folder)
    if "left_out" not in plan:
        raise ValueError(
            f"the embeddings of {folder} are not complete: run the command that writes them again"
        )
    return plan


def encoder_sha256(plan: dict | None) -> dict[str, str]:
    """Name -> sha256 of the frozen stage in embed.json that made the rows; {} if it is unknown."""
    plan = plan or {}
    found = plan.get("frozen") or ({"clip": plan["clip_sha256"]} if plan.get("clip_sha256") else {})
    return {str(name): str(sha256) for name, sha256 in dict(found).items()}


def kinds_of(plan: dict) -> tuple[str, ...]:
    """The kinds of arrays of a folder with this embed.json."""
    if plan.get("codes"):
        return (CODES,)
    return text_states.KINDS if plan.get("frozen") else OF_CLIP


def _stored_plan(folder: str | os.PathLike) -> dict:
    """embed.json, complete or not. Raises ValueError if it is no object, or above MAX_TEXT_BYTES."""
    path = os.path.join(folder, PLAN)
    with remote.open_file(path) as file:
        try:
            return dict(json.loads(file.read(records.MAX_TEXT_BYTES)))
        except (ValueError, TypeError, RecursionError) as error:
            limit = f"an object in JSON of at most {records.MAX_TEXT_BYTES >> 20} MiB"
            raise ValueError(f"{path} is not {limit}: {error}") from None


def keep_plan(folder: epath.Path, plan: dict) -> None:
    """Write embed.json before the first shard, or compare the plan with it.

    Raises ValueError with the differences if the folder has other embeddings, or some without embed.json.
    """
    path = folder / PLAN
    # Before the look for embed.json, which another process may write meanwhile, before its shards.
    begun = any(_part_files(os.fspath(folder), kind) for kind in KINDS)
    if not path.exists():
        if begun:
            raise ValueError(
                f"{folder} holds embeddings, but no {PLAN} says of which records: use another --out, "
                "or remove it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write_plan(path, plan)
    stored = _stored_plan(folder)
    data = stored.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), str):  # older versions stored a ~
        stored["data"] = data | {"path": files.expand(data["path"])}
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
    with files.atomic_write(path) as partial:
        partial.write_text(json.dumps(plan, indent=2))


class Parts:
    """The shards of a folder that is being written by a plan: part p has the records `rows(p)`."""

    def __init__(self, folder: epath.Path, plan: dict):
        self._folder, self._records, self._size = folder, plan["records"], plan["rows_per_shard"]
        self._language, self._kinds = plan["data"]["language"], kinds_of(plan)
        self.count = -(-self._records // self._size)

    def rows(self, part: int) -> range:
        """The records of a part."""
        return range(part * self._size, min(self._records, (part + 1) * self._size))

    def _paths(self, part: int) -> dict[str, epath.Path]:
        suffixes = dict.fromkeys(self._kinds, "npy") | {"metadata": "parquet"}
        return {kind: self._folder / kind / f"{kind}_{part:05d}.{end}" for kind, end in suffixes.items()}

    def is_complete(self, part: int) -> bool:
        """Whether a part has all its files; the metadata are written last."""
        return all(path.exists() for path in self._paths(part).values())

    def write(
        self, part: int, arrays: dict, keys: list[str], captions: list[str], reasons: list[str]
    ) -> None:
        """Write a part: {kind: array}, and key, caption and reason ('' or why it is left out) of each row."""
        import pyarrow
        import pyarrow.parquet

        paths = self._paths(part)
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        for kind in self._kinds:
            with files.atomic_write(paths[kind]) as partial, partial.open("wb") as file:
                np.save(file, arrays[kind], allow_pickle=False)
        column = "caption" if self._language in ("en", "any") else f"caption_{self._language}"
        table = pyarrow.table({"key": keys, column: captions, "left_out": reasons})
        with files.atomic_write(paths["metadata"]) as partial, partial.open("wb") as file:
            pyarrow.parquet.write_table(table, file)


def missing_parts(folder: epath.Path) -> int:
    """The number of missing shards of a folder with embed.json."""
    parts = Parts(folder, _stored_plan(folder))
    return sum(not parts.is_complete(part) for part in range(parts.count))


def finish(folder: epath.Path) -> dict[str, int]:
    """Mark embed.json as complete. Returns {reason: number of records left out}.

    Raises ValueError if the files do not fit each other or the plan.
    """
    plan, table = _stored_plan(folder), Embeddings(folder)
    if len(table) != plan["records"]:
        raise ValueError(
            f"{folder} holds {len(table)} embeddings of {plan['records']} records: remove what is not of it"
        )
    columns, _ = metadata.read_columns(table.metadata, lambda field: field == "left_out")
    counted = collections.Counter(reason for reason in columns.get("left_out", ()) if reason)
    _write_plan(folder / PLAN, plan | {"left_out": dict(counted)})
    return dict(counted)


class EmbeddingSource(records.RecordSource):
    """Precomputed CLIP embeddings or codes, in clip-retrieval's layout, with captions and without images."""

    has_images = False

    def __init__(self, path: str):
        self.encoder_sha256, self._table = encoder_sha256(read_plan(path)), Embeddings(path)
        self._captions, self._fields = metadata.read_columns(self._table.metadata, language_of)
        self.embed_dims, self.most_tokens = self._table.dims, self._table.most_tokens
        self.remote = remote.is_remote(path)
        self.files, self.fingerprint = self._table.entries, records.fingerprint(self._table.entries)

    def __len__(self):
        return len(self._table)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        """The embeddings of one row; see `records.RecordSource`."""
        if image:
            raise ValueError("source 'embeddings' holds no images")
        embedded = bool({"text_embed", "text_states", "codes"} & self._table.dims.keys())
        texts = metadata.row_captions(self._captions, index, embedded) if captions else {}
        return Record(f"row:{index}", None, texts, self._table.row(index), self._fields)

    def keys(self) -> Iterator[str | None]:
        """Yield the key of each embedded record, or row:NUMBER where the metadata have none."""
        columns, _ = metadata.read_columns(self._table.metadata, lambda field: field == "key")
        yield from columns.get("key") or (f"row:{index}" for index in range(len(self)))

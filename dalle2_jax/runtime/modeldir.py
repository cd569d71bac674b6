"""Parameters by name, and model directories: a trained system, readable with safetensors and a JSON parser.

MODEL/model_index.json                      the stages and their folders
MODEL/<stage>/config.json                   the config of the stage's training
MODEL/<stage>/model.safetensors             its averaged weights by flat names, bfloat16 or float32
MODEL/tokenizer/                            see data/tokenizer.py
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from dalle2_jax.runtime import files, partition
from dalle2_jax.runtime.files import AnyPath
from dalle2_jax.runtime.names import nearest

FORMAT_VERSION = 2
CARD_FILE = "README.md"  # the model card
INDEX_FILE, CONFIG_FILE, WEIGHTS_FILE = "model_index.json", "config.json", "model.safetensors"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# numpy's name of a type -> the name in safetensors files, such as F32, I8, U8
_NUMBERS = "float16 float32 float64 int8 int16 int32 int64 uint8 uint32".split()
_SAFETENSORS = {name: name[0].upper() + name.lstrip("uintfloa") for name in _NUMBERS}
_SAFETENSORS |= {"bfloat16": "BF16", "bool": "BOOL"}
_NARROW = (ml_dtypes.bfloat16, np.float16)


def flatten(tree: Any) -> dict[str, Any]:
    """{'a/b/kernel': leaf} of a pytree, in its order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {partition.path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The nested dicts of {'a/b/kernel': leaf}."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def sha256(params: Any) -> str:
    """The sha256 of parameters on the host, by name. Numbers of 16 bits count as float32."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])):
        digest.update(str(path).encode())
        narrow = leaf.dtype in _NARROW
        digest.update(np.ascontiguousarray(leaf, np.float32 if narrow else None).tobytes())
    return digest.hexdigest()


def check_params(params: Any, abstract: Any, where: str = "the parameters") -> None:
    """Raises ValueError with the differences unless `params` has the leaves and shapes of `abstract`.

    Both are pytrees of arrays or ShapeDtypeStructs. where: the name of `params` in the message, such as a
    path.
    """
    found = {name: tuple(np.shape(leaf)) for name, leaf in flatten(params).items()}
    expected = {name: tuple(leaf.shape) for name, leaf in flatten(abstract).items()}
    complaints = differences(found, expected)
    if complaints:
        raise ValueError(
            f"{where} and the model do not fit together (was it made with another config?):\n"
            + "\n".join(complaints)
        )


def differences(found: Mapping[str, tuple], expected: Mapping[str, tuple], limit: int = 10) -> list[str]:
    """Lines that name the missing, surplus and misshapen leaves, at most `limit` of each."""
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    misshapen = {name for name in found.keys() & expected.keys() if found[name] != expected[name]}

    def missing_leaf(name: str) -> str:
        near = nearest(name, sorted(surplus))
        return f"{name} {list(expected[name])}" + (f" (is {near} meant for it?)" if near else "")

    kinds: dict[str, tuple[set[str], Callable[[str], str]]] = {
        "missing": (missing, missing_leaf),
        "surplus": (surplus, lambda name: f"{name} {list(found[name])}"),
        "misshapen": (
            misshapen,
            lambda name: f"{name} has {list(found[name])}, the model expects {list(expected[name])}",
        ),
    }
    lines = []
    for title, (names, line) in kinds.items():
        lines += [f"  {title}: {line(name)}" for name in sorted(names)[:limit]]
        lines += [f"  ... and {len(names) - limit} more {title}"] if len(names) > limit else []
    return lines


def save_stage(directory: AnyPath, config: Mapping[str, Any], params: Any, dtype: str = "bfloat16") -> None:
    """Writes a stage's config.json and model.safetensors; the same input gives the same bytes.

    Args:
      directory: made if absent; its files are replaced.
      config: JSON values from which the stage can be rebuilt.
      params: nested dict of arrays, or of objects that numpy converts to arrays, one at a time. Floating
        leaves are stored as `dtype`; other leaves and statistics (below 'stats') keep their types.
      dtype: 'bfloat16' (half the size, 8 bits of precision) or 'float32' (exact).

    Raises:
      ValueError: a leaf outside 'stats' is not finite in `dtype`; the message names it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")

    def stored(name: str, leaf) -> np.dtype:
        original = np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        floating = original == ml_dtypes.bfloat16 or np.issubdtype(original, np.floating)
        return np.dtype(DTYPES[dtype]) if floating and not name.startswith("stats/") else original

    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = flatten(params)
    types = {name: stored(name, leaf) for name, leaf in flat.items()}
    write_tensors(directory / WEIGHTS_FILE, flat, types)
    write_json(directory / CONFIG_FILE, config)


def write_tensors(
    path: AnyPath, tensors: Mapping[str, Any], types: Mapping[str, np.dtype], kind: str = "np"
) -> None:
    """Writes a safetensors file with one tensor at a time in memory.

    Args:
      path: the file.
      tensors: name -> an object with a shape that numpy converts to an array.
      types: name -> its type in the file.
      kind: the library in the file's metadata, 'np' or 'pt'.

    Raises:
      ValueError: a tensor outside 'stats' is not finite in its type; the message names it.
    """
    path = epath.Path(path)
    names = sorted(tensors, key=lambda name: (-types[name].itemsize, name))  # aligns every tensor
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": kind}}
    end = 0
    for name in names:
        shape = [int(length) for length in np.shape(tensors[name])]
        begin, end = end, end + math.prod(shape) * types[name].itemsize
        header[name] = dict(dtype=_SAFETENSORS[types[name].name], shape=shape, data_offsets=[begin, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.atomic_write(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = np.asarray(partition.to_host(tensors[name]), types[name])
            if not name.startswith("stats/") and not is_finite(array):  # unmeasured statistics are NaN
                raise ValueError(
                    f"{path}: {name} would hold numbers that are not finite in {types[name].name}"
                )
            file.write(np.ascontiguousarray(array).tobytes())


def write_json(path: AnyPath, value: Any) -> None:
    """Writes indented JSON atomically."""
    with files.atomic_write(path) as partial:
        partial.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


class Lazy:
    """An array of this shape and dtype, computed or read each time that numpy asks for it."""

    def __init__(self, shape: Sequence[int], make: Callable[[], np.ndarray], dtype: Any = np.float32):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)
        self._make = make

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._make(), self.dtype)
        if array.shape != self.shape:
            raise ValueError(f"an array was to have shape {self.shape}, it has {array.shape}")
        return array if dtype is None else array.astype(dtype)


def load_stage(
    directory: AnyPath,
    keep_dtype: bool = False,
    place: Callable[[np.ndarray], Any] = lambda leaf: leaf,
    lazy: bool = False,
) -> tuple[dict, dict]:
    """(config, params) of a stage's directory: JSON values, and nested dicts of numpy arrays.

    Args:
      directory: the stage's folder.
      keep_dtype: leaves keep their stored types; otherwise narrow floats become float32.
      place: applied to each leaf when it is read, such as a move to a device.
      lazy: leaves of a folder on the disk are `Lazy`, for models that are larger than the memory.

    Raises:
      FileNotFoundError: the directory or one of its files is missing. ValueError: a file is damaged.
    """
    import safetensors

    directory = epath.Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} is not a stage of a model directory: it has no {name}")
    config, where = _read_json(directory / CONFIG_FILE), os.fspath(directory / WEIGHTS_FILE)
    flat: dict[str, Any] = {}
    with _local_copy(directory / WEIGHTS_FILE) as path:
        if damage := files.damage(path):
            raise ValueError(f"{directory / WEIGHTS_FILE} {damage}")
        lazy = lazy and path == where  # the copy of a file in a bucket is gone afterwards
        try:
            with safetensors.safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if lazy:
                        flat[name] = _stored(file.get_slice(name), path, name, keep_dtype)
                        continue
                    leaf = _checked(file.get_tensor(name), where, name)
                    widen = not keep_dtype and leaf.dtype in _NARROW
                    flat[name] = place(leaf.astype(np.float32) if widen else leaf)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} is not a whole safetensors file: {error}"
            ) from error
    return config, unflatten(flat)


def _stored(found: Any, path: str, name: str, keep_dtype: bool) -> Lazy:
    """The lazy leaf of an array that safetensors found."""
    import safetensors

    def read() -> np.ndarray:
        with safetensors.safe_open(path, framework="np") as file:
            return _checked(file.get_tensor(name), path, name)

    kind = np.dtype({short: long for long, short in _SAFETENSORS.items()}[found.get_dtype()])
    return Lazy(found.get_shape(), read, np.float32 if not keep_dtype and kind in _NARROW else kind)


def _checked(leaf: np.ndarray, path: str, name: str) -> np.ndarray:
    """The leaf `name` of a file; ValueError for numbers that are not finite."""
    if not name.startswith("stats/") and not is_finite(leaf):
        raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return leaf


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite; bfloat16 by its bits, since numpy is slow for it."""
    if array.dtype == ml_dtypes.bfloat16:
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def write_index(
    directory: AnyPath,
    stages: Mapping[str, Mapping[str, Any] | str],
    *,
    system: str = "unclip",
    tokenizer: str = "",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes MODEL/model_index.json.

    Args:
      directory: the model directory.
      stages: name -> entry, in the order of sampling. An entry has 'folder', relative to the directory;
        'uses', the frozen stages that compute its inputs, such as {"clip": "clip"}; 'tokenizer', a folder, ""
        for none. A string means {'folder': it, 'tokenizer': `tokenizer`}.
      system: a name in `systems.SYSTEMS`.
      tokenizer: see `stages`.
      extra: more JSON values, such as the model's name.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries = {
        name: dict(entry) if isinstance(entry, Mapping) else {"folder": entry, "tokenizer": tokenizer}
        for name, entry in stages.items()
    }
    # The class name is the same for every system: older programs then refuse the version with "update".
    index = {"_class_name": "UnCLIP", "format_version": FORMAT_VERSION, "system": system, "stages": entries}
    write_json(directory / INDEX_FILE, index | dict(extra or {}))


def read_index(directory: AnyPath) -> dict:
    """The contents of MODEL/model_index.json as version 2 (see `write_index`), with all keys of each stage.

    Raises:
      FileNotFoundError: not a model directory, or the file of a stage or a tokenizer is missing.
      ValueError: a damaged index, or one of a newer version.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise FileNotFoundError(f"no model directory {directory}")
    if not (directory / INDEX_FILE).exists():
        hint = ""
        if (directory / "checkpoints").exists():
            hint = "; it is a training workdir: export it with `python -m dalle2_jax.convert export`"
        elif (directory / WEIGHTS_FILE).exists():
            hint = "; it is one stage of a model directory: give the folder above it"
        raise FileNotFoundError(f"{directory} is not a model directory: it has no {INDEX_FILE}{hint}")
    index = _read_json(directory / INDEX_FILE)
    version, is_ours = index.get("format_version"), index.get("_class_name") == "UnCLIP"
    if not is_ours or not isinstance(index.get("stages"), dict) or not isinstance(version, int):
        raise ValueError(
            f"{directory / INDEX_FILE} is not the index of an UnCLIP model directory of this project"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{directory} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update dalle2_jax"
        )
    if version == 1:
        index = _from_version_1(index)
    if not all(isinstance(entry, dict) for entry in index["stages"].values()):
        raise ValueError(f"{directory / INDEX_FILE} is damaged: a stage's entry is no JSON object")
    index["stages"] = {name: {"uses": {}, "tokenizer": ""} | entry for name, entry in index["stages"].items()}
    needed = [
        (f"stage {name!r}", _inside(directory, entry.get("folder")) / file)
        for name, entry in index["stages"].items()
        for file in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    tokenizers = [entry["tokenizer"] for entry in index["stages"].values() if entry["tokenizer"]]
    for owner, path in needed + [("it", _inside(directory, tokenizer)) for tokenizer in tokenizers]:
        if not path.exists():
            raise FileNotFoundError(f"model directory {directory} is incomplete: {owner} lacks {path}")
    return index


def _from_version_1(index: dict) -> dict:
    """An index of version 1 (role -> folder, and a list of upsamplers) as version 2."""
    roles, folders = dict(index["stages"]), index["stages"].get("upsamplers", [])
    folders = {folder: folder for folder in folders} if isinstance(folders, list) else {"upsamplers": folders}
    roles.pop("upsamplers", None)
    order = ("clip", "prior", "decoder", "noisy_clip", "classifier", *roles)
    named = {role: roles[role] for role in dict.fromkeys(order) if role in roles} | folders
    tokenizer = index.get("tokenizer", "tokenizer") or ""
    stages = {name: {"folder": folder, "tokenizer": tokenizer} for name, folder in named.items()}
    return {"system": "unclip"} | index | {"stages": stages}


def _inside(directory: epath.Path, folder: Any) -> epath.Path:
    """The folder of an entry. A model directory may come from anyone: its index may name folders in it
    only."""
    inside = isinstance(folder, str) and folder and "://" not in folder
    if not inside or Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError(
            f"{directory / INDEX_FILE} names the folder {folder!r}: it must be relative and inside the model "
            "directory"
        )
    return directory / folder


def _read_json(path: epath.Path) -> dict:
    try:
        value = json.loads(files.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def _local_copy(path: epath.Path) -> Iterator[str]:
    """Yields the path of a local file with the contents of `path`, which may be in a bucket."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        path.copy(local)
        yield str(local)

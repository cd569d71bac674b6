"""Parameters by name, and model directories.

A model directory is what generating needs and nothing else, readable with safetensors and a JSON parser:

    MODEL/model_index.json                      which stages there are, and where
    MODEL/<stage>/config.json                   the config that the stage was trained with
    MODEL/<stage>/model.safetensors             its averaged weights under flat names, bfloat16 or float32
    MODEL/tokenizer/                            see data/tokenizer.py
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from dalle2_jax.runtime import files, partition
from dalle2_jax.runtime.names import nearest

FORMAT_VERSION = 2
CARD_FILE = "README.md"  # the model card
INDEX_FILE, CONFIG_FILE, WEIGHTS_FILE = "model_index.json", "config.json", "model.safetensors"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# safetensors' names of types
_SAFETENSORS = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint32": "U32",
    "uint8": "U8",
    "bool": "BOOL",
}


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {'a/b/kernel': leaf} of any pytree, in its own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {partition.path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Returns the nested dicts of {'a/b/kernel': leaf}."""
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
        narrow = leaf.dtype in (ml_dtypes.bfloat16, np.float16)
        digest.update(np.ascontiguousarray(leaf, np.float32 if narrow else None).tobytes())
    return digest.hexdigest()


def check_params(params: Any, abstract: Any, where: str = "the parameters") -> None:
    """Raises ValueError naming what differs unless `params` has exactly the leaves and shapes of `abstract`.

    Args:
      params: pytree of arrays (or of anything with a shape).
      abstract: the same pytree as the model defines it, of arrays or ShapeDtypeStructs.
      where: what the message calls `params`, for instance its path.
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
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    lines = []
    for title, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
        for name in names[:limit]:
            if title == "missing":
                near = nearest(name, surplus)
                hint = f" (is {near} meant for it?)" if near else ""
                lines.append(f"  missing: {name} {_show(expected[name])}{hint}")
            elif title == "surplus":
                lines.append(f"  surplus: {name} {_show(found[name])}")
            else:
                lines.append(
                    f"  misshapen: {name} has {_show(found[name])}, the model expects {_show(expected[name])}"
                )
        if len(names) > limit:
            lines.append(f"  ... and {len(names) - limit} more {title}")
    return lines


def _show(shape: tuple) -> str:
    return "[" + ", ".join(str(entry) for entry in shape) + "]"


def save_stage(
    directory: str | os.PathLike, config: Mapping[str, Any], params: Any, dtype: str = "bfloat16"
) -> None:
    """Writes a stage's config.json and model.safetensors; the same input gives the same bytes.

    Args:
      directory: made if absent; files of the same name are replaced.
      config: JSON values that are enough to rebuild the stage.
      params: nested dict of arrays, or of what numpy makes arrays of, which are made one at a time; floating
        leaves are stored as `dtype`, others and statistics (the leaves of 'stats') as they are.
      dtype: 'bfloat16' (half the size, 8 bits of precision) or 'float32' (exact).

    Raises:
      ValueError: a leaf outside 'stats' has numbers that are not finite in `dtype`; it is named.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")

    def stored(name: str, leaf) -> np.dtype:
        own = np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        floating = own == ml_dtypes.bfloat16 or np.issubdtype(own, np.floating)
        return np.dtype(DTYPES[dtype]) if floating and not name.startswith("stats/") else own

    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = flatten(params)
    types = {name: stored(name, leaf) for name, leaf in flat.items()}
    write_tensors(directory / WEIGHTS_FILE, flat, types)
    write_json(directory / CONFIG_FILE, config)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], types: Mapping[str, np.dtype], kind: str = "np"
) -> None:
    """Writes a safetensors file, one tensor after the other, so that one at a time is in memory.

    Args:
      path: the file.
      tensors: name -> anything with a shape that numpy can make an array of.
      types: name -> what it is stored as.
      kind: the library that the file says it is for, 'np' or 'pt'.

    Raises:
      ValueError: a tensor outside 'stats' has numbers that are not finite in its type; it is named.
    """
    path = epath.Path(path)
    names = sorted(tensors, key=lambda name: (-types[name].itemsize, name))  # so every tensor is aligned
    header, end = {"__metadata__": {"format": kind}}, 0
    for name in names:
        shape = [int(length) for length in np.shape(tensors[name])]
        begin, end = end, end + math.prod(shape) * types[name].itemsize
        header[name] = dict(dtype=_SAFETENSORS[types[name].name], shape=shape, data_offsets=[begin, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.whole(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = np.asarray(partition.to_host(tensors[name]), types[name])
            if not name.startswith("stats/") and not is_finite(array):  # what was not measured is NaN
                raise ValueError(
                    f"{path}: {name} would hold numbers that are not finite in {types[name].name}"
                )
            file.write(np.ascontiguousarray(array).tobytes())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON as people read it, in one stroke."""
    with files.whole(path) as partial:
        partial.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def load_stage(
    directory: str | os.PathLike,
    keep_dtype: bool = False,
    place: Callable[[np.ndarray], Any] = lambda leaf: leaf,
) -> tuple[dict, dict]:
    """Returns (config, params) of a stage's directory: plain JSON values, and nested dicts of numpy arrays.

    Args:
      directory: the stage's.
      keep_dtype: whether leaves keep the type that they are stored in; else floating ones become float32.
      place: what becomes of a leaf as soon as it is read, such as moving it to a device.

    Raises:
      FileNotFoundError: no such directory, or a file is missing in it.
      ValueError: a file is damaged.
    """
    import safetensors

    directory = epath.Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} is not a stage of a model directory: it has no {name}")
    config = _read_json(directory / CONFIG_FILE)
    flat = {}
    with _local_copy(directory / WEIGHTS_FILE) as path:
        if damage := files.damage(path):
            raise ValueError(f"{directory / WEIGHTS_FILE} {damage}")
        try:
            with safetensors.safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    leaf = file.get_tensor(name)
                    if not name.startswith("stats/") and not is_finite(leaf):  # what was not measured is NaN
                        raise ValueError(
                            f"{directory / WEIGHTS_FILE}: {name} holds numbers that are not finite"
                        )
                    narrow = not keep_dtype and leaf.dtype in (ml_dtypes.bfloat16, np.float16)
                    flat[name] = place(leaf.astype(np.float32) if narrow else leaf)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} is not a whole safetensors file: {error}"
            ) from error
    return config, unflatten(flat)


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are; by the bits of bfloat16, for which numpy is slow."""
    if array.dtype == ml_dtypes.bfloat16:
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def write_index(
    directory: str | os.PathLike,
    stages: Mapping[str, Mapping[str, Any] | str],
    *,
    system: str = "unclip",
    tokenizer: str = "",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes MODEL/model_index.json.

    Args:
      directory: the model directory.
      stages: name -> entry, in the order in which they run. An entry has 'folder', relative to the directory;
        'uses', the frozen stages that compute its inputs, such as {"clip": "clip"}; 'tokenizer', the folder
        of its tokenizer, "" for none. A text is the entry's folder alone.
      system: what the stages are together, a name in `systems.SYSTEMS`.
      tokenizer: the tokenizer of the stages whose entry is a text.
      extra: more JSON values, such as the model's name or a description.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries = {
        name: dict(entry) if isinstance(entry, Mapping) else {"folder": entry, "tokenizer": tokenizer}
        for name, entry in stages.items()
    }
    # The class name is the same for every system: by it and the version, older programs say "update".
    index = {"_class_name": "UnCLIP", "format_version": FORMAT_VERSION, "system": system, "stages": entries}
    write_json(directory / INDEX_FILE, index | dict(extra or {}))


def read_index(directory: str | os.PathLike) -> dict:
    """Returns the contents of MODEL/model_index.json after checking that all that it names is there.

    An index of version 1 is returned as version 2: 'system', and 'stages' as `write_index` has them, with all
    keys.

    Raises:
      FileNotFoundError: not a model directory, or a stage's or the tokenizer's folder or file is missing.
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
    version = index.get("format_version")
    if (
        index.get("_class_name") != "UnCLIP"
        or not isinstance(index.get("stages"), dict)
        or not isinstance(version, int)
    ):
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
    for name, entry in index["stages"].items():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            path = _inside(directory, entry.get("folder")) / file
            if not path.exists():
                raise FileNotFoundError(
                    f"model directory {directory} is incomplete: stage {name!r} lacks {path}"
                )
    for tokenizer in (entry["tokenizer"] for entry in index["stages"].values()):
        if tokenizer and not _inside(directory, tokenizer).exists():
            raise FileNotFoundError(
                f"model directory {directory} is incomplete: it lacks {directory / tokenizer}"
            )
    return index


def _from_version_1(index: dict) -> dict:
    """An index of version 1, role -> folder and a list of upsamplers, as version 2."""
    roles, folders = dict(index["stages"]), index["stages"].get("upsamplers", [])
    folders = {folder: folder for folder in folders} if isinstance(folders, list) else {"upsamplers": folders}
    roles.pop("upsamplers", None)
    order = ("clip", "prior", "decoder", "noisy_clip", "classifier", *roles)
    named = {role: roles[role] for role in dict.fromkeys(order) if role in roles} | folders
    tokenizer = index.get("tokenizer", "tokenizer") or ""
    stages = {name: {"folder": folder, "tokenizer": tokenizer} for name, folder in named.items()}
    return {"system": "unclip"} | index | {"stages": stages}


def _inside(directory: epath.Path, folder: Any) -> epath.Path:
    """A model directory may come from anyone: what its index names must lie inside it."""
    if (
        not isinstance(folder, str)
        or not folder
        or Path(folder).is_absolute()
        or ".." in Path(folder).parts
        or "://" in folder
    ):
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
    """Path of a local file with the contents of `path`, which may lie in a bucket."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        path.copy(local)
        yield str(local)

"""Files of tensors, read one tensor at a time: safetensors, its shards, and torch's archives."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from dalle2_jax.convert import torch_legacy, wrappers
from dalle2_jax.convert.torch_archive import TorchArchive, is_archive
from dalle2_jax.runtime import files, modeldir

# Names of weights in folders of transformers and diffusers, in the order of the search. Those of OpenCLIP may
# lie in the same folder.
WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Types of safetensors that are read.
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_NARROW = (ml_dtypes.bfloat16, np.float16)


class Tensors(Mapping):
    """Name -> array. `shapes` are found without reading; an array is read when it is accessed.

    Floating arrays are converted to float32. An array that is not finite is a ValueError.
    `notes`: lines for the user on how the tensors were found.
    """

    def __init__(
        self,
        source: str,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        files: Iterable[Path] = (),
        notes: Iterable[str] = (),
    ):
        self.source, self.shapes, self._read = source, dict(shapes), read
        self.files, self.notes = tuple(files), tuple(notes)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._read(name)
        if array.dtype in (*_NARROW, np.float64):
            with np.errstate(over="ignore"):  # of float64; reported below
                array = array.astype(np.float32)
        if not modeldir.is_finite(array):
            count = np.count_nonzero(~np.isfinite(array))
            raise ValueError(
                f"{self.source}: of the {array.size:,} numbers of {name} {count:,} are not finite (NaN or "
                "infinite). The weights are spoilt: take an earlier checkpoint, or download them again"
            )
        return array

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; ValueError for an unknown name."""
        if name not in self.shapes:
            heads = [f"{head} ({count})" for head, count in wrappers.heads(self.shapes).items()]
            more = f", and {len(heads) - 10} more" if len(heads) > 10 else ""
            held = ", ".join(heads[:10]) + more if heads else "no tensors"
            raise ValueError(f"{self.source} has no tensor {name}: it is not of this format. It holds {held}")
        return self.shapes[name]

    def renamed(self, names: Mapping[str, str], source: str = "", notes=()) -> "Tensors":
        """The tensors of `names`: new name -> name here; `source` replaces the source, `notes` are added."""
        shapes = {new: self.shapes[old] for new, old in names.items()}
        notes = (*self.notes, *notes)
        return Tensors(source or self.source, shapes, lambda new: self._read(names[new]), self.files, notes)


def parted(tensors: Tensors, parts: Mapping[str, tuple[str, int, slice | list[int]]]) -> Tensors:
    """`tensors` with some of them split.

    parts: new name -> (the split tensor, which is removed; an axis; the entries along it).
    """
    shapes = dict(tensors.shapes)
    for name, (split, axis, entries) in parts.items():
        shape = list(tensors.shape(split))
        shape[axis] = len(np.arange(shape[axis])[entries])
        shapes[name] = tuple(shape)
        shapes.pop(split, None)

    def read(name):
        if name not in parts:
            return tensors[name]
        split, axis, entries = parts[name]
        return tensors[split][(slice(None),) * axis + (entries,)]

    return Tensors(tensors.source, shapes, read, tensors.files, tensors.notes)


def joined(parts: Mapping[str, Tensors]) -> Tensors:
    """Several sources as one; the key of each prefixes its names: {'decoder.': ..., 'text_proj.': ...}."""
    where = {prefix + name: (prefix, name) for prefix, part in parts.items() for name in part.shapes}
    shapes = {full: parts[prefix].shapes[name] for full, (prefix, name) in where.items()}
    source = " and ".join(part.source for part in parts.values())
    files = [file for part in parts.values() for file in part.files]
    notes = [note for part in parts.values() for note in part.notes]
    return Tensors(source, shapes, lambda full: parts[where[full][0]][where[full][1]], files, notes)


def open_tensors(path: str | os.PathLike, names: tuple[str, ...] = WEIGHTS) -> Tensors:
    """The tensors of a file, or of a folder of transformers or diffusers; nothing is executed.

    For a training checkpoint these are the model's tensors under the names of the model: see wrappers.py.

    Args:
      path: the file or folder.
      names: names of weights in a folder; the first that exists is read.

    Raises:
      FileNotFoundError: no such file, or no weights in the folder.
      ValueError: the file is damaged or of another kind, or the model in it is ambiguous.
    """
    tensors = _open(Path(path), names)
    found = wrappers.unwrap(tensors.shapes, tensors.source)
    if list(found.names) == list(found.names.values()):
        return tensors
    source = f"{tensors.source} ({found.below}*)" if found.below else tensors.source
    notes = ([f"read {found.below}*"] if found.below else []) + list(found.notes)
    return tensors.renamed(found.names, source, [f"{Path(tensors.source).name}: {note}" for note in notes])


def open_module(path: str | os.PathLike) -> Tensors:
    """The tensors of a whole module that torch pickled, under the names of its parameters.

    Nothing of the pickle is executed. Raises FileNotFoundError or ValueError as `open_tensors`.
    """
    tensors = _open(Path(path))
    names = {re.sub(r"_(modules|parameters|buffers)\.", "", name): name for name in tensors.shapes}
    return tensors.renamed(names)


def _open(path: Path, names: tuple[str, ...] = WEIGHTS) -> Tensors:
    """All tensors of a file or folder under their names there."""
    if path.is_dir():
        for name in names:
            if (path / name).exists():
                return _open(path / name)
            if (path / f"{name}.index.json").exists():
                return _open_shards(path / f"{name}.index.json")
        raise FileNotFoundError(f"{path} holds no weights: expected one of {', '.join(names)}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if damage := files.damage(path):
        raise ValueError(f"{path} {damage}")
    if is_archive(path):
        archive = TorchArchive(path)
        shapes = {name: tensor.shape for name, tensor in archive.tensors.items()}
        return Tensors(str(path), shapes, archive.read, [path])
    if path.suffix == ".safetensors" or _looks_like_safetensors(path):
        return _open_safetensors(path)
    arrays = torch_legacy.read_legacy(path)
    return Tensors(str(path), {name: x.shape for name, x in arrays.items()}, arrays.__getitem__, [path])


def _looks_like_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors do: a length, then a JSON object."""
    with open(path, "rb") as file:
        return file.read(10)[8:] == b'{"'


def _open_safetensors(path: Path) -> Tensors:
    try:
        file = safetensors.safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error

    def read(name: str) -> np.ndarray:
        stored = slices[name].get_dtype()
        if stored not in _TYPES:
            raise ValueError(f"{path}: {name} is stored as {stored}, which is not read: save it as float16")
        return file.get_tensor(name)

    return Tensors(str(path), {name: tuple(x.get_shape()) for name, x in slices.items()}, read, [path])


def _open_shards(path: Path) -> Tensors:
    """The tensors of the shards in an index; the shards must lie beside it."""
    try:
        where = json.loads(path.read_text())["weight_map"]
        named = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of shards: {error!r}") from error
    for name in named:
        if Path(name).name != name:
            raise ValueError(f"{path} names the file {name!r}: it must lie in the same folder")
    missing = [name for name in named if not (path.parent / name).exists()]
    if missing:
        absent = f"{len(missing)} are not there: {', '.join(missing[:5])}"
        raise FileNotFoundError(f"{path} names {len(named)} files, {absent}")
    shards = {name: _open(path.parent / name) for name in named}
    missing = sorted(name for name, shard in where.items() if name not in shards[shard].shapes)
    if missing:
        raise ValueError(f"{path} names {missing[0]}, which its shard does not hold")
    shapes = {name: shards[shard].shapes[name] for name, shard in where.items()}
    files = [file for shard in shards.values() for file in shard.files]
    return Tensors(str(path), shapes, lambda name: shards[where[name]]._read(name), files)

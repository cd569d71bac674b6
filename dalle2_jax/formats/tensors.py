"""Files of tensors, read one tensor at a time: safetensors, its shards, and torch's archives."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dalle2_jax.formats import torch_legacy
from dalle2_jax.formats.torch_archive import TorchArchive, is_archive

# What folders of transformers and diffusers call their weights, in the order in which they are looked for.
WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
_NARROW = (ml_dtypes.bfloat16, np.float16)


class Tensors(Mapping):
    """Name -> array; `shapes` are known without reading, an array is read when it is asked for.

    Floating arrays come as float32 whatever they are stored in.
    """

    def __init__(
        self, source: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], files=()
    ):
        self.source, self.shapes, self.files = source, dict(shapes), tuple(files)
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._read(name)
        return array.astype(np.float32) if array.dtype in (*_NARROW, np.float64) else array

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that has to be there; ValueError if it is not."""
        if name not in self.shapes:
            raise ValueError(f"{self.source} has no tensor {name}: it is not of this format")
        return self.shapes[name]

    def below(self, *prefixes: str) -> "Tensors":
        """The tensors whose names begin with the first of `prefixes` that any has, without it."""
        for prefix in prefixes:
            found = {
                name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)
            }
            if found:
                return Tensors(self.source, found, lambda name, p=prefix: self._read(p + name), self.files)
        raise ValueError(f"{self.source} has no tensors called {' or '.join(p + '*' for p in prefixes)}")


def parted(tensors: Tensors, parts: Mapping[str, tuple[str, int, slice | list[int]]]) -> Tensors:
    """`tensors` with some cut up.

    parts: new name -> (the tensor, which is no longer there; an axis; the entries along it).
    """
    shapes = dict(tensors.shapes)
    for name, (whole, axis, entries) in parts.items():
        shape = list(tensors.shape(whole))
        shape[axis] = len(np.arange(shape[axis])[entries])
        shapes[name] = tuple(shape)
        shapes.pop(whole, None)

    def read(name):
        if name not in parts:
            return tensors[name]
        whole, axis, entries = parts[name]
        return tensors[whole][(slice(None),) * axis + (entries,)]

    return Tensors(tensors.source, shapes, read, tensors.files)


def joined(parts: Mapping[str, Tensors]) -> Tensors:
    """Several sources as one, the names of each behind its key: {'decoder.': ..., 'text_proj.': ...}."""
    where = {prefix + name: (prefix, name) for prefix, part in parts.items() for name in part.shapes}
    shapes = {full: parts[prefix].shapes[name] for full, (prefix, name) in where.items()}
    source = " and ".join(part.source for part in parts.values())
    files = [file for part in parts.values() for file in part.files]
    return Tensors(source, shapes, lambda full: parts[where[full][0]][where[full][1]], files)


def open_tensors(path: str | os.PathLike) -> Tensors:
    """The tensors of a file, or of a folder as transformers and diffusers write them; nothing is executed.

    Raises:
      FileNotFoundError: there is no such file, or no weights in the folder.
      ValueError: the file is damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        for name in WEIGHTS:
            if (path / name).exists():
                return open_tensors(path / name)
            if (path / f"{name}.index.json").exists():
                return _open_shards(path / f"{name}.index.json")
        raise FileNotFoundError(f"{path} holds no weights: expected one of {', '.join(WEIGHTS)}")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if is_archive(path):
        archive = TorchArchive(path)
        shapes = {name: tensor.shape for name, tensor in archive.tensors.items()}
        return Tensors(str(path), shapes, archive.read, [path])
    arrays = torch_legacy.read_legacy(path)
    return Tensors(str(path), {name: x.shape for name, x in arrays.items()}, arrays.__getitem__, [path])


def _open_safetensors(path: Path) -> Tensors:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="np")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return Tensors(str(path), shapes, file.get_tensor, [path])


def _open_shards(path: Path) -> Tensors:
    """The tensors of the shards that an index names, which must lie beside it."""
    where = json.loads(path.read_text())["weight_map"]
    for name in set(where.values()):
        if Path(name).name != name:
            raise ValueError(f"{path} names the file {name!r}: it must lie in the same folder")
    shards = {name: open_tensors(path.parent / name) for name in sorted(set(where.values()))}
    missing = sorted(name for name, shard in where.items() if name not in shards[shard].shapes)
    if missing:
        raise ValueError(f"{path} names {missing[0]}, which its shard does not hold")
    shapes = {name: shards[shard].shapes[name] for name, shard in where.items()}
    files = [file for shard in shards.values() for file in shard.files]
    return Tensors(str(path), shapes, lambda name: shards[where[name]][name], files)


def sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

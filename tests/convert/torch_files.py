"""Files of weights as torch writes them, written without torch: archives, the old layout, TorchScript."""

import dataclasses
import io
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dalle2_jax.convert import torch_legacy
from dalle2_jax.convert.tensors import open_tensors

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.th")


@dataclasses.dataclass
class Object:
    """What a pickle makes of a class by its name, with the attributes `state`."""

    name: str  # 'module name'
    state: dict


def _pickled(tree: Any, storages: list[np.ndarray]) -> bytes:
    """`tree` as torch pickles it (protocol 2); its arrays are added to `storages`."""
    out = io.BytesIO(b"")

    def put(node):
        if node is None or isinstance(node, bool):
            out.write({None: b"N", True: b"\x88", False: b"\x89"}[node])
        elif isinstance(node, int):
            out.write(b"J" + struct.pack("<i", node) if abs(node) < 1 << 31 else _long(node))
        elif isinstance(node, float):
            out.write(b"G" + struct.pack(">d", node))
        elif isinstance(node, str):
            out.write(b"X" + struct.pack("<I", len(node.encode())) + node.encode())
        elif isinstance(node, list | tuple):
            out.write(b"](" if isinstance(node, list) else b"(")
            for item in node:
                put(item)
            out.write(b"e" if isinstance(node, list) else b"t")
        elif isinstance(node, dict):
            out.write(b"}(")
            for key, value in node.items():
                put(key)
                put(value)
            out.write(b"u")
        elif isinstance(node, Object):
            out.write(b"c" + node.name.replace(" ", "\n").encode() + b"\n)\x81")
            put(node.state)
            out.write(b"b")
        else:
            tensor(np.ascontiguousarray(node).reshape(np.shape(node)))

    def tensor(array):
        key, strides = str(len(storages)), [stride // array.itemsize for stride in array.strides]
        storages.append(array)
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        put("storage")
        out.write(b"ctorch\n" + _STORAGES[array.dtype].encode() + b"\n")
        for item in (key, "cpu", array.size):
            put(item)
        out.write(b"tQ")
        for item in (0, array.shape, tuple(strides), False):
            put(item)
        out.write(b"ccollections\nOrderedDict\n)RtR")

    out.write(b"\x80\x02")
    put(tree)
    return out.getvalue() + b"."


def _long(number: int) -> bytes:
    digits = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def save(path: Path, tree: Any, script: bool = False) -> Path:
    """As torch.save does; `script`: as torch.jit.save does, whose code is compressed."""
    storages: list[np.ndarray] = []
    data, root = _pickled(tree, storages), path.stem
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", data)
        if script:
            archive.writestr(f"{root}/code/__torch__.py", "class CLIP" * 99, zipfile.ZIP_DEFLATED)
            archive.writestr(f"{root}/constants.pkl", b"\x80\x02).")
        for number, array in enumerate(storages):
            archive.writestr(f"{root}/data/{number}", array.tobytes())
    return path


def save_legacy(path: Path, tree: Any) -> Path:
    """As torch.save did before version 1.6."""
    storages: list[np.ndarray] = []
    data = _pickled(tree, storages)
    head = [torch_legacy.MAGIC, torch_legacy.LAYOUT, {"little_endian": True}]
    keys = [str(number) for number in range(len(storages))]
    raw = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages)
    path.write_bytes(b"".join(_pickled(part, []) for part in head) + data + _pickled(keys, []) + raw)
    return path


def module(state: dict[str, np.ndarray]) -> Object:
    """A scripted module with these tensors, nested as their names are."""
    root = Object("__torch__ CLIP", {"training": False})
    for name, value in state.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.state.setdefault(parent, Object("__torch__.torch.nn Module", {}))
        node.state[last] = value
    return root


def wrap_folder(source: Path, copy: Path) -> Path:
    """A copy of a folder of weights in which each file is a checkpoint of training with DDP."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("out"))
    for path in [path for pattern in WEIGHTS for path in copy.rglob(pattern)]:
        tensors = open_tensors(path)
        tree = {"epoch": 3, "state_dict": {f"module.{name}": tensors[name] for name in tensors}}
        path.unlink()
        names = {"model": "pytorch_model.bin", "diffusion_pytorch_model": "diffusion_pytorch_model.bin"}
        save(path.with_name(names[path.stem]) if path.suffix == ".safetensors" else path, tree)
    return copy


def weights(model: Path) -> dict[str, bytes]:
    """{file: bytes} of a model directory's weights."""
    return {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*.safetensors")}

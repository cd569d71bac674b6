"""Torch's zip archives (torch.save, torch.jit.save), read as data: no torch, and nothing is executed.

An archive holds `data.pkl` and one file of raw numbers for each storage. The pickle is a program for a stack
machine. Here only instructions that build containers and describe tensors have an effect: a function or class
stays a name, and a call of an unknown one yields an `Opaque`.

Nothing is larger in memory than in the file. Torch does not compress, so a compressed archive is refused, and
so is a tensor with more numbers than its storage. A pickle may refer to one list many times and so describe
an endless tree: at most _MAX_NODES nodes are visited. At most as many instructions run; each makes an object
of some hundred bytes, or one of the size of its text in the file.
"""

import dataclasses
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

# Types of storages by the end of their names.
_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_DEPTH = 64
_MAX_NODES = 1_000_000
_MAX_PICKLE_BYTES = 64 << 20
_MARK = object()


@dataclasses.dataclass
class Opaque:
    """The result of a call in the pickle: name of the callee, arguments, and state set later."""

    name: str
    arguments: Any = ()
    state: Any = None


@dataclasses.dataclass(frozen=True)
class _Symbol:
    name: str


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: file of its storage, dtype, offset and strides in elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_archive(path) -> bool:
    """Whether the file is a zip archive. Raises ValueError for a truncated archive."""
    if zipfile.is_zipfile(path):
        return True
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        raise ValueError(
            f"{path} is truncated: it begins as an archive of torch, and the list of its files, which ends "
            f"an archive, is missing after {os.path.getsize(path):,} bytes. Download or copy it again"
        )
    return False


class TorchArchive:
    """An open archive. `tensors`: dotted name -> StoredTensor. `read` returns one.

    Tensors in tuples and lists are named by their numbers. Raises ValueError for a file that torch did not
    write.
    """

    def __init__(self, path):
        try:
            self._read_tree(path)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is a damaged archive: {error}. Download or copy it again") from error

    def _read_tree(self, path) -> None:
        self._zip = zipfile.ZipFile(path)
        pickles = [name for name in self._zip.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip archive, but none of torch: it has no data.pkl")
        self._root = pickles[0].split("/")[0]
        order, storages = f"{self._root}/byteorder", f"{self._root}/data/"
        for entry in self._zip.infolist():  # of TorchScript, the code is compressed, which is not read
            read = entry.filename in (pickles[0], order) or entry.filename.startswith(storages)
            if read and entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path} has compressed numbers, which torch does not write")
        if self._zip.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"{path}: its data.pkl has more than {_MAX_PICKLE_BYTES >> 20} MiB")
        if order in self._zip.namelist() and self._zip.read(order).strip() == b"big":
            raise ValueError(f"{path} has big-endian numbers, which are not read")
        try:
            tree = walk(self._zip.read(pickles[0]))
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its data.pkl is damaged ({error!r})") from error
        self.tensors = tensors_in(tree)
        if not self.tensors and any(name.startswith(f"{self._root}/code/") for name in self._zip.namelist()):
            raise ValueError(
                f"{path} is TorchScript without parameters: torch.jit.freeze or optimize_for_inference made "
                "constants of them, which have no names. Save the module before that"
            )

    def read(self, name: str) -> np.ndarray:
        """The tensor of this name, as it is stored. Raises ValueError for a storage that is too short."""
        tensor = self.tensors[name]
        size = tensor.dtype.itemsize

        def stored(first: int, count: int) -> np.ndarray:
            with self._zip.open(f"{self._root}/data/{tensor.storage}") as file:
                file.seek(first * size)
                data = file.read(count * size)
            return np.frombuffer(data[: len(data) // size * size], tensor.dtype)

        try:
            return build(name, tensor, stored)
        except (KeyError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise ValueError(f"the numbers of tensor {name} are missing or damaged: {error}") from error


def build(name: str, tensor: StoredTensor, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """The array of a tensor; read: (first, count) -> numbers of its storage, fewer at the storage's end.

    Raises ValueError for a tensor outside its storage or with more numbers than it.
    """
    outside = f"tensor {name} lies outside its storage: the file is damaged"
    if min((tensor.offset, *tensor.strides, *tensor.shape)) < 0:
        raise ValueError(outside)
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    count = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.strides, strict=True))
    if np.prod(tensor.shape, dtype=np.float64) > count:
        raise ValueError(f"tensor {name} has more numbers than its storage, which is not read")
    flat = read(tensor.offset, count)
    if len(flat) != count:
        raise ValueError(outside)
    strides = [step * tensor.dtype.itemsize for step in tensor.strides]
    return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides), order="C")


def tensors_in(tree: Any) -> dict[str, StoredTensor]:
    """{dotted name: tensor} in a tree of dicts, lists and objects. ValueError for an endless tree."""
    found, visited = {}, 0
    waiting: list[Iterator[tuple[tuple[str, ...], Any]]] = [iter([((), tree)])]  # the rest at each depth
    while waiting:
        path, node = next(waiting[-1], (None, None))
        if path is None:
            waiting.pop()
            continue
        visited += 1
        if visited > _MAX_NODES:
            raise ValueError(f"the file's tree has more than {_MAX_NODES} nodes: it holds no weights alone")
        if len(path) > _MAX_DEPTH:
            raise ValueError(f"the file is nested more than {_MAX_DEPTH} deep")
        if isinstance(node, StoredTensor):
            found[".".join(filter(None, path))] = node
        elif isinstance(node, Opaque):
            waiting.append(iter([((*path, ""), node.state)]))
        elif isinstance(node, dict | list | tuple):
            waiting.append(_children(path, node))
    return found


def _children(path: tuple[str, ...], node: dict | list | tuple) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(name, str | int):
            yield (*path, str(name)), value


def _tensor(storage: Any, offset: int, shape: tuple, strides: tuple) -> StoredTensor:
    kind, key = storage[1].name.rsplit(".", 1)[-1], storage[2]
    if kind not in _STORAGES:
        raise ValueError(f"the archive has tensors of type {kind}, which are not read")
    return StoredTensor(str(key), np.dtype(_STORAGES[kind]), offset, tuple(shape), tuple(strides))


def _call(callee: Any, arguments: Any) -> Any:
    name = callee.name if isinstance(callee, _Symbol) else "?"
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*arguments[:4])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name == "collections.OrderedDict":
        return dict(arguments[0]) if arguments else {}
    if name == "collections.defaultdict":  # its argument is a function, its items follow
        return {}
    return Opaque(name, arguments)


def _build(target: Any, state: Any) -> Any:
    if isinstance(target, Opaque):
        target.state = state
    return target  # an OrderedDict's further attributes, such as a module's versions, do not matter


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_CONTAINERS: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}


class _Machine:
    """The stack machine of a pickle; an instruction is a method, called with the instruction's argument."""

    def __init__(self) -> None:
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.methods: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self.put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda key: self.stack.append(self.memo[key])),
            "MEMOIZE": lambda _: self.put(len(self.memo)),
            "GLOBAL": lambda name: self.stack.append(_Symbol(name.replace(" ", "."))),
            "STACK_GLOBAL": lambda _: self.binary(lambda module, name: _Symbol(f"{module}.{name}")),
            **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda _: self.binary(_call)),
            "BUILD": lambda _: self.binary(_build),
            # a persistent id is ('storage', type, file, device, length), and stays on the stack as it is
            **dict.fromkeys(("PROTO", "FRAME", "BINPERSID"), lambda _: None),
            "TUPLE": lambda _: self.stack.append(tuple(self.pop_to_mark())),
            "TUPLE1": lambda _: self.stack.append(tuple(self.pop(1))),
            "TUPLE2": lambda _: self.stack.append(tuple(self.pop(2))),
            "TUPLE3": lambda _: self.stack.append(tuple(self.pop(3))),
            **dict.fromkeys(("LIST", "FROZENSET"), lambda _: self.stack.append(self.pop_to_mark())),
            "DICT": lambda _: self.update(self.pop_to_mark(), {}),
            **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _: self.extend(self.pop_to_mark())),
            "APPEND": lambda _: self.extend(self.pop(1)),
            "SETITEMS": lambda _: self.update(self.pop_to_mark()),
            "SETITEM": lambda _: self.update(self.pop(2)),
            "POP": lambda _: self.stack.pop(),
        }

    def run(self, opcode, argument: Any) -> None:
        """Carry out an instruction. Raises ValueError for one that weights do not need."""
        name = opcode.name
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            self.stack.append(_CONTAINERS[name]())
        elif name in self.methods:
            self.methods[name](argument)
        elif opcode.stack_after and not opcode.stack_before and argument is not None:
            self.stack.append(argument)  # numbers, texts, bytes
        else:
            raise ValueError(f"the archive's pickle has the instruction {name}, which weights do not need")

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def pop(self, count: int) -> list:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def binary(self, function: Callable[[Any, Any], Any]) -> None:
        self.stack.append(function(*self.pop(2)))

    def pop_to_mark(self) -> list:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        return self.pop(len(self.stack) - at)[1:]

    def update(self, items: list, new: dict | None = None) -> None:
        self.stack += [] if new is None else [new]
        if isinstance(self.stack[-1], dict):  # the items of an Opaque are not needed
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str | int | float | tuple | bytes):
                    self.stack[-1][key] = value

    def extend(self, items: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)


def walk(program) -> Any:
    """The tree that a pickle describes. program: bytes, or an open file, read up to the pickle's end.

    Raises ValueError for an instruction that weights do not need.
    """
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if count > _MAX_NODES:
            raise ValueError(f"the pickle has more than {_MAX_NODES} instructions: it holds no weights alone")
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.run(opcode, argument)
    raise ValueError("the archive's pickle has no end")

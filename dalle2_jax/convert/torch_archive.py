"""Torch's zip archives (torch.save, torch.jit.save), read as data: no torch, and nothing is executed.

An archive holds `data.pkl` and one file of raw numbers for each storage. The pickle is a program for a stack
machine; here its instructions are walked over and only those that build containers and describe tensors have
an effect. What it calls or instantiates is a name, and stays one: an unknown call yields an `Opaque`.

Nothing is larger in memory than in the file: torch does not compress, so a compressed archive is refused, and
so is a tensor of more numbers than its storage has. A pickle may refer to one list many times over, and so be
a tree without end: no more than _MAX_NODES of it are looked at. Of the pickle as many instructions are, each
of which makes an object of some hundred bytes, or one as large as its text in the file.
"""

import dataclasses
import os
import pickletools
import zipfile
from collections.abc import Iterator
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
    """What the pickle made by a call: the callee's name, its arguments, and the state that was set."""

    name: str
    arguments: Any = ()
    state: Any = None


@dataclasses.dataclass(frozen=True)
class _Symbol:
    name: str


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: the file of its storage, its type, and its place and strides in elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_archive(path) -> bool:
    """Whether the file is a zip archive. Raises ValueError for one that is cut off."""
    if zipfile.is_zipfile(path):
        return True
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        raise ValueError(
            f"{path} is truncated: it begins as an archive of torch, and its last part, the list of what it "
            f"holds, is missing behind {os.path.getsize(path):,} bytes. Download or copy it again"
        )
    return False


class TorchArchive:
    """An open archive: `tensors` says where each is by its dotted name, `read` fetches one.

    A tuple's or list's tensors are named by their numbers. Raises ValueError for what is no archive of torch.
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
        """The tensor of this name, as it is stored. Raises ValueError where its storage is too short."""
        tensor = self.tensors[name]
        size = tensor.dtype.itemsize
        if not np.prod(tensor.shape, dtype=np.int64):
            return np.zeros(tensor.shape, tensor.dtype)
        ends = [(length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)]
        if min((tensor.offset, *tensor.strides)) < 0:
            raise ValueError(f"tensor {name} lies outside its storage: the archive is damaged")
        count = sum(ends) + 1
        if np.prod(tensor.shape, dtype=np.float64) > count:
            raise ValueError(f"tensor {name} has more numbers than its storage, which is not read")
        entry = f"{self._root}/data/{tensor.storage}"
        try:
            with self._zip.open(entry) as file:
                file.seek(tensor.offset * size)
                data = file.read(count * size)
        except (KeyError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise ValueError(f"the numbers of tensor {name} are missing or damaged: {error}") from error
        if len(data) != count * size:
            raise ValueError(f"tensor {name} lies outside its storage: the archive is damaged")
        flat = np.frombuffer(data, tensor.dtype)
        strides = [stride * size for stride in tensor.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides), order="C")


def tensors_in(tree: Any) -> dict[str, StoredTensor]:
    """{dotted name: tensor} of all in a tree of dicts, lists and objects. ValueError for one without end."""
    found, seen = {}, 0
    waiting = [iter([((), tree)])]  # what is left at each depth
    while waiting:
        path, node = next(waiting[-1], (None, None))
        if path is None:
            waiting.pop()
            continue
        seen += 1
        if seen > _MAX_NODES:
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


def walk(program) -> Any:
    """What a pickle describes: bytes, or an open file, which is read up to the pickle's end.

    Raises ValueError for an instruction that weights do not need.
    """
    stack: list = []
    memo: dict[int, Any] = {}

    def since_mark() -> list:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def update(items: list) -> None:
        if isinstance(stack[-1], dict):  # an Opaque's items are of no interest
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str | int | float | tuple | bytes):
                    stack[-1][key] = value

    def extend(items: list) -> None:
        if isinstance(stack[-1], list):
            stack[-1].extend(items)

    constants = {
        "NONE": None,
        "NEWTRUE": True,
        "NEWFALSE": False,
        "EMPTY_TUPLE": (),
        "MARK": _MARK,
    }
    empty = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
    tuples = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        name = opcode.name
        if count > _MAX_NODES:
            raise ValueError(
                f"the file's pickle has more than {_MAX_NODES} instructions: it holds no weights alone"
            )
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in constants:
            stack.append(constants[name])
        elif name in empty:
            stack.append(empty[name]())
        elif name in tuples:
            items = stack[-tuples[name] :]
            del stack[-tuples[name] :]
            stack.append(tuple(items))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Symbol(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Symbol(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, callee = stack.pop(), stack.pop()
            stack.append(_call(callee, arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack.pop()
            stack.append(_build(target, state))
        elif name == "BINPERSID":
            stack.append(stack.pop())  # ('storage', type, file, device, length)
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(list(since_mark()))
        elif name == "DICT":
            items = since_mark()
            stack.append({})
            update(items)
        elif name in ("APPENDS", "ADDITEMS"):
            extend(since_mark())
        elif name == "APPEND":
            item = stack.pop()
            extend([item])
        elif name == "SETITEMS":
            update(since_mark())
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            update([key, value])
        elif name == "POP":
            stack.pop()
        elif opcode.stack_after and not opcode.stack_before and argument is not None:
            stack.append(argument)  # numbers, texts, bytes
        else:
            raise ValueError(f"the archive's pickle has the instruction {name}, which weights do not need")
    raise ValueError("the archive's pickle has no end")

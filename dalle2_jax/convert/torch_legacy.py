"""Files that torch.save wrote before version 1.6, read as data: no torch, and nothing is executed.

Such a file is five pickles (a magic number, the version of the layout, sizes of types, the tree of tensors,
the keys of the storages), followed by the storages in the order of the keys, each an int64 count and raw
numbers. The weights of FID's Inception are published in this form.
"""

import os

import numpy as np

from dalle2_jax.convert.torch_archive import StoredTensor, build, tensors_in, walk

MAGIC, LAYOUT = 0x1950A86A20F9469CFC6C, 1001
# How every such file begins: the magic number as a pickle of protocol 2.
_BEGINNING = b"\x80\x02\x8a\n" + MAGIC.to_bytes(10, "little") + b"."


def read_legacy(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{dotted name: array} of a file's tensors. Raises ValueError for another format or a damaged file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        begins = file.read(len(_BEGINNING)) == _BEGINNING[:size]
        file.seek(0)
        try:
            magic, layout, sizes, tree, keys = (walk(file) for _ in range(5))
        except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
            if begins and file.tell() == size:
                where = f"after {size:,} bytes, amid its description of the tensors"
                raise ValueError(f"{path} is truncated {where}. Download or copy it again") from error
            raise ValueError(f"{path} is no file of weights that torch wrote: {error}") from error
        if magic != MAGIC or layout != LAYOUT or not isinstance(sizes, dict):
            raise ValueError(f"{path} is no file of weights that torch wrote")
        if not sizes.get("little_endian", True):
            raise ValueError(f"{path} has big-endian numbers, which are not read")
        found = tensors_in(tree)
        types = {tensor.storage: tensor.dtype for tensor in found.values()}
        storages = {}
        for key in keys:
            if key not in types:
                raise ValueError(f"{path}: storage {key!r} belongs to no tensor, so its size is unknown")
            head = file.read(8)
            count = int.from_bytes(head, "little", signed=True)
            end = file.tell() + count * types[key].itemsize
            if count < 0:
                raise ValueError(f"{path} is damaged: storage {key!r} has {count} numbers")
            if len(head) < 8 or end > size:
                sizes = f"{size:,} bytes of at least {end + 8 - len(head):,}"
                raise ValueError(f"{path} is truncated: {sizes}. Download or copy it again")
            storages[key] = np.frombuffer(file.read(count * types[key].itemsize), types[key])
        if lost := sorted(types.keys() - storages.keys()):
            raise ValueError(f"{path} is damaged: it lists no storage {lost[0]!r}")

    def build_one(name: str, tensor: StoredTensor) -> np.ndarray:
        storage = storages[tensor.storage]
        return build(name, tensor, lambda first, count: storage[first : first + count])

    return {name: build_one(name, tensor) for name, tensor in found.items()}

"""Checksums of a checkpoint's leaves and of their description: Orbax does not notice flipped bits.

With w_i the bits of element i as an unsigned number, the checksum of a leaf is sum_i w_i (2 i + 1) mod 2^32.
A flipped bit always changes it, because the weights are odd; devices that hold parts of an array add up
theirs.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle2_jax.runtime import files
from dalle2_jax.runtime.orbax_errors import DamagedCheckpoint

FORMAT = 1  # of `meta`; raised when older code could misread it
CACHED = 1 << 15  # numbers summed at once: 128 KiB, and as much of weights


def checksum(x: Any) -> Any:
    """The checksum of an array, uint32: by numpy for numpy arrays, by JAX for tracers."""
    kind = np.dtype(f"uint{8 * x.dtype.itemsize}")
    if isinstance(x, np.ndarray):
        return _checksum_of_words(
            np.ascontiguousarray(x).reshape(-1).view(kind).astype(np.uint32, copy=False)
        )
    bits = x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    index = jax.numpy.zeros((), np.uint32)  # of each element in row-major order, without gathering the array
    for axis, size in enumerate(x.shape):
        along = jax.numpy.arange(size, dtype=np.uint32).reshape((size,) + (1,) * (x.ndim - axis - 1))
        index = index * np.uint32(size) + along
    return (bits.astype(np.uint32) * (2 * index + 1)).sum(dtype=np.uint32)


def _checksum_of_words(words: np.ndarray) -> np.uint32:
    """The checksum of uint32 [n], by rows that fit a core's cache: with i = row * CACHED + j the weight 2 i +
    1 is 2 j + 1, equal for all rows, plus 2 row * CACHED, equal within a row."""
    weights = np.arange(1, 2 * CACHED, 2, dtype=np.uint32)
    total = 0
    for first in range(0, words.size, CACHED):
        row = words[first : first + CACHED]
        total += int(row @ weights[: row.size]) + 2 * first * int(row.sum(dtype=np.uint32))
    return np.uint32(total % 2**32)


def checksums(flat: Mapping[str, Any]) -> dict[str, int]:
    """{name: checksum}; arrays on accelerators or split over hosts are summed on their devices."""

    def on_host(leaf: Any) -> bool:
        if not isinstance(leaf, jax.Array):
            return True
        readable = leaf.is_fully_addressable or leaf.is_fully_replicated
        return readable and all(device.platform == "cpu" for device in leaf.devices())

    sums = {name: int(checksum(np.asarray(leaf))) for name, leaf in flat.items() if on_host(leaf)}
    rest = {name: leaf for name, leaf in flat.items() if name not in sums}
    if rest:
        sums |= {name: int(value) for name, value in jax.device_get(_device_checksums(rest)).items()}
    return {name: sums[name] for name in flat}


@jax.jit
def _device_checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: checksum(leaf) for name, leaf in flat.items()}


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `meta` with their sha256, by the same rule in all formats."""
    plain = json.loads(json.dumps({name: value for name, value in contents.items() if name != "sha256"}))
    return plain | {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def layout(flat: Mapping[str, Any]) -> str:
    """The sha256 of the leaves' names, shapes and types."""
    lines = sorted(f"{name} {tuple(leaf.shape)} {np.dtype(leaf.dtype)}" for name, leaf in flat.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_contents(path: epath.Path, contents: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises DamagedCheckpoint if `meta`, or Orbax's description `stored` of the leaves, has changed since
    the save, and ValueError for a newer format. Older checkpoints have no such sums, the oldest no format."""
    damaged = f"checkpoint {path} is damaged: %s not what was saved. Move that folder away to go on from an "
    damaged += "earlier step"
    if contents.get("sha256") not in (None, sealed(contents)["sha256"]):
        raise DamagedCheckpoint(damaged % "meta is")
    written = contents.get("format", 0)
    if written > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {written}, this version of dalle2_jax reads up to {FORMAT}: use "
            "the version that wrote it, or a newer one"
        )
    if contents.get("layout") not in (None, layout(stored)):
        raise DamagedCheckpoint(damaged % "names, shapes or types of its leaves are")


def read_meta(workdir: str | os.PathLike) -> tuple[int, dict[str, Any]]:
    """Returns (step, `meta`) of a run's newest checkpoint. Raises FileNotFoundError, DamagedCheckpoint."""
    folder = epath.Path(files.expand(workdir)) / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    if not steps:
        raise FileNotFoundError(f"no committed checkpoint in {folder}")
    path = folder / str(max(steps))
    contents = json.loads((path / "meta" / "metadata").read_text())
    if contents.get("sha256") not in (None, sealed(contents)["sha256"]):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: meta is not what was saved")
    return max(steps), contents["meta"]


def check_sums(path: epath.Path, flat: Mapping[str, Any], sums: Mapping[str, int]) -> None:
    """Raises DamagedCheckpoint, naming leaves, unless the leaves have these checksums."""
    changed = [name for name, value in checksums(flat).items() if value != sums.get(name)]
    changed += sorted(sums.keys() - flat.keys())
    if changed:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {len(changed)} leaves are not what was saved "
            f"({', '.join(changed[:5])}). Move that folder away to go on from an earlier step"
        )

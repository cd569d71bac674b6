"""TPU chips, described slices of them, and the memory of any device."""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path

import jax

from dalle2_jax.runtime import extras
from dalle2_jax.runtime.metrics import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip, as JAX's device; of TPU7x a device is one half of a chip.

    memory: bytes. link_bandwidth: bytes/s that it sends over all of its links, and receives. cells: of its
    matrix units, each two FLOPs a cycle. axes: of the torus that slices are parts of. largest: chips of the
    largest slice. kinds: JAX's names of the device. cores: `chip_config_name` of a described slice.
    devices: of one chip.
    """

    memory: float
    link_bandwidth: float
    cells: int
    axes: int
    largest: int
    kinds: tuple[str, ...]
    cores: str = "default"
    devices: int = 1

    @property
    def clock(self) -> float:
        """Hz, from the chip's peak in bfloat16."""
        peak = peak_flops(self.kinds[0])
        assert peak is not None, self.kinds
        return peak / (2 * self.cells)


# Google's pages on the versions of Cloud TPU; link bandwidths there are for both directions together. The
# cells of TPU7x are inferred from the compiler's cycles of a large product, next to those of v6e.
CHIPS = {
    "v4": Chip(32 * GIB, 300e9, 8 * 128**2, 3, 4096, ("TPU v4",), cores="megacore"),
    "v5e": Chip(16 * GIB, 200e9, 4 * 128**2, 2, 256, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(95 * GIB, 600e9, 8 * 128**2, 3, 6144, ("TPU v5", "TPU v5p")),
    "v6e": Chip(32 * GIB, 400e9, 4 * 256**2, 2, 256, ("TPU v6 lite", "TPU v6e")),
    "tpu7x": Chip(96 * GIB, 300e9, 4 * 256**2, 3, 9216, ("TPU7x",), devices=2),
}


def chip_of(device) -> Chip | None:
    """The chip of a device of JAX; None: not in `CHIPS`."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def memory_of(device) -> float | None:
    """Bytes of a device; None: unknown.

    From the device; for a described one from its chip; for a CPU device its part of this machine's memory.
    """
    unknown = (jax.errors.JaxRuntimeError, NotImplementedError)  # devices of other processes raise
    with contextlib.suppress(*unknown):
        stated = (device.memory_stats() or {}).get("bytes_limit")
        if stated:
            return stated
    if device.platform == "cpu":
        return _machine_memory() / len(jax.local_devices(backend="cpu"))
    chip = chip_of(device)
    return chip.memory if chip else None


def _machine_memory() -> int:
    """Bytes of this machine, or of its container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # 'max': no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def topology_devices(name: str) -> list:
    """The devices of a described slice such as 'v5p:4x4x4'; it need not exist.

    Raises ValueError for an invalid name, and without libtpu.
    """
    version, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    # The TPU compiler ends the process for a slice with a wrong number of axes.
    if version not in CHIPS or len(sizes) != CHIPS[version].axes or not all(sizes):
        raise ValueError(
            f"--topology={name!r} must be a version and its slice, such as v5p:4x4x4 or v5e:8x8; versions "
            f"are {', '.join(f'{version} ({chip.axes} axes)' for version, chip in CHIPS.items())}"
        )
    chip = CHIPS[version]
    if math.prod(sizes) > chip.largest:
        raise ValueError(f"--topology={name!r}: a slice of {version} has at most {chip.largest} chips")
    if not os.environ.get("TPU_LIBRARY_PATH"):
        extras.check("compiling for TPUs", "libtpu")
    # libtpu then queries no metadata server and takes no lock on a chip
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(name, "tpu", chip_config_name=chip.cores)
    except Exception as error:  # RuntimeError, JaxRuntimeError or ValueError
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--topology={name!r} is not possible: {first}. Slices of {version} are whole hosts, such as "
            f"{'2x2x1, 2x2x4, 4x4x4, 4x4x8' if chip.axes == 3 else '2x2, 4x4, 4x8, 8x8, 16x16'}"
        ) from error
    return list(described.devices)


def resized(name: str, larger: bool) -> str:
    """The name of the slice of twice or half as many chips, as even as possible; it may be invalid."""
    version, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    if larger:  # the last of the shortest axes, so that 4x4x4 becomes 4x4x8
        axis = max(i for i, size in enumerate(sizes) if size == min(sizes))
        sizes[axis] *= 2
    else:  # the first of the longest
        axis = sizes.index(max(sizes))
        sizes[axis] //= 2
    return f"{version}:{'x'.join(map(str, sizes))}"

"""JAX on this machine: the number of CPU devices, the cache of compiled programs, freed memory."""

import contextlib
import ctypes
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dalle2_jax.runtime import files

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
_config: Any = jax.config  # JAX defines its settings when it is imported, without types


def set_cpu_devices(count: int | None) -> None:
    """Sets the number of XLA devices of the CPU; see `partition.initialise`."""
    set_by_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if set_by_flags or (count is None and _config.jax_num_cpu_devices > 0):
        return
    if count is None:
        count = min(8, 2 ** int(np.log2(_available_cores())))
    if count == _config.jax_num_cpu_devices:
        return
    try:
        _config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backends are already running
        logging.info("JAX was already running: its number of CPU devices stays")


def _available_cores() -> int:
    """Cores that this process may use, by its affinity and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return max(1, cores)


def set_compilation_cache() -> None:
    """Sets the folder of compiled programs; see `partition.initialise`."""
    if not _config.jax_compilation_cache_dir:
        root = files.expand(os.environ.get("DALLE2_JAX_CACHE", "~/.cache/dalle2_jax"))
        if not root:
            return
        # One folder for each kind of CPU: machines that share a home may lack each other's instructions.
        directory = Path(root, "xla", cpu_fingerprint())
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logging.warning("no compilation cache (set DALLE2_JAX_CACHE to a writable folder): %s", error)
            return
        _config.update("jax_compilation_cache_dir", str(directory))
    # By default JAX keeps programs that took a second or more. Every start compiles dozens of shorter ones,
    # seconds in all. A user's own value stays.
    if _config.jax_persistent_cache_min_compile_time_secs == 1.0:
        _config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cpu_fingerprint() -> str:
    """The kind of this machine's CPU: architecture and a checksum of its features."""
    return f"{platform.machine()}-{hashlib.sha256(_cpu_flags().encode()).hexdigest()[:8]}"


def has_fast_bfloat16() -> bool:
    """Whether the CPU has AMX for bfloat16 and JAX multiplies with it: 0.10 multiplies as fast in float32."""
    return "amx_bf16" in _cpu_flags().split() and jax.__version_info__ >= (0, 12)


def _cpu_flags() -> str:
    """The line of /proc/cpuinfo with the first core's features; '': there is none."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), "")
    return ""


def keep_freed_memory() -> None:
    """Makes glibc keep freed arrays of the CPU for the next ones.

    By default it returns large blocks to the system, which fills them with zeros page by page when they are
    allocated again: up to two fifths of a small training step (docs/performance.md). Variables such as
    MALLOC_MMAP_MAX_ and GLIBC_TUNABLES take precedence. Other C libraries: nothing.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return
        libc = ctypes.CDLL(None)
        for parameter, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20):
            libc.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))

"""JAX on this machine: how many devices a CPU is, where compiled programs are kept, memory that is freed."""

import contextlib
import ctypes
import hashlib
import os
import platform
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dalle2_jax.runtime import files

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def set_cpu_devices(count: int | None) -> None:
    """Makes a CPU so many XLA devices; see `partition.initialise`."""
    asked_in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if asked_in_flags or (count is None and jax.config.jax_num_cpu_devices > 0):
        return
    if count is None:
        count = min(8, 2 ** int(np.log2(_available_cores())))
    if count == jax.config.jax_num_cpu_devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backends are already running
        logging.info("JAX was already running: it keeps the number of CPU devices that it has")


def _available_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return max(1, cores)


def set_compilation_cache() -> None:
    """Says where compiled programs are kept; see `partition.initialise`."""
    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("DALLE2_JAX_CACHE")
        if root == "":
            return
        root = Path(files.expand(root)) if root else Path.home() / ".cache" / "dalle2_jax"
        # Programs for one CPU may hold instructions that another lacks, and home directories are shared
        # between machines.
        directory = root / "xla" / _cpu_fingerprint()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logging.warning("no compilation cache (set DALLE2_JAX_CACHE to a writable folder): %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps programs that took a second or more. A start of ours compiles dozens of programs below that,
    # which together are seconds of every start, and each is a small file.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu_fingerprint() -> str:
    flags = ""
    with contextlib.suppress(OSError):
        flags = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("flags")), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def keep_freed_memory() -> None:
    """Has glibc keep the memory that arrays on CPUs leave behind, for the next ones.

    By default it gives large pieces back to the system, which fills them with zeros page by page when they
    are asked for again: up to two fifths of a small training step (docs/performance.md). Variables such as
    MALLOC_MMAP_MAX_ and GLIBC_TUNABLES take precedence; other C libraries are left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return
        libc = ctypes.CDLL(None)
        for parameter, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20):
            libc.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))

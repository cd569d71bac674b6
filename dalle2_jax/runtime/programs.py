"""Compiled programs on disk, found without tracing: a later process neither traces nor lowers them again.

The key of JAX's own compilation cache is the lowered program, so that each process first traces it. Here the
key is the cause of the trace: the sources of the package, the versions of what it computes with, the machine,
JAX's settings and the caller's `parts`. The files lie in the folder `programs` of JAX's cache. Like the files
of JAX's cache they are native code: who can write there can run code here.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from dalle2_jax.runtime import compiling, files, machine, modeldir

KEEP = True  # set it to False where functions of the package are replaced at run time, which no key shows
MAX_FILES = 128  # the least recently used are removed
PACKAGE = Path(__file__).parents[1]
_VERSIONS = ("jax", "jaxlib", "flax", "numpy")
_STARTED = time.time() - time.process_time()  # or a little later
_DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Where the files lie; None: JAX's cache is off or in a bucket, or there are several processes."""
    config: Any = jax.config
    cache = config.jax_compilation_cache_dir if config.jax_enable_compilation_cache else None
    if not KEEP or not cache or "://" in cache or jax.process_count() > 1:
        return None
    return Path(cache, "programs")


def file_of(modules: Iterable[str], mesh: Mesh, *parts: Any) -> Path | None:
    """The file of a program, or of shapes, that follows from the package, this machine and `parts`.

    Args:
      modules: names of the modules whose functions are traced.
      mesh: the devices that run the program.
      parts: values whose repr determines the result, and is the same in every process.

    Returns None, so that the caller traces: without a `folder`, for modules of other packages, and if the
    sources on disk may not be those that this process runs.
    """
    place, ours = folder(), all(name.partition(".")[0] == PACKAGE.name for name in modules)
    if place is None or not ours or not sources():
        return None
    client = mesh.devices.flat[0].client
    devices = [(device.id, device.device_kind) for device in mesh.devices.flat]
    machines = mesh.shape_tuple, mesh.axis_types, devices, client.platform_version, machine.cpu_fingerprint()
    settings = sorted((name, str(x)) for name, x in jax.config.values.items() if "_cache" not in name)
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    key = repr((sources(), _versions(), machines, settings, flags, parts))
    return place / hashlib.sha256(key.encode()).hexdigest()


def sources() -> str:
    """The sha256 of the package's sources; '' if there are none, or one is newer than this process."""
    paths = sorted(PACKAGE.rglob("*.py"))
    changed = max((path.stat().st_mtime for path in paths), default=_STARTED + 1)
    return _sha256(tuple(paths)) if changed <= _STARTED else ""


@functools.cache
def _sha256(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def _versions() -> list[str]:
    return [sys.version, *map(importlib.metadata.version, _VERSIONS)]


def compiled(
    path: Path | None, compile_program: Callable[[], jax.stages.Compiled], arguments: tuple, mesh: Mesh
) -> jax.stages.Compiled:
    """The program in the file `path`, or else that of `compile_program`, written there if JAX compiled it.

    Args:
      path: of `file_of`; None: neither read nor written.
      compile_program: a program whose result is nested dicts of arrays.
      arguments: its positional arguments, or their shapes.
      mesh: its devices.
    """
    if path is None:
        return compile_program()
    from jax.experimental import serialize_executable

    if (content := _read(path)) is not None:
        head, _, program = content.partition(b"\n")
        inputs = jax.tree.structure((arguments, {}))
        outputs = jax.tree.structure(modeldir.unflatten(dict.fromkeys(json.loads(head), 0)))
        devices = list(mesh.devices.flat)
        try:
            return serialize_executable.deserialize_and_load(
                program, inputs, outputs, devices[0].client, devices
            )
        except Exception as error:  # whatever JAX raises for a program that it cannot load
            logging.info("%s is compiled again: %r", path, error)
    made, read = _watched(compile_program)
    if read:  # XLA loses functions of a CPU's program that it loads and writes again
        return made
    try:
        program, _, outputs = serialize_executable.serialize(made)
    except Exception as error:  # a program with callbacks, a backend that cannot write programs
        logging.info("a program cannot be kept on disk: %r", error)
        return made
    names = list(modeldir.flatten(jax.tree.unflatten(outputs, range(outputs.num_leaves))))
    if jax.tree.structure(modeldir.unflatten(dict.fromkeys(names, 0))) == outputs:
        _write(path, json.dumps(names).encode() + b"\n" + program)
    return made


def _watched(compile_program: Callable[[], jax.stages.Compiled]) -> tuple[jax.stages.Compiled, bool]:
    """(the program, whether JAX read it from its cache and did not compile it)."""
    thread, read = threading.get_ident(), list[str]()

    def listen(event: str, duration_secs: float, **_) -> None:
        if event == compiling.READ and threading.get_ident() == thread:
            read.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return compile_program(), bool(read)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def shapes(path: Path | None, trace: Callable[[], Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """'a/b/kernel' -> shape and type: those in the file `path`, or else of the tree that `trace` returns."""
    if path is not None and (content := _read(path)) is not None:
        found = json.loads(content)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in found.items()}
    made = modeldir.flatten(trace())
    if path is not None:
        _write(path, json.dumps({name: (x.shape, str(x.dtype)) for name, x in made.items()}).encode())
    return made


def _read(path: Path) -> bytes | None:
    """The content that `_write` was given; None without the file, or if it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a folder that this user may only read
        os.utime(path)
    digest, content = data[:_DIGEST], data[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Writes a file atomically behind its checksum, and removes those that were not used for longest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as partial:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
        for old in sorted(path.parent.iterdir(), key=os.path.getmtime, reverse=True)[MAX_FILES:]:
            old.unlink()
    except OSError as error:  # a full disk; a file that another process removed
        logging.info("%s: %s", path, error)

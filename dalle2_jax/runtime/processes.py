"""Several processes of one run: how they connect, split work, wait for each other and fail together.

A run has one process a host (TPU pods, GPU machines) or one a device. Every process runs the same command on
the same workdir, on a shared file system. `join` reads, in this order:

- JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (by hand, Kubernetes); without the last the
  JOB_COMPLETION_INDEX of an indexed Job or JobSet;
- Slurm's variables, by JAX, where `srun` starts more than one task;
- the metadata of a TPU host or of GKE, by JAX.

JAX_NUM_PROCESSES=1 means one process in any environment.
"""

import contextlib
import contextvars
import glob
import importlib.util
import itertools
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging

from dalle2_jax.runtime import extras

HEARTBEAT_SECONDS = 30  # silence after which a process counts as lost
START_SECONDS = 300  # for all processes to connect
WAIT_SECONDS = 6 * 3600  # for the others in `sync`; the loss of a process ends the wait long before
LOST = 4  # exit status of a process that ends because the run lost another


def settings(environ: Mapping[str, str]) -> dict | None:
    """The arguments of `jax.distributed.initialize` by the environment; None: it names none.

    Returns coordinator_address, num_processes and process_id, or JAX's own detection for Slurm. Raises
    ValueError for incomplete or impossible variables.
    """
    if "JAX_NUM_PROCESSES" in environ or "JAX_COORDINATOR_ADDRESS" in environ:
        return _by_hand(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm(environ)
    return None


def _by_hand(environ: Mapping[str, str]) -> dict:
    values = {name: environ.get(name, "") for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")}
    values["JAX_PROCESS_ID"] = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX", ""))
    if values["JAX_NUM_PROCESSES"] == "1":
        return dict(coordinator_address=None, num_processes=1, process_id=0)
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ValueError(
            f"several processes need JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and "
            f"JAX_PROCESS_ID; {', '.join(missing)} is not set (JAX_NUM_PROCESSES=1 for one process)"
        )
    address, count, index = values.values()
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index}: ids are 0 ... number of processes - 1"
        )
    return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))


def _slurm(environ: Mapping[str, str]) -> dict:
    """By default JAX gives each task one device. For one task a node an empty list leaves it all devices."""
    alone = int(environ["SLURM_STEP_NUM_TASKS"]) <= int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    return dict(cluster_detection_method="slurm") | (dict(local_device_ids=[]) if alone else {})


def _on_tpu_host() -> bool:
    """Whether this machine has TPU chips that JAX would use."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return importlib.util.find_spec("libtpu") is not None and bool(
        glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    )


def join() -> None:
    """Connects this process with the others; call it before JAX computes anything. One process: nothing.

    Raises ValueError for incomplete variables. JAX ends the process unless all connect within START_SECONDS.
    """
    found = settings(os.environ)
    if found is None and not _on_tpu_host():
        return
    found = found or {}
    if found.get("num_processes") == 1:
        return
    jax.distributed.initialize(
        **found, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
    logging.info(
        "process %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


_ALONE = contextvars.ContextVar("alone", default=False)  # within `split_over_processes`


def _count() -> int:
    """The number of processes that split the work here."""
    return 1 if _ALONE.get() else jax.process_count()


def sync(name: str) -> None:
    """Waits until every process has called it. On CPUs a collective operation (Gloo) fails after 30 s."""
    if _count() > 1:
        from orbax.checkpoint import multihost

        everyone = set(range(jax.process_count()))
        unique = f"{name} {next(_SYNCS)}"
        multihost.sync_global_processes(unique, processes=everyone, timeout=WAIT_SECONDS)


_SYNCS = itertools.count()


def is_first() -> bool:
    """Whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def share(count: int) -> np.ndarray:
    """The numbers of this process's part of `count` examples: int64 [ceil(count / processes)].

    Parts are contiguous and of one size: the last example fills the last parts. `gather` removes the copies.
    """
    size = -(-count // _count())
    first = jax.process_index() * size if _count() > 1 else 0
    return np.minimum(np.arange(size) + first, count - 1)


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows of `count` examples, in order, from each process's rows of its `share`; all must call it."""
    if _count() == 1:
        return rows
    from jax.experimental import multihost_utils

    if rows.size == 0:  # such as the image embeddings of a decoder without that condition
        return np.zeros((count, *rows.shape[1:]), rows.dtype)
    rows = np.ascontiguousarray(rows)
    sync("gather")  # processes arrive at different times
    plain = rows.reshape(len(rows), -1).view(np.uint8)  # JAX would convert float64 and int64 to 32 bits
    gathered = np.asarray(multihost_utils.process_allgather(plain, tiled=True))[:count]
    return np.ascontiguousarray(gathered).view(rows.dtype).reshape(count, *rows.shape[1:])


def split_over_processes(function: Callable, count: int):
    """Splits examples over processes and gathers the results on all of them; all must call it.

    function: example numbers int64 [n] -> a tree of arrays [n, ...]. Nested calls do not split again. Returns
    the tree of arrays [count, ...].
    """
    rows = share(count)
    entered = _ALONE.set(True)
    try:
        made = function(rows)
    finally:
        _ALONE.reset(entered)
    if len(rows) == count:  # one process, or one example, which every process has computed
        return made
    return jax.tree.map(lambda part: gather(part, count), made)


def from_first(values: np.ndarray) -> np.ndarray:
    """The values of process 0, on every process; all must call it with the same shape and type."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    sync("from first")
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def one_then_others(name: str, make: Callable):
    """make(), on process 0 first; then on the others, which find the files that it saved."""
    if jax.process_index() > 0:
        sync(name)
    made = make()
    if jax.process_index() == 0:
        sync(name)
    return made


def end_together(error: BaseException, status: int) -> None:
    """With several processes, logs the cause and ends this one at once; with one, returns.

    Checkpoints and the shutdown of jax.distributed would wait for ever for a process that has failed. The
    others notice the closed connections.
    """
    if jax.process_count() > 1:
        _end(error, status)


@contextlib.contextmanager
def fail_together(
    refused: tuple[type[Exception], ...] = (ValueError, OSError),
    *,
    status: int = 2,
    say: Callable[[str], Any] = lambda message: print(f"error: {message}", file=sys.stderr),
    debug: bool = False,
) -> Iterator[None]:
    """Around a whole command: an error becomes one line, and several processes fail and end together.

    An error in `refused` is passed to `say`, without its traceback unless `debug`, and ends the program with
    `status`. With several processes any error ends this one at once, and thereby the others; a process that
    is done waits for the others, and so notices the loss of one. A missing package of an extra is an error of
    one line, too.
    """
    try:
        yield
        sync("done")
    except Exception as error:
        missing = isinstance(error, ImportError) and extras.missing(error)
        if missing or isinstance(error, refused):
            end_together(error, status)
            say(missing or str(error))
            raise SystemExit(status) from (error if debug else None)
        if jax.process_count() > 1:
            traceback.print_exc()
        end_together(error, 1)
        raise


def leave(status: int | str | None) -> NoReturn:
    """Ends the program with this status, without waiting for threads: a failed save leaves some for
    minutes."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        logging.flush()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1 if status else 0)
    raise SystemExit(status)


def _end(error: BaseException, status: int) -> NoReturn:
    first_line = (str(error).splitlines() or [""])[0][:500]
    reasons = [error]  # a save may fail because another process has ended
    while (reason := reasons[-1].__cause__) is not None:
        reasons.append(reason)
    if any(isinstance(reason, jax.errors.JaxRuntimeError) for reason in reasons):
        status = LOST
        cause = "another process of the run was lost, or the devices failed"
    else:
        cause = "this process failed, and ends the run"
    logging.error(
        "process %d of %d: %s: %s: %s. Start all processes again to go on from what was saved",
        jax.process_index(),
        jax.process_count(),
        cause,
        type(error).__name__,
        first_line,
    )
    logging.flush()
    os._exit(status)

"""Several processes of one run: how they find each other, share work, wait for each other and fail together.

A run may have one process a host (TPU pods, GPU machines) or one a device. Every process runs the same
command on the same workdir, which all must see. `join` finds out what there is, in this order:

- by hand, Kubernetes: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; the last may be left to the
  JOB_COMPLETION_INDEX of an indexed Job or JobSet;
- Slurm, where `srun` starts more than one task: JAX reads Slurm's variables;
- TPU hosts: JAX reads the metadata of the machine or of GKE.

JAX_NUM_PROCESSES=1 means one process, whatever the environment looks like.
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
from typing import NoReturn

import jax
import numpy as np
from absl import logging

HEARTBEAT_SECONDS = 30  # silence after which a process counts as lost
START_SECONDS = 300  # for all processes to come up
WAIT_SECONDS = 6 * 3600  # for the others in `sync`; a process that is lost ends the wait long before
LOST = 4  # exit status of a process that ends because the run lost another


def settings(environ: Mapping[str, str]) -> dict | None:
    """The arguments of `jax.distributed.initialize` that the environment names, None where it names nothing.

    Returns coordinator_address, num_processes, process_id, or for Slurm how JAX is to find these. Raises
    ValueError for an incomplete or impossible description.
    """
    if "JAX_NUM_PROCESSES" in environ or "JAX_COORDINATOR_ADDRESS" in environ:
        return _by_hand(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm(environ)
    return None


def _by_hand(environ: Mapping[str, str]) -> dict:
    values = {
        "JAX_COORDINATOR_ADDRESS": environ.get("JAX_COORDINATOR_ADDRESS"),
        "JAX_NUM_PROCESSES": environ.get("JAX_NUM_PROCESSES"),
        "JAX_PROCESS_ID": environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX")),
    }
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
    """JAX reads Slurm's variables. By default it gives each task one device, which is wrong for one task a
    node: an empty list of devices leaves it all of them."""
    alone = int(environ["SLURM_STEP_NUM_TASKS"]) <= int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    return dict(cluster_detection_method="slurm") | (dict(local_device_ids=[]) if alone else {})


def _on_tpu_host() -> bool:
    """Whether this machine has TPU chips and JAX would use them."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return importlib.util.find_spec("libtpu") is not None and bool(
        glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    )


def join() -> None:
    """Makes this process part of its run; call it before JAX computes anything. One process: nothing.

    Raises ValueError for an environment that does not say enough. JAX ends the process if the others do not
    come up within START_SECONDS.
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


_ALONE = contextvars.ContextVar("alone", default=False)  # within `in_shares`


def _count() -> int:
    """How many processes share what is to be done here."""
    return 1 if _ALONE.get() else jax.process_count()


def sync(name: str) -> None:
    """Waits until every process has come to this place, however long one of them takes.

    A collective operation would not do: on CPUs (Gloo) it fails after 30 seconds.
    """
    if _count() > 1:
        from orbax.checkpoint import multihost

        everyone = set(range(jax.process_count()))
        unique = f"{name} {next(_SYNCS)}"
        multihost.sync_global_processes(unique, processes=everyone, timeout=WAIT_SECONDS)


_SYNCS = itertools.count()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def share(count: int) -> np.ndarray:
    """Which of `count` rows this process works on: int64 [ceil(count / processes)], as many on every process.

    Rows follow each other; where they do not divide, the last ones are repeated. `gather` takes them apart.
    """
    size = -(-count // _count())
    first = jax.process_index() * size if _count() > 1 else 0
    return np.minimum(np.arange(size) + first, count - 1)


def gather(rows: np.ndarray, count: int) -> np.ndarray:
    """The `count` rows of all processes, in order, from what each made of its `share`; all must call it."""
    if _count() == 1:
        return rows
    from jax.experimental import multihost_utils

    if rows.size == 0:  # such as the image embeddings of a decoder that reads none
        return np.zeros((count, *rows.shape[1:]), rows.dtype)
    # Bytes, as JAX would make float64 and int64 smaller.
    rows = np.ascontiguousarray(rows)
    sync("gather")  # some had more to do
    plain = rows.reshape(len(rows), -1).view(np.uint8)
    together = np.asarray(multihost_utils.process_allgather(plain, tiled=True))[:count]
    return np.ascontiguousarray(together).view(rows.dtype).reshape(count, *rows.shape[1:])


def in_shares(function: Callable, count: int):
    """What `function` makes of `count` rows, each process of its `share`; all must call it, and get all.

    function: row numbers int64 [n] -> a tree of arrays [n, ...]. Within it this process counts as the only
    one: what is called there is not shared once more. Returns the tree of arrays [count, ...].
    """
    rows = share(count)
    entered = _ALONE.set(True)
    try:
        made = function(rows)
    finally:
        _ALONE.reset(entered)
    if len(rows) == count:  # one process, or one row, which each has made
        return made
    return jax.tree.map(lambda own: gather(own, count), made)


def from_first(values: np.ndarray) -> np.ndarray:
    """Process 0's `values`, on every process; all must call it with the same shape and type."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    sync("from first")
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def one_then_others(name: str, make: Callable):
    """make(), on process 0 first; the others call it when that is done and find what it saved."""
    if jax.process_index() > 0:
        sync(name)
    made = make()
    if jax.process_index() == 0:
        sync(name)
    return made


def end_together(error: BaseException, status: int) -> None:
    """With several processes, says the cause and ends this one at once; with one, returns.

    Whatever waits for the other processes (checkpoints, the farewell of jax.distributed) would wait for ever
    where one of them has failed. Ending closes this process's connections, by which the others notice.
    """
    if jax.process_count() > 1:
        _end(error, status)


@contextlib.contextmanager
def together(
    refused: tuple[type[Exception], ...] = (ValueError, OSError),
    *,
    status: int = 2,
    say: Callable[[str], None] | None = None,
    debug: bool = False,
) -> Iterator[None]:
    """Around all that a command does: an error becomes one line, and several processes fail and leave as one.

    An error in `refused` is told to `say` (by default printed to stderr), without its traceback unless
    `debug`, and ends the program with `status`. Where there are several processes, whatever fails in one of
    them ends it at once, and by that the others; and one that is done waits for the others, so that it sees
    one that is lost.
    """
    try:
        yield
        sync("done")
    except refused as error:
        end_together(error, status)
        if say is None:
            print(f"error: {error}", file=sys.stderr)
        else:
            say(str(error))
        raise SystemExit(status) from (error if debug else None)
    except Exception as error:
        if jax.process_count() > 1:
            traceback.print_exc()
        end_together(error, 1)
        raise


def leave(status: int | str | None) -> NoReturn:
    """Ends the program with this status, also where threads are left that would keep it for minutes: a save
    that failed leaves some that wait for each other."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        logging.flush()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1 if status else 0)
    raise SystemExit(status)


def _end(error: BaseException, status: int) -> NoReturn:
    first_line = (str(error).splitlines() or [""])[0][:500]
    reasons = [error]  # a save that fails because the others have gone is no fault of the disk
    while reasons[-1].__cause__ is not None:
        reasons.append(reasons[-1].__cause__)
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

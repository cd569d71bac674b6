"""Checkpoints: the train state of a run, saved and restored.

A run keeps WORKDIR/checkpoints/STEP/{state, meta}, written by Orbax: asynchronously (training goes on
meanwhile), sharded (each process writes its part) and atomically (a step counts only once it is committed
whole: its folder gets its name last, or, where a file system cannot rename folders, the file COMMIT last).
Leaves are stored under flat names such as 'params/conv_in/kernel', so a checkpoint can be read onto
any mesh and without the classes it came from.

Orbax does not notice flipped bits in its files, so `meta` carries a checksum of every leaf, compared on
reading; a damaged checkpoint is set aside and the one before it used. With w_i the bits of element i as an
unsigned number, the checksum is sum_i w_i (2 i + 1) mod 2^32: a changed bit always changes it (the weights
are odd), and devices that hold parts of an array just add up theirs. `meta` has a sha256 of itself and
one of the leaves' names, shapes and types: damage to these does not look like another dataset or model.
"""

import contextlib
import errno
import hashlib
import json
import logging as standard_logging
import os
import re
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.runtime import files, processes
from dalle2_jax.runtime.modeldir import differences, flatten, unflatten

SAVE_SECONDS = 30 * 86400  # Orbax gives up then, by a clock that may be set while it writes
FORMAT = 1  # of what `meta` holds beside the leaves; raised when older code could misread it
COMMIT = "commit_success.txt"  # Orbax's
# What the operating system says of files that are missing or are something else, as against files that this
# process may not or cannot read just now.
OF_FILES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
# How tensorstore begins what it says of a bucket that cannot be read just now.
OF_SERVICES = tuple(
    f"{code}: "
    for code in (
        "ABORTED",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "UNAUTHENTICATED",
        "UNAVAILABLE",
    )
)
CACHED = 1 << 15  # numbers whose checksum is computed at once: 128 KiB, and as much of weights


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read, or whose leaves are not what was saved."""


class ReadFailed(OSError):
    """A checkpoint that could not be read and may be whole: files of another user, no memory, no network."""


class SaveFailed(OSError):
    """A checkpoint that could not be written: a full disk, a quota, a file system that went away."""


def checksum(x: Any) -> Any:
    """Returns the checksum above of an array, uint32: in numpy for numpy, in JAX for a tracer."""
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
    """Of uint32 [n]. In rows that stay in a core's cache: with i = row * CACHED + j the weight 2 i + 1 is
    2 j + 1, the same for all rows, and 2 row * CACHED, the same for all of a row."""
    weights = np.arange(1, 2 * CACHED, 2, dtype=np.uint32)
    total = 0
    for first in range(0, words.size, CACHED):
        row = words[first : first + CACHED]
        total += int(row @ weights[: row.size]) + 2 * first * int(row.sum(dtype=np.uint32))
    return np.uint32(total % 2**32)


def checksums(flat: Mapping[str, Any]) -> dict[str, int]:
    """Returns {name: checksum}; of arrays on accelerators or split over hosts, computed where they are."""
    host = {
        name: np.asarray(leaf)
        for name, leaf in flat.items()
        if not isinstance(leaf, jax.Array)
        or (
            (leaf.is_fully_addressable or leaf.is_fully_replicated)
            and all(device.platform == "cpu" for device in leaf.devices())
        )
    }
    sums = {name: int(checksum(leaf)) for name, leaf in host.items()}
    rest = {name: leaf for name, leaf in flat.items() if name not in host}
    if rest:
        sums |= {name: int(value) for name, value in jax.device_get(_device_checksums(rest)).items()}
    return {name: sums[name] for name in flat}


@jax.jit
def _device_checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: checksum(leaf) for name, leaf in flat.items()}


class Checkpointer:
    """Saves and restores the train state of a workdir.

    Args:
      workdir: the run's folder; checkpoints go to workdir/checkpoints.
      max_to_keep: how many of the newest to keep; None or 0 keeps all.
      before_save: called before each save; it raises where nothing may be written any more.
      zero_at_first: names of leaves, or of what they lie in, that a checkpoint may lack: they are zero then.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        max_to_keep: int | None = 3,
        before_save: Callable[[], None] | None = None,
        zero_at_first: tuple[str, ...] = (),
    ):
        import orbax.checkpoint as ocp

        _quiet_orbax()
        self._ocp, self._before_save, self._failed = ocp, before_save, False
        self._zero_at_first = zero_at_first
        self.directory = epath.Path(files.expand(workdir)) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._renames = _renames_folders(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep or None,
            cleanup_tmp_directories=True,  # left by a process that was killed while saving
            async_options=ocp.AsyncOptions(
                timeout_secs=SAVE_SECONDS, post_finalization_callback=self._committed
            ),
            temporary_path_class=None if self._renames else ocp.path.atomicity.CommitFileTemporaryPath,
        )
        # Named here, not inferred from the first save: a resumed run reads before it writes.
        self._state = ocp.PyTreeCheckpointHandler()
        handlers = {"state": self._state, "meta": ocp.JsonCheckpointHandler()}
        path = _absolute(self.directory)
        self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def _committed(self) -> None:
        logging.info("committed checkpoint %s", self.directory / str(self._manager.latest_step()))

    def latest_step(self) -> int | None:
        """Returns the newest committed step, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Starts saving; returns once `state` may be overwritten or donated. False if `step` exists already.

        Args:
          step: number of finished steps.
          state: pytree of arrays.
          meta: JSON values that go with it, such as the dataset's fingerprint.
        """
        if step in self._manager.all_steps():
            return False
        if self._before_save is not None:
            self._before_save()
        args, flat = self._ocp.args, flatten(state)
        self._failed = False
        contents = {"format": FORMAT, "meta": dict(meta), "checksums": checksums(flat)}
        contents = _sealed(contents | {"layout": _layout(flat)})
        with self._explain_failure():
            return self._manager.save(
                step, args=args.Composite(state=args.PyTreeSave(flat), meta=args.JsonSave(contents))
            )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Returns (state, meta) of `step` (the newest if None), placed as `abstract_state` says.

        All processes must call it; damage that one of them finds is an error in all.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any mesh.

        Raises:
          FileNotFoundError: no such checkpoint. ReadFailed: it cannot be read just now, by this process.
          ValueError: the checkpoint is damaged, or its leaves, shapes or dtypes differ; it says which.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(_no_checkpoint(self.directory, step, self.all_steps()))
        path = self.directory / str(step)
        expected = flatten(abstract_state)
        with _damage_for_all(path):
            with _explain_damage(path):
                stored, contents = _read_description(path, self._state)
            zero = {
                name: leaf
                for name, leaf in expected.items()
                if name not in stored and _lies_in(name, self._zero_at_first)
            }
            where = _where_stored(stored, [name for name in expected if name not in zero])
            wanted = {where[name]: leaf for name, leaf in expected.items() if name not in zero}
            _check_stored(path, stored, wanted)
            restore_args = self._ocp.checkpoint_utils.construct_restore_args(wanted)
            with _explain_damage(path):
                restored = self._state.restore(
                    _absolute(path / "state"),
                    args=self._ocp.args.PyTreeRestore(wanted, restore_args=restore_args),
                )
        with _damage_for_all(path):  # the sums of what is split are computed by all devices
            _check_sums(path, {name: restored[name] for name in wanted}, contents["checksums"])
        flat = {
            name: _zeros(leaf) if name in zero else restored[where[name]] for name, leaf in expected.items()
        }
        return jax.tree.unflatten(jax.tree.structure(abstract_state), flat.values()), contents["meta"]

    def restore_newest(self, abstract_state: Any) -> tuple[int, Any, dict]:
        """Returns (step, state, meta) of the newest checkpoint that is not damaged.

        Damaged ones that are newer are logged and moved to WORKDIR/damaged, so that their steps can be saved
        again. All processes must call it.

        Raises:
          FileNotFoundError: no checkpoint. DamagedCheckpoint: none that is whole; nothing is moved then.
          ReadFailed: one cannot be read just now, by this process; nothing is moved then, either.
          ValueError: leaves, shapes or dtypes differ from `abstract_state`.
        """
        if not self.all_steps():
            raise FileNotFoundError(_no_checkpoint(self.directory, None, []))
        damaged = []
        for step in reversed(self.all_steps()):
            try:
                restored = self.restore(abstract_state, step)
            except DamagedCheckpoint as found:
                logging.error("%s", found)
                traceback.clear_frames(found.__traceback__)  # what was read of it makes room
                error = found
                damaged.append(step)
                continue
            for number in damaged:
                self._set_aside(number)
            self._manager.reload()
            return step, *restored
        raise error

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint to WORKDIR/damaged, on process 0."""
        if jax.process_index() == 0:
            source, folder = self.directory / str(step), self.directory.parent / "damaged"
            folder.mkdir(exist_ok=True)
            name, others = f"{step}_{time.strftime('%Y%m%d_%H%M%S')}", 0
            while (target := folder / (f"{name}_{others}" if others else name)).exists():
                others += 1  # the clock was set back
            if self._renames:
                source.rename(target)
            else:
                _copy_folder(source, target)
                source.rmtree()
            logging.warning("moved the damaged checkpoint to %s", target)
        processes.sync(f"set aside {step}")

    def warn_of_little_space(self, state: Any) -> None:
        """Logs a warning where the disk has no room for two checkpoints of such a state: the one that is kept
        and the next."""
        size = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
        with contextlib.suppress(OSError):  # not a disk of this machine
            free = shutil.disk_usage(self.directory).free
            if free < 2 * size:
                logging.warning(
                    "%s: %.2f GB are free, a checkpoint takes about %.2f GB",
                    self.directory,
                    free / 1e9,
                    size / 1e9,
                )

    def check(self) -> None:
        """Raises SaveFailed if the save in progress is known to have failed; does not wait."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is committed. Raises SaveFailed."""
        if not self._failed:
            with self._explain_failure():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the threads. Raises SaveFailed, unless it was raised before."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        """Turns what Orbax raises for a save that failed into a SaveFailed, and frees what it had written."""
        try:
            yield
        except Exception as error:
            self._failed = True
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            if jax.process_count() == 1:
                for left in self.directory.glob("*.orbax-checkpoint-tmp"):
                    with contextlib.suppress(OSError):
                        left.rmtree()
            whole = ", ".join(map(str, self.all_steps())) or "none"
            raise SaveFailed(
                f"a checkpoint could not be written to {self.directory}: {_cause(error)}. Whole ones are "
                f"those of steps {whole}. Free space there, then run the same command to go on from the last"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def restore_subtree(workdir: str | os.PathLike, name: str, step: int | None = None) -> dict:
    """Returns the part of a run's state called `name` ('params', 'ema_params') as nested dicts of numpy.

    Reads that part alone, needs no class of the state, and does not disturb a run that is still training.

    Raises:
      FileNotFoundError: no committed checkpoint, or not that step. ReadFailed: it cannot be read just now.
      ValueError: the checkpoint is damaged or has no such part.
    """
    import orbax.checkpoint as ocp

    _quiet_orbax()
    directory = epath.Path(files.expand(workdir)) / "checkpoints"
    if not directory.exists():
        raise FileNotFoundError(f"{workdir} is not a training workdir: it has no folder 'checkpoints'")
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        save_interval_steps=0,
        create=False,
        temporary_path_class=_committed_by_file(directory),
    )
    with ocp.CheckpointManager(_absolute(directory), options=options) as manager:
        steps = sorted(manager.all_steps())
    step = (steps[-1] if steps else None) if step is None else step
    if step not in steps:
        raise FileNotFoundError(_no_checkpoint(directory, step, steps))
    path = directory / str(step)
    handler = ocp.PyTreeCheckpointHandler()
    with _explain_damage(path):
        stored, contents = _read_description(path, handler)
        wanted = {
            leaf: jax.ShapeDtypeStruct(m.shape, m.dtype)
            for leaf, m in stored.items()
            if leaf.startswith(f"{name}/")
        }
        if not wanted:
            parts = sorted({leaf.split("/")[0] for leaf in stored})
            raise ValueError(f"{path} has no {name!r}: it has {', '.join(parts)}")
        restore_args = {
            leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=m.dtype) for leaf, m in wanted.items()
        }
        flat = handler.restore(
            _absolute(path / "state"),
            args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True),
        )
    sums = {leaf: value for leaf, value in contents["checksums"].items() if leaf.startswith(f"{name}/")}
    _check_sums(path, {leaf: flat[leaf] for leaf in wanted}, sums)
    return unflatten({leaf.removeprefix(f"{name}/"): flat[leaf] for leaf in wanted})


def restore_ema_params(workdir: str | os.PathLike, step: int | None = None) -> dict:
    """Returns the averaged parameters of a run (see `restore_subtree`)."""
    return restore_subtree(workdir, "ema_params", step)


def _lies_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros placed as `leaf` says."""

    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )


def _where_stored(stored: Iterable[str], names: list[str]) -> dict[str, str]:
    """{name: the name that a checkpoint has it under}: its own, but for the numbers in the optimizer's.

    'opt_state/1/0/mu/...' is 'opt_state/0/mu/...' where the gradient is not clipped. So of those whose words
    are the same the first is the first, and the second the second; a name without its like keeps its own.
    """

    def by_words(flat: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in flat:
            if name.startswith("opt_state/"):
                words = [part for part in name.split("/") if not part.isdecimal()]
                groups.setdefault("/".join(words), []).append(name)
        for group in groups.values():
            group.sort(key=lambda name: [int(part) for part in name.split("/") if part.isdecimal()])
        return groups

    there, where = by_words(stored), {name: name for name in names}
    for words, group in by_words(names).items():
        if len(there.get(words, ())) == len(group):
            where |= dict(zip(group, there[words], strict=True))
    return where


def _check_stored(path: epath.Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    complaints = differences(
        {name: tuple(leaf.shape) for name, leaf in stored.items()},
        {name: tuple(leaf.shape) for name, leaf in expected.items()},
    )
    if not complaints:  # Orbax would cast silently, and the run would no longer be the one that was saved
        complaints = [
            f"  dtype: {name} is {np.dtype(stored[name].dtype)}, the model expects {np.dtype(leaf.dtype)}"
            for name, leaf in expected.items()
            if np.dtype(stored[name].dtype) != np.dtype(leaf.dtype)
        ][:10]
    if complaints:
        raise ValueError(
            f"checkpoint {path} does not fit the model: use the config that it was trained with, or another "
            + "workdir\n"
            + "\n".join(complaints)
        )


def _sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """What `meta` holds, with the sha256 of it; the rule of that is the same in all formats."""
    plain = json.loads(json.dumps({name: value for name, value in contents.items() if name != "sha256"}))
    return plain | {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _layout(flat: Mapping[str, Any]) -> str:
    """The sha256 of the leaves' names, shapes and types."""
    lines = sorted(f"{name} {tuple(leaf.shape)} {np.dtype(leaf.dtype)}" for name, leaf in flat.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_description(path: epath.Path, handler: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({name: what Orbax says of a leaf}, what `meta` holds). Raises as `_check_contents`, and what
    reading raises."""
    (path / "state" / "_METADATA").stat()  # for its error: what Orbax may not see counts as missing there
    stored = dict(handler.metadata(_absolute(path / "state")).tree)
    contents = json.loads((path / "meta" / "metadata").read_text())
    _check_contents(path, contents, stored)
    return stored, contents


def _check_contents(path: epath.Path, contents: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises DamagedCheckpoint where `meta`, or what Orbax says is `stored`, is not what was saved, and
    ValueError for a newer format. Older checkpoints have no such sums, the oldest no format."""
    damaged = f"checkpoint {path} is damaged: %s not what was saved. Move that folder away to go on from an "
    damaged += "earlier step"
    if contents.get("sha256") not in (None, _sealed(contents)["sha256"]):
        raise DamagedCheckpoint(damaged % "meta is")
    written = contents.get("format", 0)
    if written > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {written}, this version of dalle2_jax reads up to {FORMAT}: use "
            "the version that wrote it, or a newer one"
        )
    if contents.get("layout") not in (None, _layout(stored)):
        raise DamagedCheckpoint(damaged % "names, shapes or types of its leaves are")


def _os_error(error: BaseException) -> int | None:
    """The number of what the operating system said, also in the long messages of tensorstore."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None


def _cause(error: BaseException) -> str:
    """What the operating system said, or else the first line."""
    number = _os_error(error)
    return os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0][:300]


def _may_be_whole(error: BaseException) -> bool:
    """Whether a checkpoint that could not be read for this reason may be whole."""
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return True
    number = _os_error(error)
    if number is not None:
        return number not in OF_FILES
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)  # Orbax raises these without a number
    return str(error).startswith(OF_SERVICES)


def _committed_by_file(directory: epath.Path) -> type | None:
    """The class by which Orbax tells whole checkpoints from others: by COMMIT if any has it, else by name."""
    import orbax.checkpoint as ocp

    if any((folder / COMMIT).exists() for folder in directory.iterdir() if folder.name.isdecimal()):
        return ocp.path.atomicity.CommitFileTemporaryPath
    return None


def _copy_folder(source: epath.Path, target: epath.Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name)


def _renames_folders(directory: epath.Path) -> bool:
    """Whether a folder that is not empty can be renamed there; buckets, and gcsfuse by default, cannot."""
    if "://" in os.fspath(directory):
        return False
    probe = directory.parent / f".probe_{secrets.token_hex(4)}"
    target = probe.with_name(probe.name + "_renamed")
    try:
        probe.mkdir()
        (probe / "file").write_text("")
        os.rename(probe, target)
        return True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return True  # that is another matter, and will be told by who writes
        logging.info("%s cannot rename folders: checkpoints are committed by a file", directory)
        return False
    finally:
        for left in (probe, target):
            shutil.rmtree(left, ignore_errors=True)


def _check_sums(path: epath.Path, flat: Mapping[str, Any], sums: Mapping[str, int]) -> None:
    changed = [name for name, value in checksums(flat).items() if value != sums.get(name)]
    changed += sorted(sums.keys() - flat.keys())
    if changed:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: {len(changed)} leaves are not what was saved "
            f"({', '.join(changed[:5])}). Move that folder away to go on from an earlier step"
        )


def _no_checkpoint(directory: epath.Path, step: int | None, steps: list[int]) -> str:
    if not steps:
        return f"no committed checkpoint in {directory}"
    return f"no committed checkpoint of step {step} in {directory}: there are {', '.join(map(str, steps))}"


@contextlib.contextmanager
def _explain_damage(path: epath.Path) -> Iterator[None]:
    """Turns the many errors of Orbax for missing or damaged files into a DamagedCheckpoint, and those for
    files that may be whole into a ReadFailed; both say what to do."""
    try:
        yield
    except Exception as error:  # also bare ones, for a file that was cut
        if isinstance(error, ValueError) and str(error).startswith((f"{path} ", f"checkpoint {path} ")):
            raise
        reason = error.__cause__ or error
        if _may_be_whole(reason):
            raise ReadFailed(
                f"checkpoint {path} cannot be read by this process: {_cause(reason)}. It may be whole and "
                "stays where it is: mend that and run the same command again, or move that folder away to go "
                "on from an earlier step"
            ) from error
        first_line = (str(reason).splitlines() or [""])[0]
        raise DamagedCheckpoint(
            f"checkpoint {path} cannot be read, it is incomplete or damaged: move that folder away to go on "
            f"from an earlier step ({type(error).__name__}: {first_line[:300]})"
        ) from error


@contextlib.contextmanager
def _damage_for_all(path: epath.Path) -> Iterator[None]:
    """Around what all processes do with a checkpoint: damage that one of them finds, all raise, once each is
    done. Within it nobody may wait for the others, as one of them may have found damage before."""
    error = None
    try:
        yield
    except DamagedCheckpoint as found:
        error = found
    if processes.gather(np.array([error is not None]), jax.process_count()).any():
        raise error or DamagedCheckpoint(f"checkpoint {path} is damaged: another process found it")


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes absolute paths only."""
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _quiet_orbax() -> None:
    """Drops Orbax's dozens of informational lines a save from the log."""
    for logger, rule in (
        (logging.get_absl_logger(), _not_orbax_chatter),
        (standard_logging.getLogger("asyncio"), _not_left_by_orbax),
    ):
        if rule not in logger.filters:
            logger.addFilter(rule)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
    """Leaves out what tensorstore's threads tell of further leaves once one has failed: the loop of
    events that would hear it is closed by then."""

    def __init__(self, otherwise: Callable[[Any], None]):
        self._otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._otherwise(unraisable)


def _not_left_by_orbax(record: Any) -> bool:
    # Where several leaves fail, one error is raised; asyncio tells of the others when they are freed.
    return not any(name in record.getMessage() for name in ("orbax", "tensorstore"))


def _not_orbax_chatter(record: Any) -> bool:
    # What failed is raised as well, so the pages of traceback that each thread of Orbax logs say nothing new.
    chatty = record.levelno <= 20 or record.exc_info
    return not chatty or f"{os.sep}orbax{os.sep}" not in record.pathname

"""Checkpoints: the train state of a run, saved and restored.

A run keeps WORKDIR/checkpoints/STEP/{state, meta}, written by Orbax: asynchronously (training goes on
meanwhile), sharded (each process writes its part) and atomically (a step counts only once it is committed
whole: its folder gets its name last, or, where a file system cannot rename folders, the file COMMIT last).
Leaves are stored under flat names such as 'params/conv_in/kernel', so a checkpoint can be read onto
any mesh and without the classes it came from.

`meta` carries a checksum of every leaf (`checksums`), compared on reading; a damaged checkpoint is set aside
and the one before it used. `meta` has a sha256 of itself and one of the leaves' names, shapes and types:
damage to these does not look like another dataset or model.
"""

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.runtime import checksums, files, processes
from dalle2_jax.runtime.modeldir import differences, flatten, unflatten
from dalle2_jax.runtime.orbax_errors import (
    DamagedCheckpoint,
    SaveFailed,
    cause,
    damage_for_all,
    explain_damage,
    quiet_orbax,
)

SAVE_SECONDS = 30 * 86400  # Orbax gives up then, by a clock that may be set while it writes
COMMIT = "commit_success.txt"  # Orbax's


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

        quiet_orbax()
        self._ocp, self._before_save, self._failed = ocp, before_save, False
        self._zero_at_first = zero_at_first
        self.directory = epath.Path(files.expand(workdir)) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._renames = files.renames_folders(self.directory)
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
        contents = {"format": checksums.FORMAT, "meta": dict(meta), "checksums": checksums.checksums(flat)}
        contents = checksums.sealed(contents | {"layout": checksums.layout(flat)})
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
        with damage_for_all(path):
            with explain_damage(path):
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
            with explain_damage(path):
                restored = self._state.restore(
                    _absolute(path / "state"),
                    args=self._ocp.args.PyTreeRestore(wanted, restore_args=restore_args),
                )
        with damage_for_all(path):  # the sums of what is split are computed by all devices
            checksums.check_sums(path, {name: restored[name] for name in wanted}, contents["checksums"])
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
                files.copy_folder(source, target)
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
                f"a checkpoint could not be written to {self.directory}: {cause(error)}. Whole ones are "
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

    quiet_orbax()
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
    with explain_damage(path):
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
    checksums.check_sums(path, {leaf: flat[leaf] for leaf in wanted}, sums)
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


def _read_description(path: epath.Path, handler: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({name: what Orbax says of a leaf}, what `meta` holds).

    Raises what `checksums.check_contents` and reading raise.
    """
    (path / "state" / "_METADATA").stat()  # for its error: what Orbax may not see counts as missing there
    stored = dict(handler.metadata(_absolute(path / "state")).tree)
    contents = json.loads((path / "meta" / "metadata").read_text())
    checksums.check_contents(path, contents, stored)
    return stored, contents


def _committed_by_file(directory: epath.Path) -> type | None:
    """The class by which Orbax tells whole checkpoints from others: by COMMIT if any has it, else by name."""
    import orbax.checkpoint as ocp

    if any((folder / COMMIT).exists() for folder in directory.iterdir() if folder.name.isdecimal()):
        return ocp.path.atomicity.CommitFileTemporaryPath
    return None


def _no_checkpoint(directory: epath.Path, step: int | None, steps: list[int]) -> str:
    if not steps:
        return f"no committed checkpoint in {directory}"
    return f"no committed checkpoint of step {step} in {directory}: there are {', '.join(map(str, steps))}"


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes absolute paths only."""
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))

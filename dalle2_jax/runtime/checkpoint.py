"""Checkpoints: the train state of a run, saved and restored.

Orbax writes WORKDIR/checkpoints/STEP/{state, meta} asynchronously, sharded over processes, and atomically: a
step counts once its folder has its name, or, on file systems that cannot rename folders, the file COMMIT.
Leaves have flat names such as 'params/conv_in/kernel', so a checkpoint is read onto any mesh and without the
classes of its tree.

`meta` has a checksum of every leaf (`checksums`), compared on reading; a damaged checkpoint is moved away and
the one before it used. It also has a sha256 of itself and one of the leaves' names, shapes and types, so that
damage is never taken for another dataset or model.
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

SAVE_SECONDS = 30 * 86400  # Orbax's limit, by a clock that may be set while it writes
COMMIT = "commit_success.txt"  # Orbax's


class Checkpointer:
    """Saves and restores the train state of a workdir.

    Args:
      workdir: checkpoints go to workdir/checkpoints.
      max_to_keep: the number of newest checkpoints to keep; None or 0: all.
      before_save: called before each save; raises if nothing may be written any more.
      zero_at_first: names of leaves or subtrees that an older checkpoint may lack: restored as zeros.
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
        self._zero_at_first = tuple(f"{name}/" for name in zero_at_first)
        self.directory = epath.Path(files.expand(workdir)) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._renames = files.renames_folders(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep or None,
            cleanup_tmp_directories=True,  # of a process that was killed while saving
            async_options=ocp.AsyncOptions(
                timeout_secs=SAVE_SECONDS, post_finalization_callback=self._committed
            ),
            temporary_path_class=None if self._renames else ocp.path.atomicity.CommitFileTemporaryPath,
        )
        # Explicit handlers: a resumed run reads before it writes.
        self._state = ocp.PyTreeCheckpointHandler()
        handlers = {"state": self._state, "meta": ocp.JsonCheckpointHandler()}
        path = _absolute(self.directory)
        self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def _committed(self) -> None:
        logging.info("committed checkpoint %s", self.directory / str(self._manager.latest_step()))

    def latest_step(self) -> int | None:
        """The newest committed step; None: no checkpoint."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Starts saving; returns once `state` may be overwritten or donated. False if `step` exists already.

        step: number of finished steps. state: pytree of arrays. meta: JSON values, such as the dataset's
        fingerprint.
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
        """(state, meta) of `step` (None: the newest), with the shardings of `abstract_state`, on any mesh.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings. All processes must call it; damage that
        one finds is an error on all.

        Raises:
          FileNotFoundError: no such checkpoint. ReadFailed: this process cannot read it at present.
          ValueError: the checkpoint is damaged, or its leaves, shapes or dtypes (named) differ.
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
                if name not in stored and f"{name}/".startswith(self._zero_at_first)
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
        """(step, state, meta) of the newest intact checkpoint; all processes must call it.

        Newer, damaged ones are logged and moved to WORKDIR/damaged, so that their steps can be saved again.

        Raises:
          FileNotFoundError: no checkpoint. DamagedCheckpoint: all are damaged; nothing is moved.
          ReadFailed: this process cannot read one at present; nothing is moved.
          ValueError: leaves, shapes or dtypes differ from `abstract_state`.
        """
        damaged: list[int] = []
        error: Exception = FileNotFoundError(_no_checkpoint(self.directory, None, []))
        for step in reversed(self.all_steps()):
            try:
                restored = self.restore(abstract_state, step)
            except DamagedCheckpoint as found:
                logging.error("%s", found)
                traceback.clear_frames(found.__traceback__)  # frees the arrays that were read
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
        """Logs a warning if the disk has no room for two checkpoints of this state, the last and the next."""
        size = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
        with contextlib.suppress(OSError):  # not a local disk
            free = shutil.disk_usage(self.directory).free
            if free < 2 * size:
                line = "%s: %.2f GB are free, a checkpoint takes about %.2f GB"
                logging.warning(line, self.directory, free / 1e9, size / 1e9)

    def check(self) -> None:
        """Raises SaveFailed if the last save has failed; does not wait for one in progress."""
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
            if self._failed:  # again: threads of Orbax may have written since
                self._remove_partial()

    def _remove_partial(self) -> None:
        """Removes partial checkpoints; another process may still write one."""
        for left in self.directory.glob("*.orbax-checkpoint-tmp") if jax.process_count() == 1 else ():
            with contextlib.suppress(OSError):
                left.rmtree()

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        """Turns Orbax's errors of a failed save into a SaveFailed, and removes the partial checkpoint."""
        try:
            yield
        except Exception as error:
            self._failed = True
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            self._remove_partial()
            steps = ", ".join(map(str, self.all_steps())) or "none"
            raise SaveFailed(
                f"a checkpoint could not be written to {self.directory}: {cause(error)}. Whole ones are "
                f"those of steps {steps}. Free space there, then run the same command to go on from the last"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def restore_subtree(workdir: str | os.PathLike, name: str, step: int | None = None) -> dict:
    """One part of a run's state ('params', 'ema_params') as nested dicts of numpy arrays.

    Reads only that part; the run may still be training. step None: the newest.

    Raises:
      FileNotFoundError: no committed checkpoint, or not that step. ReadFailed: it cannot be read at present.
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
        part = {leaf: m for leaf, m in stored.items() if leaf.startswith(f"{name}/")}
        wanted = {leaf: jax.ShapeDtypeStruct(m.shape, m.dtype) for leaf, m in part.items()}
        if not wanted:
            parts = sorted({leaf.split("/")[0] for leaf in stored})
            raise ValueError(f"{path} has no {name!r}: it has {', '.join(parts)}")
        numpy = {leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=m.dtype) for leaf, m in part.items()}
        flat = handler.restore(
            _absolute(path / "state"),
            args=ocp.args.PyTreeRestore(wanted, restore_args=numpy, partial_restore=True),
        )
    sums = {leaf: value for leaf, value in contents["checksums"].items() if leaf.startswith(f"{name}/")}
    checksums.check_sums(path, {leaf: flat[leaf] for leaf in wanted}, sums)
    return unflatten({leaf.removeprefix(f"{name}/"): flat[leaf] for leaf in wanted})


def restore_ema_params(workdir: str | os.PathLike, step: int | None = None) -> dict:
    """The averaged parameters of a run; see `restore_subtree`."""
    return restore_subtree(workdir, "ema_params", step)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros with the sharding of `leaf`."""
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )


def _where_stored(stored: Iterable[str], names: list[str]) -> dict[str, str]:
    """{name: its name in a checkpoint}, which may differ in the numbers of the optimizer's leaves.

    'opt_state/1/0/mu/...' is 'opt_state/0/mu/...' without gradient clipping. Leaves with the same words are
    matched in order, if both sides have as many; others keep their names.
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
    if not complaints:  # Orbax would cast silently
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
    """({name: Orbax's metadata of a leaf}, the contents of `meta`), by `checksums.check_contents`."""
    (path / "state" / "_METADATA").stat()  # for its error: Orbax reports an unreadable file as missing
    stored = dict(handler.metadata(_absolute(path / "state")).tree)
    contents = json.loads((path / "meta" / "metadata").read_text())
    checksums.check_contents(path, contents, stored)
    return stored, contents


def _committed_by_file(directory: epath.Path) -> type | None:
    """Orbax's class of incomplete checkpoints: by the file COMMIT if any step has it, else by name (None)."""
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

"""What is written to disk and read back: checkpoints of a training run, and model directories.

A run keeps WORKDIR/checkpoints/STEP/{state, meta}, written by Orbax: asynchronously (training goes on
meanwhile), sharded (each process writes its part) and atomically (a step counts only once it is committed
whole). Leaves are stored under flat names such as 'params/conv_in/kernel', so a checkpoint can be read onto
any mesh and without the classes it came from.

Orbax does not notice flipped bits in its files, so `meta` carries a checksum of every leaf, compared on
reading. With w_i the bits of element i as an unsigned number, it is sum_i w_i (2 i + 1) mod 2^32: a changed
bit always changes it (the weights are odd), and devices that hold parts of an array just add up theirs.

A model directory is what generating needs and nothing else, readable with safetensors and a JSON parser:

    MODEL/model_index.json                      which stages there are, and where
    MODEL/<stage>/config.json                   the config that the stage was trained with
    MODEL/<stage>/model.safetensors             its averaged weights under flat names, bfloat16 or float32
    MODEL/tokenizer/                            see data/tokenizer.py
"""

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax import partition

FORMAT_VERSION = 1
INDEX_FILE, CONFIG_FILE, WEIGHTS_FILE = "model_index.json", "config.json", "model.safetensors"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {'a/b/kernel': leaf} of any pytree, in its own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {partition.path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Returns the nested dicts of {'a/b/kernel': leaf}."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def checksum(x: Any) -> Any:
    """Returns the checksum above of an array, uint32: in numpy for numpy, in JAX for a tracer."""
    xp = np if isinstance(x, np.ndarray) else jax.numpy
    kind = np.dtype(f"uint{8 * x.dtype.itemsize}")
    if x.dtype == bool:
        bits = x.astype(kind)
    else:
        bits = x.view(kind) if xp is np else jax.lax.bitcast_convert_type(x, kind)
    index = xp.zeros((), np.uint32)  # of each element in row-major order, without gathering the array
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype=np.uint32).reshape((size,) + (1,) * (x.ndim - axis - 1))
        index = index * np.uint32(size) + along
    return (bits.astype(np.uint32) * (2 * index + 1)).sum(dtype=np.uint32)


def checksums(flat: Mapping[str, Any]) -> dict[str, int]:
    """Returns {name: checksum}; of arrays on accelerators or other hosts, computed where they are."""
    host = {
        name: np.asarray(leaf)
        for name, leaf in flat.items()
        if not isinstance(leaf, jax.Array)
        or (leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices()))
    }
    sums = {name: int(checksum(leaf)) for name, leaf in host.items()}
    rest = {name: leaf for name, leaf in flat.items() if name not in host}
    if rest:
        sums |= {name: int(value) for name, value in jax.device_get(_device_checksums(rest)).items()}
    return {name: sums[name] for name in flat}


@jax.jit
def _device_checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: checksum(leaf) for name, leaf in flat.items()}


def check_params(params: Any, abstract: Any, where: str = "the parameters") -> None:
    """Raises ValueError naming what differs unless `params` has exactly the leaves and shapes of `abstract`.

    Args:
      params: pytree of arrays (or of anything with a shape).
      abstract: the same pytree as the model defines it, of arrays or ShapeDtypeStructs.
      where: what the message calls `params`, for instance its path.
    """
    found = {name: tuple(np.shape(leaf)) for name, leaf in flatten(params).items()}
    expected = {name: tuple(leaf.shape) for name, leaf in flatten(abstract).items()}
    complaints = _differences(found, expected)
    if complaints:
        raise ValueError(
            f"{where} and the model do not fit together (was it made with another config?):\n"
            + "\n".join(complaints)
        )


def _differences(found: Mapping[str, tuple], expected: Mapping[str, tuple], limit: int = 10) -> list[str]:
    """Lines that name the missing, surplus and misshapen leaves, at most `limit` of each."""
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    lines = []
    for title, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
        for name in names[:limit]:
            if title == "missing":
                near = difflib.get_close_matches(name, surplus, n=1)
                hint = f" (is {near[0]!r} meant for it?)" if near else ""
                lines.append(f"  missing: {name} {_show(expected[name])}{hint}")
            elif title == "surplus":
                lines.append(f"  surplus: {name} {_show(found[name])}")
            else:
                lines.append(
                    f"  misshapen: {name} has {_show(found[name])}, the model expects {_show(expected[name])}"
                )
        if len(names) > limit:
            lines.append(f"  ... and {len(names) - limit} more {title}")
    return lines


def _show(shape: tuple) -> str:
    return "[" + ", ".join(str(entry) for entry in shape) + "]"


# Checkpoints of a run.


class Checkpointer:
    """Saves and restores the train state of a workdir.

    Args:
      workdir: the run's folder; checkpoints go to workdir/checkpoints.
      max_to_keep: how many of the newest to keep; None or 0 keeps all.
    """

    def __init__(self, workdir: str | os.PathLike, max_to_keep: int | None = 3):
        import orbax.checkpoint as ocp

        _quiet_orbax()
        self._ocp = ocp
        self.directory = epath.Path(workdir) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep or None,
            cleanup_tmp_directories=True,  # left by a process that was killed while saving
            async_options=ocp.AsyncOptions(post_finalization_callback=self._committed),
        )
        # Named here, not inferred from the first save: a resumed run reads before it writes.
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
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
        args, flat = self._ocp.args, flatten(state)
        contents = {"meta": dict(meta), "checksums": checksums(flat)}
        return self._manager.save(
            step, args=args.Composite(state=args.PyTreeSave(flat), meta=args.JsonSave(contents))
        )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Returns (state, meta) of `step` (the newest if None), placed as `abstract_state` says.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any mesh.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: the checkpoint is damaged, or its leaves, shapes or dtypes differ; it says which.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(_no_checkpoint(self.directory, step, self.all_steps()))
        path = self.directory / str(step)
        expected = flatten(abstract_state)
        args = self._ocp.args
        with _explain_damage(path):
            stored = dict(self._manager.item_metadata(step)["state"].tree)
        _check_stored(path, stored, expected)
        restore_args = self._ocp.checkpoint_utils.construct_restore_args(expected)
        with _explain_damage(path):
            restored = self._manager.restore(
                step,
                args=args.Composite(
                    state=args.PyTreeRestore(expected, restore_args=restore_args), meta=args.JsonRestore()
                ),
            )
        flat = {name: restored["state"][name] for name in expected}
        _check_sums(path, flat, restored["meta"]["checksums"])
        return jax.tree.unflatten(jax.tree.structure(abstract_state), flat.values()), restored["meta"]["meta"]

    def wait(self) -> None:
        """Waits until the save in progress is committed; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the threads."""
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def restore_subtree(workdir: str | os.PathLike, name: str, step: int | None = None) -> dict:
    """Returns the part of a run's state called `name` ('params', 'ema_params') as nested dicts of numpy.

    Reads that part alone, needs no class of the state, and does not disturb a run that is still training.

    Raises:
      FileNotFoundError: no committed checkpoint, or not that step.
      ValueError: the checkpoint is damaged or has no such part.
    """
    import orbax.checkpoint as ocp

    _quiet_orbax()
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.exists():
        raise FileNotFoundError(f"{workdir} is not a training workdir: it has no folder 'checkpoints'")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with ocp.CheckpointManager(_absolute(directory), options=options) as manager:
        steps = sorted(manager.all_steps())
    step = (steps[-1] if steps else None) if step is None else step
    if step not in steps:
        raise FileNotFoundError(_no_checkpoint(directory, step, steps))
    path = directory / str(step)
    with _explain_damage(path), ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(_absolute(path / "state")).item_metadata.tree
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
        flat = checkpointer.restore(
            _absolute(path / "state"),
            args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True),
        )
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            sums = reader.restore(_absolute(path / "meta"))["checksums"]
    _check_sums(path, {leaf: flat[leaf] for leaf in wanted}, sums)
    return unflatten({leaf.removeprefix(f"{name}/"): flat[leaf] for leaf in wanted})


def restore_ema_params(workdir: str | os.PathLike, step: int | None = None) -> dict:
    """Returns the averaged parameters of a run (see `restore_subtree`)."""
    return restore_subtree(workdir, "ema_params", step)


def _check_stored(path: epath.Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    complaints = _differences(
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


def _check_sums(path: epath.Path, flat: Mapping[str, Any], sums: Mapping[str, int]) -> None:
    changed = [name for name, value in checksums(flat).items() if value != sums.get(name)]
    if changed:
        raise ValueError(
            f"checkpoint {path} is damaged: {len(changed)} leaves are not what was saved "
            f"({', '.join(changed[:5])}). Move that folder away to go on from an earlier step"
        )


def _no_checkpoint(directory: epath.Path, step: int | None, steps: list[int]) -> str:
    if not steps:
        return f"no committed checkpoint in {directory}"
    return f"no committed checkpoint of step {step} in {directory}: there are {', '.join(map(str, steps))}"


@contextlib.contextmanager
def _explain_damage(path: epath.Path) -> Iterator[None]:
    """Turns the many errors of Orbax for missing or damaged files into one that says what to do."""
    try:
        yield
    except (ValueError, FileNotFoundError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"checkpoint {path} cannot be read, it is incomplete or damaged: move that folder away to go on "
            f"from an earlier step ({type(error).__name__}: {first_line[:300]})"
        ) from error


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes absolute paths only."""
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


def _quiet_orbax() -> None:
    """Drops Orbax's dozens of informational lines a save from the log."""
    logger = logging.get_absl_logger()
    if not any(getattr(f, "__name__", "") == "_not_orbax_chatter" for f in logger.filters):
        logger.addFilter(_not_orbax_chatter)


def _not_orbax_chatter(record: Any) -> bool:
    return record.levelno > 20 or f"{os.sep}orbax{os.sep}" not in record.pathname


# Model directories.


def save_stage(
    directory: str | os.PathLike, config: Mapping[str, Any], params: Any, dtype: str = "bfloat16"
) -> None:
    """Writes a stage's config.json and model.safetensors; the same input gives the same bytes.

    Args:
      directory: made if absent; files of the same name are replaced.
      config: JSON values that are enough to rebuild the stage.
      params: nested dict of arrays; floating leaves are stored as `dtype`, others as they are.
      dtype: 'bfloat16' (half the size, 8 bits of precision) or 'float32' (exact).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    import safetensors.numpy

    def stored(leaf) -> np.ndarray:
        leaf = np.asarray(leaf)
        if leaf.dtype == ml_dtypes.bfloat16 or np.issubdtype(leaf.dtype, np.floating):
            leaf = leaf.astype(DTYPES[dtype])
        return np.require(leaf, requirements="C")

    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = {name: stored(leaf) for name, leaf in sorted(flatten(partition.to_host(params)).items())}
    _replace(directory / WEIGHTS_FILE, safetensors.numpy.save(flat, metadata={"format": "np"}))
    _replace(directory / CONFIG_FILE, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def load_stage(directory: str | os.PathLike, keep_dtype: bool = False) -> tuple[dict, dict]:
    """Returns (config, params) of a stage's directory: plain JSON values, and nested dicts of numpy arrays.

    Floating leaves come as float32 whatever they are stored in, unless `keep_dtype`.

    Raises:
      FileNotFoundError: no such directory, or a file is missing in it.
      ValueError: a file is damaged.
    """
    import safetensors

    directory = epath.Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} is not a stage of a model directory: it has no {name}")
    config = _read_json(directory / CONFIG_FILE)
    flat = {}
    with _local_copy(directory / WEIGHTS_FILE) as path:
        try:
            with safetensors.safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    flat[name] = file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} is not a whole safetensors file: {error}"
            ) from error
    if not keep_dtype:
        narrow = (ml_dtypes.bfloat16, np.float16)
        flat = {
            name: leaf.astype(np.float32) if leaf.dtype in narrow else leaf for name, leaf in flat.items()
        }
    return config, unflatten(flat)


def write_index(
    directory: str | os.PathLike,
    stages: Mapping[str, Any],
    tokenizer: str = "tokenizer",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes MODEL/model_index.json.

    Args:
      directory: the model directory.
      stages: role -> folder (or list of folders, in the order in which they run), relative to the directory:
        {"clip": "clip", "decoder": "decoder", "upsamplers": ["upsampler64", "upsampler256"]}.
      tokenizer: the tokenizer's folder, relative.
      extra: more JSON values, such as default sampling settings or a description.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    index = {
        "_class_name": "UnCLIP",
        "format_version": FORMAT_VERSION,
        "stages": dict(stages),
        "tokenizer": tokenizer,
    }
    index |= dict(extra or {})
    _replace(directory / INDEX_FILE, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())


def read_index(directory: str | os.PathLike) -> dict:
    """Returns the contents of MODEL/model_index.json after checking that all that it names is there.

    Raises:
      FileNotFoundError: not a model directory, or a stage's or the tokenizer's folder or file is missing.
      ValueError: a damaged index, or one of a newer version.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise FileNotFoundError(f"no model directory {directory}")
    if not (directory / INDEX_FILE).exists():
        hint = ""
        if (directory / "checkpoints").exists():
            hint = "; it is a training workdir: export it with `python -m dalle2_jax.convert export`"
        elif (directory / WEIGHTS_FILE).exists():
            hint = "; it is one stage of a model directory: give the folder above it"
        raise FileNotFoundError(f"{directory} is not a model directory: it has no {INDEX_FILE}{hint}")
    index = _read_json(directory / INDEX_FILE)
    version = index.get("format_version")
    if (
        index.get("_class_name") != "UnCLIP"
        or not isinstance(index.get("stages"), dict)
        or not isinstance(version, int)
    ):
        raise ValueError(
            f"{directory / INDEX_FILE} is not the index of an UnCLIP model directory of this project"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{directory} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update dalle2_jax"
        )
    for role, folders in index["stages"].items():
        for folder in [folders] if isinstance(folders, str) else folders:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                path = _inside(directory, folder) / name
                if not path.exists():
                    raise FileNotFoundError(
                        f"model directory {directory} is incomplete: stage {role!r} lacks {path}"
                    )
    tokenizer = index.get("tokenizer")
    if tokenizer and not _inside(directory, tokenizer).exists():
        raise FileNotFoundError(
            f"model directory {directory} is incomplete: it lacks {directory / tokenizer}"
        )
    return index


def _inside(directory: epath.Path, folder: Any) -> epath.Path:
    """A model directory may come from anyone: what its index names must lie inside it."""
    if (
        not isinstance(folder, str)
        or not folder
        or Path(folder).is_absolute()
        or ".." in Path(folder).parts
        or "://" in folder
    ):
        raise ValueError(
            f"{directory / INDEX_FILE} names the folder {folder!r}: it must be relative and inside the model "
            "directory"
        )
    return directory / folder


def _read_json(path: epath.Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _replace(path: epath.Path, data: bytes) -> None:
    """Writes a file in one stroke: a reader sees the old one or the new one, never a part."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def _local_copy(path: epath.Path) -> Iterator[str]:
    """Path of a local file with the contents of `path`, which may lie in a bucket."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        path.copy(local)
        yield str(local)

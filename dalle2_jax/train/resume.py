"""What a run must have in common with its resumption.

Before a run goes on, its settings are compared with WORKDIR/config.json. Its dataset and its frozen stages
(or the CLIP that made precomputed embeddings) are compared with the checkpoint's `meta`. A setting of FREE
may differ. Any other difference is refused, with a list, unless it was allowed by name
(--allow_changed); WORKDIR/changes.json keeps what was, and from which step: a run that is
killed before its next checkpoint goes on by that.
"""

import dataclasses
import json
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath

from dalle2_jax.models import frozen, models
from dalle2_jax.runtime import modeldir

# None of these changes what a step computes, but for its rounding (`mesh`, `model.remat`,
# `scan_blocks`). A dataset that is read from elsewhere (`data.data_dir`), or with damaged files
# (`data.allow_damaged`), is compared, as any is.
FREE = (
    "num_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "eval_every",
    "eval_batches",
    "num_samples",
    "sample_captions",
    "sample_prior",
    "profile_at",
    "profile_steps",
    "wandb",
    "mesh",
    "data.eval_split",
    "data.data_dir",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.allow_damaged",
    "model.remat",
    "model.scan_blocks",
    "model.net.scan_blocks",
    "model.text.scan_blocks",
)
# Settings that config.json of older workdirs lacks, with what these runs did.
SETTINGS_SINCE = {"spike_sigma": 0.0, "cpu_products": "float32", "frozen": {}, "trainable": []}
OPTIM_SINCE = {"optimizer": "adamw", "decay_steps": 0, "decay_fraction": 1.0}  # of config.optim
# Names that also stand for what is compared with the checkpoint, beside settings.
DATA, CLIP = "data", "clip"
MAX_FILES = 10_000  # of a dataset that a checkpoint lists
SHOWN = 10  # of the files that differ


@dataclasses.dataclass(frozen=True)
class Change:
    """A difference that was allowed: of a setting, or of the dataset or a frozen stage (their checksums)."""

    name: str
    before: Any
    now: Any

    def entry(self, step: int) -> dict:
        """What changes.json holds of it."""
        return {"step": step, **dataclasses.asdict(self)}

    def __str__(self):
        return f"{self.name}: {self.before!r} in the workdir, {self.now!r} now"


def describe(dataset, sha256: Mapping[str, str] = types.MappingProxyType({})) -> dict:
    """What a checkpoint's `meta` says of the dataset and of the frozen parameters, JSON values.

    sha256: name of a frozen stage -> sha256 of its parameters.
    """
    files = [list(entry) for entry in dataset.files]
    found = dict(
        fingerprint=dataset.fingerprint,
        num_records=dataset.num_records,
        num_files=len(files),
        num_bytes=sum(size for _, size, _ in files),
    )
    if len(files) <= MAX_FILES:
        found["files"] = files
    return found | ({"frozen": dict(sha256)} if sha256 else {})


def frozen_of(meta: Mapping | None) -> dict[str, str]:
    """Name of a frozen stage -> sha256 of its parameters, of a checkpoint's `meta`; older runs named a CLIP
    alone, the oldest none."""
    clip = (meta or {}).get("clip_sha256")
    return (meta or {}).get("frozen") or ({"clip": clip} if clip else {})


def with_stored(config: dict, workdir: epath.Path) -> dict:
    """The config with the workdir's names of classes and type of products, if it gives none itself."""
    path = workdir / "config.json"
    if not path.exists():
        return config
    stored = SETTINGS_SINCE | json.loads(path.read_text())
    config = config | {"cpu_products": config.get("cpu_products") or stored["cpu_products"]}
    found = stored.get("data", {}).get("classes")
    if config["data"].get("classes") or not found:
        return config
    return config | {"data": config["data"] | {"classes": found}}


class Resumption:
    """The comparison of a run with what lies in its workdir: of `config` (plain JSON types) at construction.

    Args:
      allowed: names of settings that may differ, or of groups of them ('optim').

    Raises:
      ValueError: settings differ that are not allowed to, which it lists; or one of `allowed` is no setting,
        or needs not be allowed.
    """

    def __init__(self, workdir: epath.Path, config: Mapping, allowed: Collection[str] = ()):
        self._workdir = workdir
        self._allowed = tuple(CLIP if name == f"frozen.{CLIP}" else name for name in allowed)
        path = workdir / "config.json"
        now = _compared(json.loads(json.dumps(config)))
        stored = json.loads(path.read_text()) if path.exists() else {}
        # Older runs stored paths as they were written.
        stored = _compared(models.expand_paths(stored)) if stored else now
        names = stored.keys() | now.keys()
        groups = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
        models.check_names(self._allowed, sorted(groups), "config")
        self._changes = [
            Change(name, stored.get(name, "(absent)"), now.get(name, "(absent)"))
            for name in sorted(names)
            if not _is_among(name, FREE) and stored.get(name) != now.get(name)
        ]
        refused = [change for change in self._changes if not _is_among(change.name, self._allowed)]
        if refused:
            raise ValueError(
                f"{workdir} was trained with another config; use another --workdir, set these back, or go on "
                f"with them by --allow_changed={','.join(change.name for change in refused)}:\n"
                + "\n".join(f"  {change}" for change in refused)
            )
        self._check_needed(
            name for name in self._allowed if name not in (DATA, CLIP) and not _is_among(name, ("frozen",))
        )

    def compare(self, meta: Mapping | None, now: Mapping) -> None:
        """Compares the dataset and the frozen stages with those of a checkpoint.

        Args:
          meta: the checkpoint's; None where a run begins.
          now: of `describe`.

        Raises:
          ValueError: they differ and may not, or nothing does of what was allowed to.
        """
        if meta is not None and meta["fingerprint"] != now["fingerprint"]:
            change = Change(DATA, meta["fingerprint"], now["fingerprint"])
            if not self._may(change, meta["step"]):
                raise ValueError(_another_dataset(self._workdir, meta, now))
            self._changes.append(change)
        for name, before in frozen_of(meta).items():
            assert meta is not None
            after = frozen_of(now).get(name, "")
            if before == after:
                continue
            change = Change(CLIP if name == CLIP else f"frozen.{name}", before, after)
            if not self._may(change, meta["step"]):
                what = "the CLIP" if name == CLIP else f"the frozen {name}"
                raise ValueError(
                    f"{what} has changed since step {meta['step']} of {self._workdir}: the sha256 of its "
                    f"parameters was {before[:12]} then, is {after[:12] or 'none'} now. Give the one of "
                    f"then{', or the embeddings that it made' * (name == CLIP)}, use another --workdir, or "
                    f"go on with this one by --allow_changed={change.name}"
                )
            self._changes.append(change)
        self._check_needed(self._allowed)

    def note(self, step: int) -> None:
        """Writes the allowed changes, from this step on, to the log and to WORKDIR/changes.json."""
        entries = _noted(self._workdir)
        for change in self._changes:
            logging.warning("changed from step %d on, as allowed: %s", step, change)
            entry = change.entry(step)
            entries += [entry] if entry not in entries else []  # of a run that was killed before it saved
        if self._changes:
            modeldir.write_json(self._workdir / "changes.json", {"changes": entries})

    def _may(self, change: Change, step: int) -> bool:
        """Whether it was allowed: now, or to a run that was killed before it saved."""
        return _is_among(change.name, self._allowed) or change.entry(step) in _noted(self._workdir)

    def _check_needed(self, names: Iterable[str]) -> None:
        """Raises ValueError for an allowed name that did not change. A change that was allowed before counts,
        because the same command may run again."""
        changed = {change.name for change in self._changes}
        changed |= {entry["name"] for entry in _noted(self._workdir)}
        for name in names:
            if not any(_is_among(other, (name,)) for other in changed):
                raise ValueError(
                    f"--allow_changed names {name}, which is as it was in {self._workdir} or may change "
                    "without: leave it out"
                )


def _noted(workdir: epath.Path) -> list[dict]:
    path = workdir / "changes.json"
    return json.loads(path.read_text())["changes"] if path.exists() else []


def _compared(config: Mapping) -> dict:
    """{'a.b': value} of a config, with what older ones lack."""
    config = SETTINGS_SINCE | frozen.short(config)
    return _flat(config | {"optim": OPTIM_SINCE | config.get("optim", {})})


def _flat(tree, prefix: str = "") -> dict:
    """{'a.b': value} of nested dicts; a dict without entries is a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _is_among(name: str, places: Collection[str]) -> bool:
    """Whether `name` is one of `places` or lies under one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _another_dataset(workdir: epath.Path, meta: Mapping, now: Mapping) -> str:
    return (
        f"the dataset has changed since step {meta['step']} of {workdir}: fingerprint "
        f"{meta['fingerprint'][:12]} and {meta.get('num_records', '?')} records then, "
        f"{now['fingerprint'][:12]} and {now['num_records']} now. Names, sizes and numbers of records of its "
        "files must be as they were: restore the data, use another --workdir, or go on with what there is by "
        f"--allow_changed={DATA}\n" + "\n".join(_differing_files(meta, now))
    )


def _differing_files(meta: Mapping, now: Mapping) -> list[str]:
    """Lines that name the files removed, added and resized, SHOWN at most."""
    if "files" not in meta or "files" not in now:
        if "num_files" not in meta:
            return ["  (that checkpoint is from before they were listed)"]
        return [
            f"  {meta['num_files']} files of {meta['num_bytes']} bytes then, {now['num_files']} of "
            f"{now['num_bytes']} now; more than {MAX_FILES} are not listed"
        ]
    then, there = ({name: (size, count) for name, size, count in found["files"]} for found in (meta, now))

    def show(entry):
        return f"{entry[0]} bytes, {entry[1]} records"

    lines = [f"  removed: {name} ({show(then[name])})" for name in sorted(then.keys() - there.keys())]
    lines += [f"  added: {name} ({show(there[name])})" for name in sorted(there.keys() - then.keys())]
    lines += [
        f"  resized: {name} ({show(then[name])} then, {show(there[name])} now)"
        for name in sorted(then.keys() & there.keys())
        if then[name] != there[name]
    ]
    more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more

"""A `Run` is all that the loop of training reads and writes; and the state that a run begins with."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from dalle2_jax.data import words
from dalle2_jax.models import models, trainable
from dalle2_jax.models.frozen import Loaded
from dalle2_jax.runtime import checkpoint, metrics, modeldir, partition, processes
from dalle2_jax.train import checks, lock, resume, statistics, stopping
from dalle2_jax.train.plan import Plan
from dalle2_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A plan with all that its loop reads and writes.

    Attributes:
      workdir: the folder of the run.
      frozen: parameters of the frozen stages by name, on the devices; in 'base' those of the stage that rest.
      dataset, held_out: what training and validation read.
      about: what checkpoints say of the data and the frozen parameters, `resume.describe`.
      stops: the signals that stop it.
      words_before: of the captions that the run read before it was interrupted; None: none.
    """

    plan: Plan
    workdir: epath.Path
    frozen: dict
    dataset: Any
    held_out: Any
    about: dict
    checkpointer: checkpoint.Checkpointer
    writer: metrics.Writer
    stops: stopping.Stopping
    words_before: words.Words | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state after step `step`, while training goes on, and the words read so far."""
        if jax.process_index() == 0 and (read := self.dataset.words(self.words_before)):
            words.write(self.workdir, read)
        meta = self.about | dict(step=step, bad_records=self.dataset.bad_records())
        self.checkpointer.save(step, state, meta)


def claimed(workdir: epath.Path) -> contextlib.AbstractContextManager[lock.Lock | None]:
    """Makes the workdir and locks it; the lock is process 0's, the others get None.

    Raises ValueError for a workdir that cannot be written, or that another run writes.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return lock.Lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    except OSError as error:
        raise ValueError(
            f"the workdir {workdir} cannot be written: {error}. Make it writable and see that the disk has "
            "space, or use another --workdir"
        ) from error


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Around the loop: an error in one process ends all of them at once, since the others would wait for it.

    Signals and steps that are not finite reach all processes by themselves.
    """
    try:
        yield
    except (FloatingPointError, stopping.Stopped):
        raise
    except Exception as error:
        processes.end_together(error, checks.FAILED)
        raise


def first_state(plan: Plan, frozen: dict, dataset) -> TrainState:
    """The state before the first step: fresh, with the parameters of `init_from`, or fitted to the data."""
    state, source = plan.init(), plan.config["init_from"]
    params = state.params
    if source:
        _, _, loaded = models.load_start(source, plan.config)
        trained, _ = trainable.split(loaded, plan.trainable)
        params = started_from(source, trained, params)
    elif getattr(plan.stage, "fit_rows", 0):
        params = statistics.fit(plan, params, frozen, dataset)
    if not source and getattr(plan.stage, "null_tokens", False):
        tokenizer = dataset.settings.tokenizer
        params = statistics.with_null_caption(plan, params, frozen, tokenizer)
    if params is state.params:
        return state
    if "stats" in params:  # fitted on this process, the same on all
        params = params | {"stats": partition.to_host(params["stats"])}
    params = jax.device_put(params, plan.shardings.params)
    return dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params))


def frozen_parameters(
    plan: Plan, loaded: Mapping[str, Loaded], workdir: epath.Path, meta: Mapping | None
) -> tuple[dict[str, dict], dict[str, str]]:
    """(parameters of the frozen stages on the devices, their sha256), by name.

    'base' has those of the stage itself that rest, if any. A run that begins (`meta` is None) reads them from
    `init_from` and writes them to the workdir, where a run that goes on reads them.
    """
    params = {name: found.params for name, found in loaded.items()}
    sha256 = {name: found.sha256 for name, found in loaded.items()}
    if plan.trainable:
        if meta is not None:
            base = trainable.load_base(workdir, resume.frozen_of(meta)[trainable.BASE])
        else:
            source = plan.config["init_from"]
            base = trainable.split(models.load_start(source, plan.config)[2], plan.trainable)[1]
            modeldir.check_params(base, plan.abstract_frozen[trainable.BASE], source)
            if jax.process_index() == 0:
                trainable.save_base(workdir, base)
        params[trainable.BASE], sha256[trainable.BASE] = base, modeldir.sha256(base)
    return jax.device_put(params, partition.shardings(params, plan.mesh)), sha256


def started_from(path: str, loaded: dict, fresh: dict) -> dict:
    """`fresh` parameters, replaced by those that were `loaded` from `path`.

    Parameters that `loaded` lacks stay fresh and are named in the log. Raises ValueError for parameters that
    this network lacks, or has in another shape.
    """
    found, wanted = modeldir.flatten(loaded), modeldir.flatten(fresh)
    shared = {name: leaf for name, leaf in wanted.items() if name in found}
    modeldir.check_params(loaded, modeldir.unflatten(shared), path)
    new = sorted(wanted.keys() - found.keys())
    if new:
        logging.warning("%s has no %s: training begins with them fresh", path, ", ".join(new))
    return modeldir.unflatten(wanted | found)

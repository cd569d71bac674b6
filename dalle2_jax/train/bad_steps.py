"""Steps whose loss or gradient is not finite: each line of the log tells, and a streak of them ends the run.

Such a step changes nothing (`state`), so a streak does no harm, but a run that takes no step learns nothing.
"""

import collections
import math
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.runtime import checkpoint, modeldir, partition
from dalle2_jax.train.state import MAX_BAD_STEPS, TrainState

_KEPT = 1000  # steps between lines of the log of which the records are remembered


class BadSteps:
    """Looks at the counters of the state at each line of the log, and so before each save.

    Args:
      workdir: where bad_steps.json goes.
      checkpointer: the run's, which a streak waits for.
      train_state: that the run begins with; what it has counted was told before it was saved.
      log_every: the most steps between lines.
      mesh: of the batches.
    """

    def __init__(
        self,
        workdir: epath.Path,
        checkpointer: checkpoint.Checkpointer,
        train_state: TrainState,
        log_every: int,
        mesh,
    ):
        self._workdir, self._checkpointer, self._mesh = workdir, checkpointer, mesh
        self._total, self._streak = int(train_state.bad_total), int(train_state.bad_streak)
        self._batches = collections.deque(maxlen=min(log_every, _KEPT) + MAX_BAD_STEPS + 1)

    def read(self, step: int, index: np.ndarray) -> None:
        """Remembers which records this process read for a step."""
        self._batches.append((step, index))

    def look(self, step: int, scalars: Mapping[str, float]) -> None:
        """Tells of such steps since the last line; all processes call it with the scalars of this step.

        Raises:
          FloatingPointError: MAX_BAD_STEPS or more came in a row, whether that has ended or not.
            WORKDIR/bad_steps.json names the records of the last of them.
        """
        row, streak, total = (
            int(scalars[f"train/{name}"]) for name in ("bad_steps", "bad_streak", "bad_total")
        )
        if row < MAX_BAD_STEPS and streak == self._streak:
            if total > self._total:
                logging.warning(
                    "%d steps up to step %d were not finite and changed nothing; %d in the whole run",
                    total - self._total,
                    step,
                    total,
                )
            self._total = total
            return
        count, end = (row, step) if row >= MAX_BAD_STEPS else (MAX_BAD_STEPS, streak)
        self._checkpointer.wait()
        note = self._note(end, scalars)
        raise FloatingPointError(
            f"{count} steps in a row had a loss or gradient that is not finite (step {end}); they changed "
            f"nothing, and the last good state is checkpoint {self._checkpointer.latest_step()}. The records "
            f"of the last batches are in {note}: look at them, or lower optim.learning_rate or set "
            "optim.grad_clip and go on with --allow_changed=optim"
        )

    def _note(self, end: int, scalars: Mapping[str, float]) -> epath.Path:
        """Writes the records of the steps up to `end`."""
        records = {
            str(step): partition.gather_index(index, self._mesh).tolist()
            for step, index in self._batches
            if end - MAX_BAD_STEPS < step <= end
        }
        shown = {name: value if math.isfinite(value) else str(value) for name, value in scalars.items()}
        path = self._workdir / "bad_steps.json"
        if jax.process_index() == 0:
            modeldir.write_json(path, {"step": end, "scalars": shown, "records": records})
        return path

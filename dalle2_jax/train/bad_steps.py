"""Steps whose loss or gradient is not finite: they are logged, and a streak of them ends the run.

Such a step changes nothing (see `step`). A streak does no harm, but the run learns nothing.
"""

import collections
import math
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.runtime import modeldir, partition
from dalle2_jax.train.run import Run
from dalle2_jax.train.step import MAX_BAD_STEPS, TrainState

_KEPT = 1000  # the most steps between two lines of the log whose records are remembered


class BadSteps:
    """Checks the counters of the state at each line of the log, hence before each save.

    Args:
      run: its checkpointer is waited for, its workdir gets bad_steps.json.
      state: the state that the run begins with. Its counters were already reported.
    """

    def __init__(self, run: Run, state: TrainState):
        self._run = run
        self._total, self._streak = int(state.bad_total), int(state.bad_streak)
        log_every = run.plan.config["log_every"]
        self._batches: collections.deque = collections.deque(maxlen=min(log_every, _KEPT) + MAX_BAD_STEPS + 1)

    def read(self, step: int, index: np.ndarray) -> None:
        """Remembers which records this process read for a step."""
        self._batches.append((step, index))

    def look(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs such steps since the last line. All processes call it with the scalars of this step.

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
        self._run.checkpointer.wait()
        note = self._note(end, scalars)
        good = self._run.checkpointer.latest_step()
        raise FloatingPointError(
            f"{count} steps in a row had a loss or gradient that is not finite (step {end}); they changed "
            f"nothing, and the last good state is checkpoint {good}. The records "
            f"of the last batches are in {note}: look at them, or lower optim.learning_rate or set "
            "optim.grad_clip and go on with --allow_changed=optim"
        )

    def _note(self, end: int, scalars: Mapping[str, float]) -> epath.Path:
        """Writes the records of the steps up to `end`."""
        records = {
            str(step): partition.gather_index(index, self._run.plan.mesh).tolist()
            for step, index in self._batches
            if end - MAX_BAD_STEPS < step <= end
        }
        shown = {name: value if math.isfinite(value) else str(value) for name, value in scalars.items()}
        path = self._run.workdir / "bad_steps.json"
        if jax.process_index() == 0:
            modeldir.write_json(path, {"step": end, "scalars": shown, "records": records})
        return path

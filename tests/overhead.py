"""What saving and logging cost: python -m tests.overhead [CONFIG.py[:preset]] [STEPS]

Trains in a temporary folder, with a line of the log each step and a checkpoint each 20, and prints for how
long the loop stands still for them, what the steps lose beside which a checkpoint is written, and the shares
of the time of a run that saves and logs as often as the config says.
"""

import contextlib
import importlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dalle2_jax.models import models
from dalle2_jax.runtime import checkpoint, metrics, partition
from dalle2_jax.train import loop


def main(where: str = "configs/tiny/upsampler64.py", steps: str = "120") -> None:
    partition.initialise()
    name, _, preset = where.partition(":")
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    settings = models.to_plain(module.get_config(preset))
    usual = {key: settings[key] for key in ("checkpoint_every", "log_every")}
    settings |= dict(num_steps=int(steps), log_every=1, checkpoint_every=20, keep_checkpoints=1)
    settings |= dict(eval_every=10**9, sample_every=10**9)

    spent, lines, writing = {"save": [], "log": []}, [], []
    waited = checkpoint.Checkpointer.check

    def timed(owner, method, key):
        whole = getattr(owner, method)

        def call(self, *args, **options):
            began = time.perf_counter()
            try:
                return whole(self, *args, **options)
            finally:
                spent[key].append(time.perf_counter() - began)

        setattr(owner, method, call)

    def check(self):  # once a line, after the step's result has reached the host
        lines.append(time.perf_counter())
        writing.append(self._manager.is_saving_in_progress())
        waited(self)

    timed(checkpoint.Checkpointer, "save", "save")
    timed(metrics.Writer, "scalars", "log")
    checkpoint.Checkpointer.check = check
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(sys.stderr):
        loop.train(settings, workdir)
        size = sum(f.stat().st_size for f in (Path(workdir) / "checkpoints").rglob("*"))

    durations = np.diff(lines)
    held = [
        20 * i - 1 for i in range(1, len(durations) // 20 + 1)
    ]  # the step after each save: it stood still
    busy = [d for i, d in enumerate(durations) if writing[i + 1] and i not in held]
    free = [d for i, d in enumerate(durations) if not writing[i + 1] and i not in held][2:]
    step, save, log = np.median(free), np.median(spent["save"][1:-1]), np.median(spent["log"])
    slower = max(0.0, np.median(busy) - step) * len(busy) / len(held) if busy else 0.0
    print(f"{where}: {1000 * step:.0f} ms a step, checkpoints of {size / 1e6:.1f} MB")
    print(
        f"a save: the loop stands still for {1000 * save:.0f} ms, steps beside it lose {1000 * slower:.0f} ms"
    )
    print(f"a line of the log: {1000 * log:.2f} ms")
    for what, cost, every in (("saving", save + slower, "checkpoint_every"), ("logging", log, "log_every")):
        share = cost / (cost + usual[every] * step)
        print(f"{what} every {usual[every]} steps: {100 * share:.3f} % of the time")


if __name__ == "__main__":
    main(*sys.argv[1:])

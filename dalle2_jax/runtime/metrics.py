"""The log of a run: scalars, grids of images and text (`Writer`), speed and remaining time (`Progress`).

Process 0 writes WORKDIR/metrics.jsonl (one JSON object a line), TensorBoard events and samples/*.png, and
logs to Weights & Biases if a project is set. A resumed run appends.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.runtime import extras
from dalle2_jax.runtime.grid import labelled_grid as labelled_grid
from dalle2_jax.runtime.grid import save_png as save_png

# Dense bfloat16 peak of one device, FLOP/s, from data sheets. The first name within the device's kind counts.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),  # one of the two devices of a chip
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
)

# A warning is logged above this share of time spent waiting for input, at most once in so many seconds.
SLOW_INPUT, SLOW_INPUT_EVERY = 0.2, 300.0


def peak_flops(device_kind: str) -> float | None:
    """The dense bfloat16 peak of one device in FLOP/s; None: unknown, as of CPUs."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def show_duration(seconds: float) -> str:
    """'42s', '3m05s', '2h10m' or '4d03h'."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if hours >= 48:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{total % 60:02d}s" if minutes else f"{total}s"


class Writer:
    """Writes scalars, images and text to a workdir, on process 0 only.

    Args:
      workdir: made if absent.
      wandb: 'project' or 'entity/project' of Weights & Biases; None: not used.
    """

    def __init__(self, workdir: str | os.PathLike, wandb: str | None = None):
        self._workdir = epath.Path(workdir)
        self._active = jax.process_index() == 0
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None
        if not self._active:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        torn = path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n")
        self._file = path.open("a")
        if torn:  # the run was killed in the middle of a line
            self._file.write("\n")
        if wandb:
            self._wandb = _start_wandb(self._workdir, wandb)
        self._board = _start_tensorboard(self._workdir)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {name: number} of one step, such as 'train/loss'."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._line({"step": int(step), "time": round(time.time(), 3), **numbers})
        if self._writes_events():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def grid(self, step: int, name: str, grid: np.ndarray, captions: Sequence[str] | None = None) -> None:
        """Writes a grid, uint8 [height, width, 3], to samples/NAME_STEP.png and to TensorBoard.

        captions: a JSON list in the PNG's text entry 'captions'. Raises OSError that names the file.
        """
        if not self._active:
            return
        path = self._workdir / "samples" / f"{name.replace('/', '_')}_{step:08d}.png"
        try:
            save_png(path, grid, {"captions": json.dumps(list(captions or []), ensure_ascii=False)})
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        logging.info("wrote %s", path)
        if self._writes_events():
            self._board.add_image(name, grid, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(grid)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text to metrics.jsonl and TensorBoard."""
        if not self._active:
            return
        self._line({"step": int(step), name: text})
        if self._writes_events():
            self._board.add_text(name, text, step)

    def flush(self) -> None:
        """Flushes the files, for readers."""
        if self._active:
            self._file.flush()
            if self._writes_events():
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes; calling it again does no harm."""
        if not self._active:
            return
        self._active = False
        with contextlib.suppress(OSError):  # a full disk, which the last line has reported
            self._file.close()
        if self._writes_events():
            with contextlib.suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _line(self, values: dict) -> None:
        """Appends to metrics.jsonl. Raises OSError that names the file."""
        try:
            self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._workdir / "metrics.jsonl")) from error

    def _writes_events(self) -> bool:
        """Whether TensorBoard's thread is alive. A full disk ends it silently, and its queue then blocks."""
        if self._board is not None:
            thread = getattr(getattr(self._board.file_writer, "event_writer", None), "_worker", None)
            if thread is not None and not thread.is_alive():
                logging.warning("TensorBoard's events can be written no more (is the disk full?)")
                self._board = None
        return self._board is not None


def _start_tensorboard(workdir: epath.Path):
    # tensorboardX would import torch, for graphs of torch modules: seconds of every start.
    modules: dict[str, Any] = sys.modules
    hidden = "torch" not in modules
    if hidden:
        modules["torch"] = None
    try:
        import tensorboardX
    except ImportError:
        logging.info("no TensorBoard events: tensorboardX is not installed (metrics.jsonl is written)")
        return None
    finally:
        if hidden:
            del modules["torch"]
    return tensorboardX.SummaryWriter(os.fspath(workdir), flush_secs=30)


def _start_wandb(workdir: epath.Path, where: str):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb is not installed: {extras.how_to_install('wandb')}, or leave --config.wandb empty"
        ) from error
    entity, _, project = where.rpartition("/")
    id_file = workdir / "wandb_id.txt"  # for a resumption
    run_id = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(
        project=project, entity=entity or None, id=run_id, resume="allow", dir=os.fspath(workdir)
    )
    id_file.write_text(run.id)
    return run


class Progress:
    """Measures a loop: steps and examples a second, share of time spent waiting for input, FLOP/s, time left.

    With n steps in `time` since the last report, w seconds inside `waiting()` and p inside `paused()`:

        steps/s = n / (time - p)    wait = w / (time - p)    MFU = flops_per_step * steps/s / (peak * devices)
        time left = (total_steps - step) * (seconds a step, recent ones weighing more, + pauses a step)

    JAX computes asynchronously: call `report` after the step's results have reached the host.

    Args:
      total_steps, start_step: of the run; a resumption starts above 0.
      batch_size: global; 0: no examples/s.
      flops_per_step: of all devices (a multiply-add is two); None: unknown.
      name: the console's line begins with it.
      print_every: seconds between lines on the console; the last step always prints.
      clock: for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        batch_size: int = 0,
        flops_per_step: float | None = None,
        name: str = "",
        print_every: float = 5.0,
        file=None,
        clock=time.monotonic,
    ):
        self._total, self._batch_size, self._name = total_steps, batch_size, name
        self._flops = flops_per_step if flops_per_step and flops_per_step > 0 else None
        self._print_every, self._file, self._clock = print_every, file, clock
        self._began = self._last_time = clock()
        self._last_step, self._last_print = start_step, -math.inf
        self._waited = self._paused = 0.0
        self._seconds_per_step: float | None = None
        self._pauses, self._steps = 0.0, 0
        self._warned = -math.inf

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        began = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts the time inside (evaluation, samples) in the time left, not in the speed."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def report(self, step: int, **shown: float) -> dict[str, float]:
        """Returns the speed since the last report as scalars; prints them and `shown` (such as the loss).

        Names: speed/steps_per_s, speed/examples_per_s, speed/wait (0..1), speed/seconds_left, and speed/mfu
        (0..1), or speed/gflops for a device of unknown peak. Empty if `step` has not advanced.
        """
        now = self._clock()
        steps = step - self._last_step
        if steps <= 0:
            return {}
        busy = max(now - self._last_time - self._paused, 1e-9)
        rate = steps / busy
        self._steps, self._pauses = self._steps + steps, self._pauses + self._paused
        # An average that weights recent windows and long ones more.
        keep = 0.0 if self._seconds_per_step is None else 0.7 ** (steps / max(1, self._steps / 10))
        self._seconds_per_step = keep * (self._seconds_per_step or 0.0) + (1 - keep) / rate
        left = (self._total - step) * (self._seconds_per_step + self._pauses / self._steps)
        values = {
            "speed/steps_per_s": rate,
            "speed/wait": min(1.0, self._waited / busy),
            "speed/seconds_left": left,
        }
        line = [
            f"{self._name} {step}/{self._total} ({100 * step // max(1, self._total)}%)".strip(),
            *(f"{name} {value:.4g}" for name, value in shown.items()),
            f"{rate:.3g} steps/s",
        ]
        if self._batch_size:
            values["speed/examples_per_s"] = rate * self._batch_size
            line.append(f"{rate * self._batch_size:.4g} examples/s")
        line.append(f"input wait {100 * values['speed/wait']:.0f}%")
        if self._flops:
            flops, devices = self._flops * rate, jax.devices()
            peak = peak_flops(devices[0].device_kind)
            if peak:
                values["speed/mfu"] = flops / (peak * len(devices))
                line.append(f"MFU {100 * values['speed/mfu']:.1f}%")
            else:
                values["speed/gflops"] = flops / 1e9
                line.append(f"{flops / 1e9:.3g} GFLOP/s")
        line.append(f"{show_duration(now - self._began)} gone, {show_duration(left)} left")
        self._warn_of_slow_input(values["speed/wait"], steps, now)
        if step >= self._total or now - self._last_print >= self._print_every:
            self._last_print = now
            if jax.process_index() == 0:
                print(" | ".join(line), file=self._file or sys.stdout, flush=True)
        self._last_time, self._last_step, self._waited, self._paused = now, step, 0.0, 0.0
        return values

    def _warn_of_slow_input(self, wait: float, steps: int, now: float) -> None:
        first = self._steps == steps  # the reading threads have just started
        if wait > SLOW_INPUT and not first and now - self._warned >= SLOW_INPUT_EVERY:
            self._warned = now
            logging.warning(
                "%.0f%% of the time of the last %d steps was spent waiting for input: raise "
                "data.num_workers, store smaller pictures, or use a faster disk or more processes",
                100 * wait,
                steps,
            )

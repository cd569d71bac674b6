"""Stopping a run by a signal: all processes agree, and stop where no work is lost.

Before the first step a run stops at the next `Stopping.check`. Between steps it asks `Stopping.latest` once,
and saves before it stops.
"""

import math
import os
import signal
import threading
import time

import jax
import numpy as np
from absl import logging

from dalle2_jax.runtime import processes

SAME_MOMENT = 1.0  # seconds


class Stopped(Exception):
    """A signal stopped a run before its first step; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Interrupted:
    """Notes SIGTERM and SIGINT; a second signal ends the process at once. Signals within SAME_MOMENT are one:
    who stops a terminal's or a service's processes signals all of them, and launchers pass theirs on.

    Python's own handlers wait for the program that XLA compiles or the devices run, which may be minutes. So
    a thread watches, which the signals reach through a pipe.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal, self._noted_at = None, math.nan
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        while number := os.read(self._pipe[0], 1)[0]:
            if number not in self.SIGNALS:
                continue
            if time.monotonic() - self._noted_at < SAME_MOMENT:
                continue
            if self.signal is not None:
                os._exit(128 + number)
            self.signal, self._noted_at = number, time.monotonic()
            name = signal.Signals(number).name
            logging.warning("%s: stopping once nothing is lost by it (again to stop at once)", name)

    def restore(self):
        """Put back the signal handlers that were there before."""
        signal.set_wakeup_fd(self._previous_pipe)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._pipe[1], bytes(1))
        self._thread.join()
        for end in self._pipe:
            os.close(end)


class Stopping:
    """Notes signals while its `with` lasts. The processes agree on the largest of theirs.

    A process must not stop alone, because the others would wait for it.
    """

    def __enter__(self):
        self._interrupted, self._pending = Interrupted(), None
        if jax.process_count() > 1:
            mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
            self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._maximum = jax.jit(lambda x: x.max(), out_shardings=whole)
        return self

    def __exit__(self, *exception):
        self._interrupted.restore()

    def check(self, where: str) -> None:
        """Raises Stopped if any process got a signal. All processes wait for each other here."""
        found = self._interrupted.signal or 0
        if jax.process_count() > 1:
            processes.sync(where)
            found = int(self._largest(found))
        if found:
            raise Stopped(found)

    def latest(self) -> int:
        """The signal that any process had at the previous call, 0 for none; with one process, at this call.

        The maximum over processes is computed beside a step and read one step later, so no process waits for
        the step that it has just begun.
        """
        found = self._interrupted.signal or 0
        if jax.process_count() == 1:
            return found
        before, self._pending = self._pending, self._largest(found)
        return 0 if before is None else int(before)

    def _largest(self, value: int) -> jax.Array:
        mine = np.full(jax.local_device_count(), value, np.int32)
        return self._maximum(jax.make_array_from_process_local_data(self._split, mine))

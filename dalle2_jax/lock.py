"""One writer a workdir: WORKDIR/lock names the run that writes there and is rewritten while that run lives.

A run that starts where a lock lies takes it over when its owner is dead: at once if it was a process of this
machine that is gone, else after it has not been rewritten for SILENCE_SECONDS. Clocks of different machines
are not compared. An owner that finds another's name in its lock (it was suspended, and taken for dead) may
not write any more.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from absl import logging
from etils import epath

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 20.0


def _machine() -> str:
    """Where process numbers mean the same: one boot of a machine, one namespace of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        pass
    return True


class Lock:
    """Held from construction until `release`, or until the end of its `with`.

    Raises:
      ValueError: a run that lives writes to `workdir`; the message names its host and process.
    """

    def __init__(
        self, workdir: str | os.PathLike, beat: float = BEAT_SECONDS, silence: float = SILENCE_SECONDS
    ):
        self._path = epath.Path(workdir) / "lock"
        self._beat, self._count = beat, 0
        self._owner = dict(host=socket.gethostname(), pid=os.getpid(), machine=_machine(), began=time.time())
        self._refuse_if_held(silence)
        self._write()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def _read(self) -> dict | None:
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        new = self._path.parent / f"lock.{os.getpid()}"
        new.write_text(json.dumps(self._owner | {"beat": self._count}))
        new.replace(self._path)
        self._count += 1

    def _refuse_if_held(self, silence: float) -> None:
        first = self._read()
        if first is None:
            return
        host, pid = first.get("host"), first.get("pid")
        here = first.get("machine") == self._owner["machine"]
        if here and isinstance(pid, int) and (pid == os.getpid() or not _alive(pid)):
            return
        logging.info("%s names process %s on %s: looking whether it lives", self._path, pid, host)
        until = time.monotonic() + silence
        while time.monotonic() < until:
            now = self._read()
            if now is None:  # it has just ended
                return
            if now != first:
                raise ValueError(
                    f"{self._path.parent} is being written by process {now.get('pid')} on {now.get('host')}: "
                    "stop that run first, or use another --workdir"
                )
            time.sleep(min(0.2, silence / 10))
        logging.warning(
            "process %s on %s is gone: its lock on %s is taken over", pid, host, self._path.parent
        )

    def _mine(self) -> bool:
        found = self._read()
        return found is None or all(found.get(name) == value for name, value in self._owner.items())

    def _keep_alive(self) -> None:
        while not self._released.wait(self._beat):
            if not self._mine():
                return
            with contextlib.suppress(OSError):  # a full disk: the checkpoint will say so
                self._write()

    def check(self) -> None:
        """Raises ValueError if another run has taken the workdir over."""
        if not self._mine():
            found = self._read() or {}
            raise ValueError(
                f"{self._path.parent} was taken over by process {found.get('pid')} on {found.get('host')} "
                "while this one was silent: it stops without writing"
            )

    def release(self) -> None:
        """Gives the workdir free; calling it again does no harm."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        if self._mine():
            self._path.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()

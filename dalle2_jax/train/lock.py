"""One writer a workdir: WORKDIR/lock names the run that writes there and is rewritten while that run lives.

A run that starts where a lock lies takes it over when its owner is dead: at once if it was a process of this
machine that is gone, else after it has not been rewritten for SILENCE_SECONDS. Clocks of different machines
are not compared. An owner that finds another's name in its lock (it was suspended, and taken for dead) may
not write any more.

Of several runs that start at the same time one wins. A lock is created atomically and only where there is
none (by a hard link, or by exclusive creation where there are no links). A dead lock is replaced under a
`flock`, if it is still in its place. A file system without these (a bucket that is not mounted) lets the last
run win, and the others notice before they write.
"""

import contextlib
import fcntl
import json
import os
import secrets
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


def _parse(contents: bytes | None) -> dict | None:
    try:
        found = json.loads(contents or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


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
        self._new = self._path.parent / f"lock.{secrets.token_hex(4)}"  # what is to become the lock
        self._local = "://" not in os.fspath(self._path)
        while not self._create():
            dead = self._dead(silence)
            if dead is not None and self._replace(dead):
                break
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def _text(self) -> str:
        """What the lock says at the next beat."""
        self._count += 1
        return json.dumps(self._owner | {"beat": self._count})

    def _look(self) -> bytes | None:
        """What is in the lock, None where there is none."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _read(self) -> dict | None:
        """Whom the lock names, None where it names nobody."""
        with contextlib.suppress(OSError):
            return _parse(self._look())
        return None

    def _write(self) -> None:
        self._new.write_text(self._text())
        self._new.replace(self._path)

    def _create(self) -> bool:
        """Makes the lock ours where there is none."""
        if not self._local:
            if self._look() is not None:
                return False
            self._write()
            return True
        text = self._text()
        try:
            self._new.write_text(text)
            os.link(self._new, self._path)
        except FileExistsError:
            return False
        except OSError:  # there are no hard links, or nothing can be written, which this says
            with contextlib.suppress(FileExistsError), open(self._path, "x") as file:
                file.write(text)
                return True
            return False
        finally:
            self._new.unlink(missing_ok=True)
        return True

    def _dead(self, silence: float) -> bytes | None:
        """The contents of a lock whose owner is dead; None where the lock has gone.

        Raises ValueError where the owner lives. A lock that names nobody (it was torn by a crash, or is just
        being written) is dead if it stays so.
        """
        first = self._look()
        if first is None:
            return None
        owner = _parse(first) or {}
        host, pid = owner.get("host"), owner.get("pid")
        here = owner.get("machine") == self._owner["machine"]
        if here and isinstance(pid, int) and (pid == os.getpid() or not _alive(pid)):
            return first
        logging.info("%s names process %s on %s: looking whether it lives", self._path, pid, host)
        until = time.monotonic() + silence
        while time.monotonic() < until:
            found = self._look()
            if found is None:  # it has just ended
                return None
            if found != first:
                now = _parse(found) or {}
                raise ValueError(
                    f"{self._path.parent} is being written by process {now.get('pid')} on {now.get('host')}: "
                    "stop that run first, or use another --workdir"
                )
            time.sleep(min(0.2, silence / 10))
        logging.warning(
            "process %s on %s is gone: its lock on %s is taken over", pid, host, self._path.parent
        )
        return first

    def _replace(self, dead: bytes) -> bool:
        """Puts our lock in the place of one that holds `dead`; False where another run was first."""
        if not self._local:
            self._write()
            return True
        try:
            # NFS locks only what may be written.
            file = open(self._path, "r+b" if os.access(self._path, os.W_OK) else "rb")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(
                    file, fcntl.LOCK_EX
                )  # until the file is closed; a process that dies lets go of it
            except OSError as error:
                logging.info("%s cannot be locked (%s): the last of several runs wins", self._path, error)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
            except FileNotFoundError:
                return False
            if not same or file.read() != dead:
                return False
            self._write()
            return True

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

"""The errors and log lines of Orbax as ours: damage, unreadable files, failed saves."""

import contextlib
import errno
import logging as standard_logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.runtime import processes

# Errors of files that are missing or no regular files; after others a checkpoint may be intact.
OF_FILES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
# tensorstore's errors of a bucket that cannot be read at present.
_CODES = (
    "ABORTED CANCELLED DEADLINE_EXCEEDED PERMISSION_DENIED RESOURCE_EXHAUSTED UNAUTHENTICATED UNAVAILABLE"
)
OF_SERVICES = tuple(f"{code}: " for code in _CODES.split())


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, or whose leaves have changed since they were saved."""


class ReadFailed(OSError):
    """A checkpoint that could not be read and may be intact: files of another user, no memory or network."""


class SaveFailed(OSError):
    """A checkpoint that could not be written: a full disk, a quota, a file system that went away."""


def _os_error(error: BaseException) -> int | None:
    """The number of an error of the operating system, also within the messages of tensorstore."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None


def cause(error: BaseException) -> str:
    """The operating system's message, else the first line of the error."""
    number = _os_error(error)
    return os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0][:300]


def _may_be_whole(error: BaseException) -> bool:
    """Whether a checkpoint that could not be read for this reason may be intact."""
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return True
    number = _os_error(error)
    if number is not None:
        return number not in OF_FILES
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)  # Orbax raises it without a number
    return str(error).startswith(OF_SERVICES)


@contextlib.contextmanager
def explain_damage(path: epath.Path) -> Iterator[None]:
    """Turns errors of Orbax into a DamagedCheckpoint, or a ReadFailed for files that may be intact."""
    try:
        yield
    except Exception as error:  # also plain Exceptions, for a truncated file
        if isinstance(error, ValueError) and str(error).startswith((f"{path} ", f"checkpoint {path} ")):
            raise
        reason = error.__cause__ or error
        if _may_be_whole(reason):
            raise ReadFailed(
                f"checkpoint {path} cannot be read by this process: {cause(reason)}. It may be whole and "
                "stays where it is: mend that and run the same command again, or move that folder away to go "
                "on from an earlier step"
            ) from error
        first_line = (str(reason).splitlines() or [""])[0]
        raise DamagedCheckpoint(
            f"checkpoint {path} cannot be read, it is incomplete or damaged: move that folder away to go on "
            f"from an earlier step ({type(error).__name__}: {first_line[:300]})"
        ) from error


@contextlib.contextmanager
def damage_for_all(path: epath.Path) -> Iterator[None]:
    """Around work of all processes on a checkpoint: if one finds damage, all raise, once each is done.

    No process may wait for the others within it: one of them may have left it.
    """
    error = None
    try:
        yield
    except DamagedCheckpoint as found:
        error = found
    if processes.gather(np.array([error is not None]), jax.process_count()).any():
        raise error or DamagedCheckpoint(f"checkpoint {path} is damaged: another process found it")


def quiet_orbax() -> None:
    """Removes Orbax's dozens of informational lines a save from the log."""
    for logger, rule in (
        (logging.get_absl_logger(), _not_orbax_chatter),
        (standard_logging.getLogger("asyncio"), _not_left_by_orbax),
    ):
        if rule not in logger.filters:
            logger.addFilter(rule)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
    """Hides errors of tensorstore's threads after the first: their event loop is closed by then."""

    def __init__(self, otherwise: Callable[[Any], None]):
        self._otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._otherwise(unraisable)


def _not_left_by_orbax(record: Any) -> bool:
    # If several leaves fail, one error is raised; asyncio reports the others when they are freed.
    return not any(name in record.getMessage() for name in ("orbax", "tensorstore"))


def _not_orbax_chatter(record: Any) -> bool:
    # Errors are raised as well, so the tracebacks that each thread of Orbax logs are redundant.
    chatty = record.levelno <= 20 or record.exc_info
    return not chatty or f"{os.sep}orbax{os.sep}" not in record.pathname

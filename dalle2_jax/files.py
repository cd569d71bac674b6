"""Paths as people write them, and files that others find whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator

from etils import epath


def expand(path: str | os.PathLike) -> str:
    """A path as the system takes it: ~ and ~USER at its beginning become that home folder.

    No shell does this in `--workdir=~/run`, nor anything in a config. Addresses (gs://, hf://) and '' stay as
    they are, and what is expanded already. It is called where a flag, a setting or an argument of the
    library becomes a path, and nowhere behind that.
    """
    return os.path.expanduser(os.fspath(path))


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[epath.Path]:
    """Where to write what becomes `path` at the end of the `with`; after an error there is nothing of it.

    The place, beside `path`, is one writer's alone: processes on different machines, which may have the same
    number, can write the same file, and the last one's stays.
    """
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise

"""Files that others find whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator

from etils import epath


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

"""The nearest valid name, for error messages. Standard library only, so that every floor may import it."""

import difflib
from collections.abc import Callable, Iterable


def nearest(name: object, choices: Iterable[str], most: int = 1, show: Callable[[str], str] = repr) -> str:
    """Up to `most` of the choices that resemble `name`, such as "'a' or 'b'"; '' if none does."""
    return " or ".join(map(show, difflib.get_close_matches(str(name), list(choices), n=most)))

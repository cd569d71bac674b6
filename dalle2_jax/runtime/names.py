"""The name that was meant, for messages. The standard library alone, so that every floor may import it."""

import difflib
from collections.abc import Callable, Iterable


def nearest(name: object, known: Iterable[str], most: int = 1, show: Callable[[str], str] = repr) -> str:
    """Those of `known` that are near `name`, such as "'a' or 'b'", at most `most`; '' where none is."""
    return " or ".join(map(show, difflib.get_close_matches(str(name), list(known), n=most)))

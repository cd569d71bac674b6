"""`config.trainable`: which parameters of a stage are trained; the others rest, outside of the train state.

Patterns are regular expressions, searched in a parameter's path 'a/b/kernel'. No pattern: all are trained.
Statistics (the leaves of 'stats') always belong to the train state, because the stage updates them. The
parameters that rest are written once, to WORKDIR/base, and identified by their sha256, which every checkpoint
records.
"""

import os
import re
from collections.abc import Sequence

from etils import epath

from dalle2_jax.runtime import modeldir
from dalle2_jax.runtime.modeldir import flatten, unflatten

BASE = "base"  # the folder in a workdir, and the name among the frozen parameters
_STATISTIC = r"(^|/)stats/"


def split(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """(the trained leaves, the resting ones) of nested dicts; all are trained where there is no pattern."""
    if not patterns:
        return params, {}
    flat = flatten(params)
    trained = {name for name in flat if any(re.search(p, name) for p in (*patterns, _STATISTIC))}
    parts = ({n: x for n, x in flat.items() if (n in trained) == part} for part in (True, False))
    return tuple(map(unflatten, parts))


def merge(trained: dict, base: dict) -> dict:
    """All parameters of a stage: `split` undone."""
    return unflatten(flatten(trained) | flatten(base)) if base else trained


def like(params: dict, trained: dict) -> dict:
    """Those of all parameters that `trained` has."""
    flat = flatten(params)
    return params if len(flat) == len(names := flatten(trained)) else unflatten({n: flat[n] for n in names})


def check(params: dict, patterns: Sequence[str]) -> None:
    """Raises ValueError for a pattern that matches no parameter, or is no regular expression."""
    names = flatten(params)
    for pattern in patterns:
        try:
            matches = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"config.trainable: {pattern!r} is no regular expression: {error}") from None
        if not matches:
            raise ValueError(
                f"config.trainable: {pattern!r} matches no parameter; there are "
                f"{', '.join(sorted({name.rsplit('/', 2)[0] for name in names})[:20])}, ..."
            )


def save_base(workdir: str | os.PathLike, base: dict) -> None:
    """Writes the parameters that rest, as float32."""
    modeldir.save_stage(epath.Path(workdir) / BASE, {}, base, "float32")


def load_base(workdir: str | os.PathLike, sha256: str) -> dict:
    """The parameters that rest; ValueError unless they have this sha256."""
    _, base = modeldir.load_stage(epath.Path(workdir) / BASE)
    found = modeldir.sha256(base)
    if found != sha256:
        raise ValueError(
            f"{epath.Path(workdir) / BASE} has changed: the sha256 of its parameters was {sha256[:12]} when "
            f"training began, is {found[:12]} now. Restore it"
        )
    return base

"""How often drawn scenes are right: the checker's verdicts counted by kind of caption, with intervals.

A share p = k / n of independent pictures gets Wilson's interval (Wilson 1927): the shares q for which p lies
within z standard deviations sqrt(q (1 - q) / n) of q,

    (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),      z = 1.96 for 95 %
"""

import math
from collections.abc import Sequence

import numpy as np

from dalle2_jax.data import scenes

# Of a verdict of `evals.scenes.check`. `named` is colour, shape and relation at once; `correct` asks for all
# that the caption says, and that nothing else is in the picture.
JUDGED = ("colour", "shape", "relation", "count", "background", "correct")
ASPECTS = ("colour", "shape", "relation", "named", "count", "background", "correct")


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share of `right` in `count`; (0, 1) where nothing was counted."""
    if not 0 <= right <= count:
        raise ValueError(f"{right} of {count} cannot be right")
    if count == 0:
        return 0.0, 1.0
    p, spread = right / count, z * z / count
    middle = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def draw_captions(config: scenes.SceneConfig, n: int, seed: int) -> tuple[list[str], list[str]]:
    """(captions, kinds) of `n` captions in all, split evenly over the kinds that `config` has."""
    captions, labels = [], []
    for kind, count in _split(config, n):
        captions += scenes.evaluation_captions(config, kind, count, seed)
        labels += [kind] * count
    return captions, labels


def draw_scenes(config: scenes.SceneConfig, n: int, copies: int, seed: int) -> list[scenes.Scene]:
    """`copies` scenes of each of the captions of `draw_captions`, one after another."""
    found = []
    for kind, count in _split(config, n):
        found += scenes.evaluation_scenes(config, kind, count, copies, seed)
    return found


def _split(config: scenes.SceneConfig, n: int) -> list[tuple[str, int]]:
    """How many of `n` captions are of each kind that `config` has."""
    kinds = [kind for kind in scenes.KINDS if kind.startswith("single") or config.max_objects > 1]
    return [(kind, n // len(kinds) + (i < n % len(kinds))) for i, kind in enumerate(kinds)]


def verdict_aspects(verdict) -> dict[str, bool | None]:
    """aspect -> whether it is right, None where the caption does not say."""
    judged = {aspect: getattr(verdict, aspect) for aspect in JUDGED}
    named = all(judged[aspect] is not False for aspect in ("colour", "shape", "relation"))
    return judged | {"named": named}


def score(verdicts: Sequence, kinds: Sequence[str]) -> dict:
    """kind -> {'n', each of ASPECTS, 'interval': {aspect -> [low, high]}}.

    Args:
      verdicts: of `evals.scenes.check`.
      kinds: of the captions, in the order of `verdicts`.

    Returns:
      Shares in 0 .. 1, None for an aspect that no caption of the kind names.
    """
    result = {}
    for kind in dict.fromkeys(kinds):
        chosen = [
            verdict_aspects(verdict) for verdict, label in zip(verdicts, kinds, strict=True) if label == kind
        ]
        entry, intervals = {"n": len(chosen)}, {}
        for aspect in ASPECTS:
            judged = [bool(value) for value in (verdict[aspect] for verdict in chosen) if value is not None]
            entry[aspect] = float(np.mean(judged)) if judged else None
            if judged:
                intervals[aspect] = [round(bound, 4) for bound in wilson(sum(judged), len(judged))]
        result[kind] = entry | {"interval": intervals}
    return result


def table(scores: dict) -> str:
    """The scores of `score` as lines of text, the interval of `named` behind."""
    lines = [f"{'':24}{'n':>6}" + "".join(f"{aspect:>11}" for aspect in ASPECTS) + "   95 % of named"]
    for kind, entry in scores.items():
        shares = "".join(f"{'-' if entry[a] is None else format(entry[a], '.3f'):>11}" for a in ASPECTS)
        low, high = entry["interval"]["named"]
        lines.append(f"{kind:24}{entry['n']:>6}{shares}   {low:.3f} .. {high:.3f}")
    return "\n".join(lines)

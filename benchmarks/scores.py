"""Scores with intervals and gates, for `benchmarks.systems`; and their table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle2_jax.evaluate.metric import wilson

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Score:
    """One measurement.

    Attributes:
      name: what is measured. value: of it, with the 95 % interval (low, high). n: pictures.
      gate: the least value; None: reported alone. paired: the interval's lower end must lie above the gate.
      n: number of drawings.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    gate: float | None = None
    paired: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the gate holds; None without one."""
        if self.gate is None:
            return None
        return bool(self.low > self.gate if self.paired else self.value >= self.gate)


def share(name: str, right: np.ndarray, gate: float | None = None) -> Score:
    """A share of right pictures, bool [N], with Wilson's interval."""
    low, high = wilson(int(right.sum()), len(right))
    return Score(name, float(right.mean()), low, high, len(right), gate)


def hits(value: float, n: int) -> np.ndarray:
    """bool [n] with a share `value` of True, for `share` of a known share."""
    return np.arange(n) < round(value * n)


def difference(name: str, a: np.ndarray, b: np.ndarray, gate: float | None = 0.0) -> Score:
    """Mean of a - b [N] of the same captions and noise, with the interval of a paired bootstrap.

    N differences are drawn with replacement RESAMPLES times; the interval is the 2.5 % and 97.5 % quantiles
    of their means (Efron & Tibshirani 1993, section 13.3).
    """
    if a.shape != b.shape:
        raise ValueError(f"{name}: {a.shape} and {b.shape} are not pairs")
    each = a.astype(np.float64) - b.astype(np.float64)
    rows = np.random.default_rng(0).integers(len(each), size=(RESAMPLES, len(each)))
    low, high = np.quantile(each[rows].mean(axis=1), (0.025, 0.975))
    return Score(name, float(each.mean()), float(low), float(high), len(each), gate, paired=True)


def mean(name: str, values: np.ndarray, gate: float | None = None) -> Score:
    """A mean [N] with 1.96 standard errors on both sides."""
    value = float(np.mean(values, dtype=np.float64))
    reach = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Score(name, value, value - reach, value + reach, len(values), gate)


def lines(scores: Sequence[Score]) -> str:
    """A line a score."""
    return "\n".join(f"  {_MARKS[score.holds]} {text(dataclasses.asdict(score))}" for score in scores)


_MARKS = {True: "holds", False: "FAILS", None: "     "}


def text(score: dict) -> str:
    """A score as JSON values in words."""
    gate = ""
    if score["gate"] is not None:
        gate = f"; gate: {'interval above' if score['paired'] else 'at least'} {score['gate']:g}"
    interval = f"{score['low']:.3f} to {score['high']:.3f}"
    return f"{score['name']}: {score['value']:.3f} ({interval}; n={score['n']}{gate})"


def table(out: Path, names: Sequence[str]) -> str:
    """A row of each system that has a result below `out`, as Markdown."""
    rows = [
        "| system | stages: steps x batch | parameters | minutes (CPU minutes) | a picture | scores |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        path = out / name / "result.json"
        if path.exists():
            rows.append(_row(json.loads(path.read_text())))
    return "\n".join(rows) + "\n"


def _row(result: dict) -> str:
    trainings = result["trainings"]
    stages = "<br>".join(
        f"{one['name']}{' (comparison)' if one['arm'] else ''} {one['steps']:,} x {one['batch']}"
        for one in trainings
    )
    parameters = f"{result['parameters'] / 1e6:.2f}M"
    minutes = "<br>".join(f"{one['minutes']:.1f} ({one['cpu_minutes']:.1f})" for one in trainings)
    picture = result["picture"]
    cost = f"{picture['seconds']:.2f} s, {picture['flops'] / 1e9:.3g} GFLOP" if picture else ""
    found = "<br>".join(
        f"{'**fails:** ' if score['holds'] is False else ''}{text(score)}" for score in result["scores"]
    )
    return f"| {result['title']} | {stages} | {parameters} | {minutes} | {cost} | {found} |"

"""Two sides of the same work, in turn: that they do the same, how long they take, and what they hold.

`benchmarks.compare` has the cases.
"""

import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle2_jax.benchmark import Spread

PARAMETERS, FLOPS, MAX_SPREAD = 0.02, 0.05, 0.25
# Let threads that wait busily for more work fall asleep, before the other side's turn.
PAUSE = 0.1


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a case.

    Attributes:
      run: does the work once and returns when it is done; or returns seconds, where it measures itself.
      parameters, flops: of the networks, of one run; 0 where there are none.
      batch, steps, precision, guidance: of the work.
      memory: bytes that a run holds, for one in another process; None: as `added_memory` measures it.
    """

    run: Callable[[], float | None]
    batch: int
    parameters: int = 0
    flops: int = 0
    steps: int = 1
    precision: str = "float32"
    guidance: float = 1.0
    memory: Callable[[], int | None] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sides of the same work; `unit` is what a run makes `ours.batch` of."""

    name: str
    ours: Side
    peer: Side
    unit: str = "examples"


def check_equal(case: Case) -> None:
    """Raise ValueError, naming what differs, unless both sides do the same work."""
    ours, peer = case.ours, case.peer
    for name, allowed in (("parameters", PARAMETERS), ("flops", FLOPS)):
        a, b = getattr(ours, name), getattr(peer, name)
        if abs(a - b) > allowed * max(a, b):
            raise ValueError(f"{case.name}: {name} differ by more than {allowed:.0%}: ours {a}, peer {b}")
    for name in ("batch", "steps", "precision", "guidance"):
        a, b = getattr(ours, name), getattr(peer, name)
        if a != b:
            raise ValueError(f"{case.name}: {name} differ: ours {a}, peer {b}")


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of a run of both sides, and peer / ours; no ratio where the spread is above what is allowed.

    ours_memory, peer_memory: bytes that a run took at most beside what was there before, see `added_memory`.
    """

    name: str
    unit: str
    batch: int
    parameters: int
    flops: int
    ours: Spread
    peer: Spread
    spread: float
    ratio: float | None
    rounds: int
    ours_memory: int | None = None
    peer_memory: int | None = None

    def line(self) -> str:
        """The row of a Markdown table."""
        shown = "refused" if self.ratio is None else f"**{self.ratio:.2f}**"
        cells = [self.name, f"{self.batch} {self.unit}", f"{self.parameters / 1e6:.2f}M"]
        cells += [f"{self.flops / 1e9:.3g}", f"{self.ours.median:.3g}", f"{self.peer.median:.3g}", shown]
        cells += [f"{self.spread:.0%}", str(self.rounds)]
        held = (self.ours_memory, self.peer_memory)
        return "| " + " | ".join(cells + ["-" if m is None else f"{m / 2**20:.0f}" for m in held]) + " |"


HEADER = (
    "| case | a run | parameters | GFLOP | ours, s | peer, s | peer / ours | spread | rounds "
    "| ours, MiB | peer, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def judged(case: Case, ours: Sequence[float], peer: Sequence[float], max_spread: float) -> Result:
    """The result of a case from the seconds of its rounds."""
    of_ours, of_peer = Spread.of(ours), Spread.of(peer)
    spread = max(of_ours.relative, of_peer.relative)
    ratio = of_peer.median / of_ours.median if spread <= max_spread else None
    side = case.ours
    return Result(
        case.name,
        case.unit,
        side.batch,
        side.parameters,
        side.flops,
        of_ours,
        of_peer,
        spread,
        ratio,
        len(ours),
    )


def measure(case: Case, rounds: int, max_spread: float = MAX_SPREAD) -> Result:
    """Run both sides in turn, either first in every other round; one round before does not count."""
    check_equal(case)
    seconds = {"ours": [], "peer": []}
    for i in range(rounds + 1):
        for name in ("ours", "peer") if i % 2 else ("peer", "ours"):
            time.sleep(PAUSE)
            began = time.perf_counter()
            took = getattr(case, name).run()
            took = time.perf_counter() - began if took is None else took
            if i:
                seconds[name].append(took)
    return judged(case, seconds["ours"], seconds["peer"], max_spread)


def added_memory(run: Callable[[], object]) -> int | None:
    """Bytes that this process held at most during `run()`, above what it held before; None but on Linux.

    For a process that has not run it before: what a run leaves behind is not seen again.
    """
    status = Path("/proc/self/status")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what building and compiling left behind is not there before
        before = _kib(status.read_text(), "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run()
        return 1024 * (_kib(status.read_text(), "VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _kib(status: str, name: str) -> int:
    return int(status.split(f"{name}:")[1].split()[0])

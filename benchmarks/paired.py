"""Two sides of the same work, compared and timed in turn, with their memory; for `benchmarks.compare`."""

import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle2_jax.benchmark import Spread

PARAMETERS, FLOPS, MAX_SPREAD = 0.02, 0.05, 0.25
PAUSE = 0.1  # lets busily waiting threads fall asleep before the other side's turn


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a case.

    Attributes:
      run: does the work once; may return the seconds that it has measured.
      parameters, flops: of the networks, of one run; 0: none.
      batch, steps, precision, guidance: of the work.
      memory: bytes of a run in another process; None: by `added_memory`.
      autocast: of a peer, the same work with bfloat16 products; None: it is not timed.
    """

    run: Callable[[], float | None]
    batch: int
    parameters: int = 0
    flops: int = 0
    steps: int = 1
    precision: str = "float32"
    guidance: float = 1.0
    memory: Callable[[], int | None] | None = None
    autocast: Callable[[], float | None] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sides of the same work; a run makes `ours.batch` of `unit`."""

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
    """Seconds of a run of both sides, and the ratio peer / ours; None: the spread is too large.

    ours_memory, peer_memory: bytes, see `added_memory`. autocast: seconds of the peer in bfloat16, if timed.
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
    autocast: Spread | None = None

    def line(self) -> str:
        """The row of a Markdown table."""
        shown = "refused" if self.ratio is None else f"**{self.ratio:.2f}**"
        cells = [self.name, f"{self.batch} {self.unit}", f"{self.parameters / 1e6:.2f}M"]
        cells += [f"{self.flops / 1e9:.3g}", f"{self.ours.median:.3g}", f"{self.peer.median:.3g}", shown]
        cells += [f"{self.autocast.median / self.ours.median:.2f}" if self.autocast else "-"]
        cells += [f"{self.spread:.0%}", str(self.rounds)]
        memory = (self.ours_memory, self.peer_memory)
        return "| " + " | ".join(cells + ["-" if m is None else f"{m / 2**20:.0f}" for m in memory]) + " |"


HEADER = (
    "| case | a run | parameters | GFLOP | ours, s | peer, s | peer / ours | in bfloat16 | spread | rounds "
    "| ours, MiB | peer, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def judged(case: Case, ours: Sequence[float], peer: Sequence[float], max_spread: float) -> Result:
    """The result of a case from the seconds of its rounds."""
    side, one, other = case.ours, Spread.of(ours), Spread.of(peer)
    spread = max(one.relative, other.relative)
    ratio = other.median / one.median if spread <= max_spread else None
    work = case.name, case.unit, side.batch, side.parameters, side.flops
    return Result(*work, one, other, spread, ratio, len(ours))


def measure(case: Case, rounds: int, max_spread: float = MAX_SPREAD) -> Result:
    """Run both sides in turn, with alternating order, after one round that does not count."""
    check_equal(case)
    runs = {"ours": case.ours.run, "peer": case.peer.run}
    if case.peer.autocast:
        runs["autocast"] = case.peer.autocast
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in runs if i % 2 else reversed(runs):
            time.sleep(PAUSE)
            began = time.perf_counter()
            took = runs[name]()
            took = time.perf_counter() - began if took is None else took
            if i:
                seconds[name].append(took)
    result = judged(case, seconds["ours"], seconds["peer"], max_spread)
    autocast = Spread.of(seconds["autocast"]) if case.peer.autocast else None
    return dataclasses.replace(result, autocast=autocast)


def added_memory(run: Callable[[], object]) -> int | None:
    """The peak memory of this process during `run()` above the memory before, in bytes; None: not on Linux.

    For the first run in a process.
    """
    status = Path("/proc/self/status")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # frees the memory of building and compiling
        before = _kib(status.read_text(), "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        run()
        return 1024 * (_kib(status.read_text(), "VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _kib(status: str, name: str) -> int:
    return int(status.split(f"{name}:")[1].split()[0])

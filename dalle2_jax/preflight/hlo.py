"""Bytes over the links and cycles of a compiled program, from its text in HLO.

An operation in a loop counts as often as the loop runs, by the compiler's trip count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = dict(pred=1, s4=0.5, u4=0.5, bf16=2, f16=2)
_MOST_CYCLES = 1 << 48  # of one operation: two days
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Operations of one kind in a step: how many, and bytes that each chip sends for them."""

    count: int
    bytes: float


def collectives(program: str) -> dict[str, Collective]:
    """The collectives of a program by kind, largest first.

    Bytes that a chip sends for an operation with result R in a group of g: all-gather R (g - 1) / g,
    reduce-scatter R (g - 1), all-reduce 2 R (g - 1) / g (rings), all-to-all R (g - 1) / g, permute R. An
    all-reduce whose fusion keeps a part of the result is a reduce-scatter.
    """
    times = _trip_counts(program)
    counts: collections.Counter[str] = collections.Counter()
    sent: collections.defaultdict[str, float] = collections.defaultdict(float)
    pattern = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    for computation, line in _lines(program):
        found = pattern.match(line)
        if not found:
            continue
        shape, kind, started = found.groups()
        group = _group_size(line)
        if group == 1 and kind != "collective-permute":
            continue
        # An asynchronous form returns (operands, results, ...), where several of either are a tuple; but
        # all-reduce-start may return its results alone.
        if started and (kind != "all-reduce" or shape.startswith("((")):
            shape = _elements(shape)[1]
        size = sum(_sizes(shape))
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind, size = "reduce-scatter", size / group
        factor = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1, "collective-permute": 1}
        repeated = times.get(computation, 1)
        counts[kind] += repeated
        sent[kind] += repeated * size * factor.get(kind, (group - 1) / group)
    kinds = sorted(sent, key=lambda kind: -sent[kind])
    return {kind: Collective(counts[kind], sent[kind]) for kind in kinds}


def scheduled_cycles(program: str) -> tuple[int, int]:
    """(sum of the compiler's estimates of cycles for all operations, number of operations without one).

    Without an estimate: a number that cannot be one, such as 2^64 - 1. Operations over the links never have
    one, and do not count. (0, 0) for a compiler without estimates.
    """
    times, total, unknown = _trip_counts(program), 0, 0
    for computation, line in _lines(program):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        if estimate and int(estimate[1]) >= _MOST_CYCLES:
            unknown += times.get(computation, 1)
        elif estimate:
            total += int(estimate[1]) * times.get(computation, 1)
    return total, unknown


def _lines(program: str) -> Iterator[tuple[str, str]]:
    """(name of the computation, line) of the operations of a program."""
    computation = ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
        else:
            yield computation, line


def _trip_counts(program: str) -> dict[str, int]:
    """Name of a computation -> how often it runs, of those in loops of known length and of their callees."""
    calls: collections.defaultdict[str, list[tuple]] = collections.defaultdict(list)
    bounds: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    for computation, line in _lines(program):
        bound = re.search(r" = [su]32\[\]\S* constant\((\d+)\)", line)
        if bound:
            bounds[computation].append(int(bound[1]))
        called = re.findall(r"(?:body|condition|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line)
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        loop = int(count[1]) if count else None, condition[1] if condition else None
        calls[computation] += [(name, *loop) for name in called]
    times: dict[str, int] = {}

    def visit(name: str, factor: int):
        for inner, length, condition in calls.get(name, ()):
            if condition is None:
                length = 1
            elif length is None:  # a counter from 0 is compared with the only constant of the condition
                length = bounds[condition][0] if len(bounds[condition]) == 1 else 1
            if factor * length > times.get(inner, 0):
                times[inner] = factor * length
                visit(inner, factor * length)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", program, re.M)
    visit(entry[1] if entry else "", 1)
    return times


def _elements(shape: str) -> list[str]:
    """The shapes in a tuple, '(f32[2,3], (u8[], s8[]))' -> ['f32[2,3]', ' (u8[], s8[])']."""
    found, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return found


def _sizes(shape: str) -> list[float]:
    """Bytes of the arrays in an HLO shape, '(bf16[2,3]{1,0}, f32[])'."""
    found = []
    for kind, axes in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        width = _BYTES.get(kind) or int(re.findall(r"\d+", kind)[0]) / 8
        found.append(width * math.prod(int(n) for n in axes.split(",") if n))
    return found or [0.0]


def _group_size(line: str) -> int:
    """Chips in one group of the collective of this line."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed else 1

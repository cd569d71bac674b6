"""What preflight reports of a program: memory, arithmetic, time, links."""

import dataclasses
import json
import re

from dalle2_jax.preflight import chips, hlo
from dalle2_jax.preflight.chips import GIB
from dalle2_jax.runtime import metrics


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled program, or one that the compiler refused, is expected to need.

    Attributes:
      program, chips, device, mesh, batch_size: of what, on what.
      parameters: numbers of the stage.
      arguments, outputs, temporaries, aliased, code: bytes a chip; aliased ones are both argument and output.
        Where the compiler refused, temporaries are all that it says to need besides arguments, None if it
        does not say.
      memory: bytes a chip has, None where that is not known.
      model_flops: of the whole step over all chips, as `flops` counts.
      compiler_flops: a chip's, with recomputations, as the cost analysis counts.
      seconds: by `scheduled_cycles`; None: the compiler gives none. untold: operations that are not in it,
      as the compiler has no number for them. optimal_seconds: the cost analysis's.
      peak: FLOP/s of a chip in bfloat16. collectives: by kind. link_seconds: they need on the links.
      compile_seconds: how long compiling took here.
      refusal: what the compiler said where it refused the program, as it needs more memory than a chip has.
      advice: what to change, a sentence each.
    """

    program: str
    chips: int
    device: str
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    arguments: int
    memory: float | None
    model_flops: int
    peak: float | None
    outputs: int = 0
    temporaries: int | None = None
    aliased: int = 0
    code: int = 0
    compiler_flops: float = 0.0
    seconds: float | None = None
    untold: int = 0
    optimal_seconds: float | None = None
    collectives: dict[str, hlo.Collective] = dataclasses.field(default_factory=dict)
    link_seconds: float | None = None
    compile_seconds: float = 0.0
    refusal: str = ""
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        """Bytes a chip needs, None where the compiler refused and did not say."""
        if self.temporaries is None:
            return None
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool | None:
        """Whether a chip has that memory; None where it is not known how much one has."""
        if self.refusal:
            return False
        return None if self.memory is None else self.total <= self.memory

    def utilisation(self, link_seconds: float = 0.0) -> float | None:
        """Share of the chips' peak that the model's FLOPs are, with so many seconds added to the estimate."""
        if not self.seconds or not self.peak:
            return None
        return self.model_flops / self.chips / self.peak / (self.seconds + link_seconds)

    def lines(self) -> list[str]:
        """The report as lines of text."""

        def share(value):
            return "unknown" if value is None else f"{value:.1%}"

        def gib(size):
            return "?" if size is None else f"{size / GIB:.2f}"

        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        ended = (
            f"{'refused' if self.refusal else 'compiled'} in {metrics.show_duration(self.compile_seconds)}"
        )
        fits = ""
        if self.memory is not None:
            fits = f" of {self.memory / GIB:.4g}: {'fits' if self.fits else 'DOES NOT FIT'}"
        said = [
            f"{self.program}: {self.parameters / 1e9:.3f}B parameters, batch {self.batch_size} on "
            f"{self.chips} x {self.device} ({mesh}), {ended}",
            f"  memory a chip    {gib(self.total):>8} GiB{fits} (arguments {gib(self.arguments)}, of which "
            f"{gib(self.aliased)} are reused for outputs, temporaries {gib(self.temporaries)})",
            f"  arithmetic       {self.model_flops / self.chips / 1e12:8.2f} TFLOP a chip and step, "
            "recomputations left out",
        ]
        for kind, found in self.collectives.items():
            said.append(f"  {kind:18}{found.count:7} x, {found.bytes / GIB:.3f} GiB a chip and step")
        if self.link_seconds is not None:
            said.append(f"  links            {self.link_seconds * 1e3:8.1f} ms at full bandwidth")
        if self.seconds:
            rate = self.batch_size / self.seconds
            said.append(
                f"  estimate         {self.seconds * 1e3:8.1f} ms, {rate:{'.0f' if rate >= 10 else '.2g'}} "
                f"examples/s; utilisation {share(self.utilisation())}, if nothing of the links is hidden "
                f"{share(self.utilisation(self.link_seconds or 0.0))}"
            )
        if self.untold:
            said.append(f"  left out         {self.untold:6} operations, of which the compiler knows no time")
        if self.optimal_seconds:
            said.append(f"  cost analysis    {self.optimal_seconds * 1e3:8.1f} ms")
        if self.refusal:
            said.append(f"  the compiler     {self.refusal}")
        return said + [f"  ! {sentence}" for sentence in self.advice]

    def to_json(self) -> str:
        """All of it."""
        derived = dict(total=self.total, fits=self.fits, utilisation=self.utilisation())
        derived["utilisation_with_links"] = self.utilisation(self.link_seconds or 0.0)
        return json.dumps(dataclasses.asdict(self) | derived, indent=2) + "\n"


def compiled_report(report: Report, compiled, text: str, chip: chips.Chip | None) -> Report:
    """`report` with the numbers of a compiled program and of its text."""
    needs, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    moved, (cycles, untold) = hlo.collectives(text), hlo.scheduled_cycles(text)
    optimal = costs.get("optimal_seconds", 0.0)
    return dataclasses.replace(
        report,
        arguments=needs.argument_size_in_bytes,
        outputs=needs.output_size_in_bytes,
        temporaries=needs.temp_size_in_bytes,
        aliased=needs.alias_size_in_bytes,
        code=needs.generated_code_size_in_bytes,
        compiler_flops=costs.get("flops", 0.0),
        seconds=cycles / chip.clock if chip and cycles else None,
        untold=untold,
        optimal_seconds=optimal if chip and optimal > 0 else None,  # below 0: the compiler does not know
        collectives=moved,
        link_seconds=chip and sum(one.bytes for one in moved.values()) / chip.link_bandwidth,
    )


def refused_report(report: Report, message: str) -> Report:
    """`report` with the numbers of a message of the compiler: '... (572.00G) exceeds available HBM
    (15.75G)' or 'Used 24.13G of 15.75G hbm'."""
    size = r"\(?([\d.]+)([KMGT]?)\)?"
    stated = re.search(rf"{size} exceeds available \w+ {size}|[Uu]sed {size} of {size}", message)
    refusal = re.sub(r"^.*?RESOURCE_EXHAUSTED:\s*", "", message.strip(), flags=re.S).splitlines()
    report = dataclasses.replace(report, refusal=refusal[0][:300] if refusal else "RESOURCE_EXHAUSTED")
    if not stated:
        return report
    used, unit, available, other = [part for part in stated.groups() if part is not None]
    used, available = (
        int(float(n) * 1024 ** " KMGT".index(u or " ")) for n, u in ((used, unit), (available, other))
    )
    return dataclasses.replace(report, memory=available, temporaries=max(0, used - report.arguments))

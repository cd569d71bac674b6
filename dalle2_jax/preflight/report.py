"""Preflight's report of a program: memory, arithmetic, time, links."""

import dataclasses
import json
import re

from dalle2_jax.preflight import chips, hlo
from dalle2_jax.preflight.chips import GIB
from dalle2_jax.runtime import metrics


@dataclasses.dataclass(frozen=True)
class Report:
    """The needs of a program that was compiled, or that the compiler refused.

    Attributes:
      program, chips, device, mesh, batch_size: the program, and its devices.
      parameters: of the stage, a number.
      arguments, outputs, temporaries, aliased, code: bytes a chip; aliased ones are both argument and output.
        Of a refused program temporaries are all bytes besides arguments; None: the compiler did not say.
      memory: bytes of a chip; None: unknown.
      model_flops: of the step over all chips, by `flops`.
      compiler_flops: of a chip, with recomputations, by the cost analysis.
      seconds: by `scheduled_cycles`; None: no estimate. without_estimate: operations that it leaves out.
      optimal_seconds: by the cost analysis.
      peak: FLOP/s of a chip in bfloat16. collectives: by kind. link_seconds: of the collectives.
      compile_seconds: of this compilation.
      refusal: the compiler's message for a program that needs more memory than a chip has.
      advice: sentences.
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
    without_estimate: int = 0
    optimal_seconds: float | None = None
    collectives: dict[str, hlo.Collective] = dataclasses.field(default_factory=dict)
    link_seconds: float | None = None
    compile_seconds: float = 0.0
    refusal: str = ""
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        """Bytes a chip needs; None: the compiler refused and did not say."""
        if self.temporaries is None:
            return None
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool | None:
        """Whether a chip has that memory; None: its memory is unknown."""
        if self.refusal:
            return False
        return None if self.memory is None or self.total is None else self.total <= self.memory

    def utilisation(self, link_seconds: float = 0.0) -> float | None:
        """The model's FLOP/s as a share of the chips' peak, with link_seconds added to the estimate."""
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
        ended, duration = "refused" if self.refusal else "compiled", self.compile_seconds
        fits = ""
        if self.memory is not None:
            fits = f" of {self.memory / GIB:.4g}: {'fits' if self.fits else 'DOES NOT FIT'}"
        lines = [
            f"{self.program}: {self.parameters / 1e9:.3f}B parameters, batch {self.batch_size} on "
            f"{self.chips} x {self.device} ({mesh}), {ended} in {metrics.show_duration(duration)}",
            f"  memory a chip    {gib(self.total):>8} GiB{fits} (arguments {gib(self.arguments)}, "
            f"{gib(self.aliased)} of them reused for outputs, temporaries {gib(self.temporaries)})",
            f"  arithmetic       {self.model_flops / self.chips / 1e12:8.2f} TFLOP a chip and step, "
            "without recomputations",
        ]
        for kind, found in self.collectives.items():
            lines.append(f"  {kind:18}{found.count:7} x, {found.bytes / GIB:.3f} GiB a chip and step")
        if self.link_seconds is not None:
            lines.append(f"  links            {self.link_seconds * 1e3:8.1f} ms at full bandwidth")
        if self.seconds:
            rate = self.batch_size / self.seconds
            lines.append(
                f"  estimate         {self.seconds * 1e3:8.1f} ms, {rate:{'.0f' if rate >= 10 else '.2g'}} "
                f"examples/s; utilisation {share(self.utilisation())}, with links that hide nothing "
                f"{share(self.utilisation(self.link_seconds or 0.0))}"
            )
        if self.without_estimate:
            lines.append(f"  left out         {self.without_estimate:6} operations without an estimate")
        if self.optimal_seconds:
            lines.append(f"  cost analysis    {self.optimal_seconds * 1e3:8.1f} ms")
        if self.refusal:
            lines.append(f"  the compiler     {self.refusal}")
        return lines + [f"  ! {sentence}" for sentence in self.advice]

    def to_json(self) -> str:
        """The report as JSON."""
        derived = dict(total=self.total, fits=self.fits, utilisation=self.utilisation())
        derived["utilisation_with_links"] = self.utilisation(self.link_seconds or 0.0)
        return json.dumps(dataclasses.asdict(self) | derived, indent=2) + "\n"


def compiled_report(report: Report, compiled, text: str, chip: chips.Chip | None) -> Report:
    """`report` with the numbers of a compiled program and of its text."""
    needs, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    moved, (cycles, without_estimate) = hlo.collectives(text), hlo.scheduled_cycles(text)
    optimal = costs.get("optimal_seconds", 0.0)
    link_seconds = sum(one.bytes for one in moved.values()) / chip.link_bandwidth if chip else None
    return dataclasses.replace(
        report,
        arguments=needs.argument_size_in_bytes,
        outputs=needs.output_size_in_bytes,
        temporaries=needs.temp_size_in_bytes,
        aliased=needs.alias_size_in_bytes,
        code=needs.generated_code_size_in_bytes,
        compiler_flops=costs.get("flops", 0.0),
        seconds=cycles / chip.clock if chip and cycles else None,
        without_estimate=without_estimate,
        optimal_seconds=optimal if chip and optimal > 0 else None,  # below 0: unknown
        collectives=moved,
        link_seconds=link_seconds,
    )


def refused_report(report: Report, message: str) -> Report:
    """`report` with the numbers in a message of the compiler: '... (572.00G) exceeds available HBM
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

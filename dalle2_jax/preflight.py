"""python -m dalle2_jax.preflight --config=configs/X.py --topology=v5p:4x4x4 [--config.a.b=value ...]

Compiles the training step of a config for a TPU slice that is not there, and says whether it would fit and
how long a step would take: bytes a chip against the chip's memory, the compiler's estimate and the
utilisation that follows, what goes over the links. Nothing is allocated and no data is read. Needs libtpu
(pip install 'dalle2_jax[tpu]'), but no TPU. Without --topology it compiles for the devices of this machine.

  --clip=configs/clip.py  the frozen CLIP that fills embeddings into the batch, else they are precomputed
  --sample=8              the program that draws 8 pictures in the place of the training step
  --json=FILE             the report as JSON
  --hlo=FILE              the compiled program as text

The numbers are the compiler's, not measurements. The time is the sum of the cycles that it estimates for each
operation of the program, which leaves out what goes over the links: the report gives utilisation for the two
extremes, links that run wholly beside the computation and links that hold it up. The cost analysis
(`optimal_seconds`) is shown beside it: a bound by arithmetic and bytes, in which a loop counts once. A large
stage compiles for minutes (docs/scaling.md).
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import runpy
import sys
import time

import jax
from absl import app, flags
from etils import epath

from dalle2_jax import flops, metrics, models, partition, train
from dalle2_jax.commandline import define_config

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory: bytes. link_bandwidth: bytes/s that a chip sends over all of its links; as many come in.
    clock: Hz. axes: of the torus that slices are cut from."""

    memory: float
    link_bandwidth: float
    clock: float
    axes: int


# Google's pages on the versions of Cloud TPU; link bandwidths there are for both directions together. The
# clock is the bfloat16 peak (metrics.PEAK_FLOPS) over two FLOPs for each cell of the chip's matrix units: 8
# of 128 x 128 (v4, v5p), 4 of 128 x 128 (v5e), 4 of 256 x 256 (v6e).
CHIPS = {
    "v4": Chip(32 * GIB, 300e9, 1.05e9, axes=3),
    "v5e": Chip(16 * GIB, 200e9, 1.50e9, axes=2),
    "v5p": Chip(95 * GIB, 600e9, 1.75e9, axes=3),
    "v6e": Chip(32 * GIB, 400e9, 1.75e9, axes=2),
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = dict(pred=1, s4=0.5, u4=0.5, bf16=2, f16=2)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Operations of one kind in a step: how many, and bytes that each chip sends for them."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled program is expected to need.

    Attributes:
      program, chips, device, mesh, batch_size: of what, on what.
      parameters: numbers of the stage.
      arguments, outputs, temporaries, aliased, code: bytes a chip; aliased ones are both argument and output.
      memory: bytes a chip has, None where that is not known.
      model_flops: of the whole step over all chips, as `flops` counts.
      compiler_flops: a chip's, with recomputations, as the cost analysis counts.
      seconds: by `scheduled_cycles`; None: the compiler gives none. untold: operations that are not in it,
      as the compiler has no number for them. optimal_seconds: the cost analysis's.
      peak: FLOP/s of a chip in bfloat16. collectives: by kind. link_seconds: they need on the links.
      compile_seconds: how long compiling took here.
    """

    program: str
    chips: int
    device: str
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int
    memory: float | None
    model_flops: int
    compiler_flops: float
    seconds: float | None
    untold: int
    optimal_seconds: float | None
    peak: float | None
    collectives: dict[str, Collective]
    link_seconds: float | None
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes a chip needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def utilisation(self, link_seconds: float = 0.0) -> float | None:
        """Share of the chips' peak that the model's FLOPs are, with so many seconds added to the estimate."""
        if not self.seconds or not self.peak:
            return None
        return self.model_flops / self.chips / self.peak / (self.seconds + link_seconds)

    def advice(self) -> list[str]:
        """What to change, a sentence each; nothing where it fits and computes more than it waits."""
        said = []
        if self.memory is not None and self.total > self.memory:
            state, rest = self.arguments, self.temporaries
            if state > rest and self.mesh["fsdp"] * self.mesh["tensor"] < self.chips:
                said.append(
                    "the state takes most: split it further with --config.mesh.data=1 --config.mesh.fsdp=-1"
                )
            elif state > rest:
                said.append("the state takes most, and is split over every chip: take a larger topology")
            else:
                each = self.batch_size // (self.mesh["data"] * self.mesh["fsdp"])
                said.append(
                    f"activations take most, of {each} examples a chip: --config.model.remat=all, or "
                    "--config.grad_accum=2, or a larger topology"
                )
        if self.link_seconds and self.seconds and self.link_seconds > self.seconds:
            said.append(
                "the links take longer than the arithmetic: more examples a chip (a smaller topology), or "
                "less sharding (--config.mesh.data above 1)"
            )
        return said

    def lines(self) -> list[str]:
        """The report as lines of text."""

        def share(value):
            return "unknown" if value is None else f"{value:.1%}"

        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        took = metrics.show_duration(self.compile_seconds)
        held = dict(a=self.arguments, b=self.aliased, c=self.temporaries)
        held = {name: f"{size / GIB:.2f}" for name, size in held.items()}
        fits = ""
        if self.memory is not None:
            fits = f" of {self.memory / GIB:.0f}: {'fits' if self.total <= self.memory else 'DOES NOT FIT'}"
        said = [
            f"{self.program}: {self.parameters / 1e9:.3f}B parameters, batch {self.batch_size} on "
            f"{self.chips} x {self.device} ({mesh}), compiled in {took}",
            f"  memory a chip    {self.total / GIB:8.2f} GiB{fits} (arguments {held['a']}, "
            f"of which {held['b']} are reused for outputs, temporaries {held['c']})",
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
                f"  estimate         {self.seconds * 1e3:8.1f} ms, {rate:.0f} examples/s; utilisation "
                f"{share(self.utilisation())}, if nothing of the links is hidden "
                f"{share(self.utilisation(self.link_seconds or 0.0))}"
            )
        if self.untold:
            said.append(f"  left out         {self.untold:6} operations, of which the compiler knows no time")
        if self.optimal_seconds:
            said.append(f"  cost analysis    {self.optimal_seconds * 1e3:8.1f} ms")
        return said + [f"  ! {sentence}" for sentence in self.advice()]

    def to_json(self) -> str:
        """All of it."""
        derived = dict(total=self.total, utilisation=self.utilisation(), advice=self.advice())
        derived["utilisation_with_links"] = self.utilisation(self.link_seconds or 0.0)
        return json.dumps(dataclasses.asdict(self) | derived, indent=2) + "\n"


def topology_devices(name: str) -> list:
    """The devices of a described slice such as 'v5p:4x4x4'; nothing of it needs to exist.

    Raises ValueError for a name that is none, and where libtpu is not installed.
    """
    version, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    # The compiler of TPUs ends the process for a slice with a wrong number of axes.
    if version not in CHIPS or len(sizes) != CHIPS[version].axes or not all(sizes):
        raise ValueError(
            f"--topology={name!r} must be a version and its slice, such as v5p:4x4x4 or v5e:8x8; versions "
            f"are {', '.join(f'{version} ({chip.axes} axes)' for version, chip in CHIPS.items())}"
        )
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ValueError("compiling for TPUs needs libtpu: pip install 'dalle2_jax[tpu]'")
    # Not to ask the metadata server of a cloud that this machine is not in, nor for a lock on a chip.
    for variable, value in dict(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
    ).items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # RuntimeError, JaxRuntimeError or ValueError, by what is missing
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--topology={name!r} is not possible: {first}. Slices of {version} are whole hosts, such as "
            f"{'2x2x1, 2x2x4, 4x4x4, 4x4x8' if CHIPS[version].axes == 3 else '2x2, 4x4, 4x8, 8x8, 16x16'}"
        ) from error
    return list(described.devices)


def collectives(program: str) -> dict[str, Collective]:
    """What a compiled program, its HLO text, sends, by kind, largest first.

    Bytes that a chip sends for an operation with result R in a group of g: all-gather R (g - 1) / g,
    reduce-scatter R (g - 1), all-reduce 2 R (g - 1) / g (rings), all-to-all R (g - 1) / g, permute R. An
    all-reduce of which a fusion keeps a part is a reduce-scatter. What lies in a loop counts as often as the
    compiler says that it runs.
    """
    times = _trip_counts(program)
    counts, sent = collections.Counter(), collections.Counter()
    pattern = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    computation = ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
        found = pattern.match(line)
        if not found:
            continue
        shape, kind, started = found.groups()
        group = _group_size(line)
        if group == 1 and kind != "collective-permute":
            continue
        results = _sizes(shape)
        # The asynchronous form returns (operands, results, ...): what is sent is in the largest of them.
        size = max(results) if started else sum(results)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind, size = "reduce-scatter", size / group
        factor = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1, "collective-permute": 1}
        if kind == "reduce-scatter" and started:
            size /= group
        repeated = times.get(computation, 1)
        counts[kind] += repeated
        sent[kind] += repeated * size * factor.get(kind, (group - 1) / group)
    return {kind: Collective(counts[kind], sent[kind]) for kind, _ in sent.most_common()}


def scheduled_cycles(program: str) -> tuple[int, int]:
    """(cycles that the compiler estimates for the operations of a compiled program, its HLO text, one after
    the other; how many operations it gives a number that cannot be one, 2^64 - 1 and the like: left out).

    0 where it says nothing. Operations over the links have no estimate. Loops as in `collectives`."""
    times, computation, total, untold = _trip_counts(program), "", 0, 0
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
            continue
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        if estimate and int(estimate[1]) >= _CYCLES_OF_NOTHING:
            untold += times.get(computation, 1)
        elif estimate:
            total += int(estimate[1]) * times.get(computation, 1)
    return total, untold


_CYCLES_OF_NOTHING = 1 << 48  # of one operation: two days


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


def _trip_counts(program: str) -> dict[str, int]:
    """Name of a computation -> how often it runs, of those in loops of known length and of what they call."""
    calls, bounds, computation = collections.defaultdict(list), collections.defaultdict(list), ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
            continue
        bound = re.search(r" = [su]32\[\]\S* constant\((\d+)\)", line)
        if bound:
            bounds[computation].append(int(bound[1]))
        called = re.findall(r"(?:body|condition|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line)
        length = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        for name in called:
            known = int(length[1]) if length else None
            calls[computation].append((name, known, condition[1] if condition else None))
    times: dict[str, int] = {}

    def visit(name: str, factor: int):
        for inner, length, condition in calls.get(name, ()):
            if condition is None:
                length = 1
            elif length is None:  # a counter from 0 is compared with the one number of the condition
                length = bounds[condition][0] if len(bounds[condition]) == 1 else 1
            if factor * length > times.get(inner, 0):
                times[inner] = factor * length
                visit(inner, factor * length)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", program, re.M)
    visit(entry[1] if entry else "", 1)
    return times


def _sizes(shape: str) -> list[float]:
    """Bytes of the arrays in an HLO shape, '(bf16[2,3]{1,0}, f32[])'."""
    found = []
    for kind, axes in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        width = _BYTES.get(kind) or int(re.search(r"\d+", kind)[0]) / 8
        found.append(width * math.prod(int(n) for n in axes.split(",") if n))
    return found or [0.0]


def _group_size(line: str) -> int:
    """Chips that take part in one collective of this line."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed else 1


def _abstract(spec: dict, sharding) -> dict:
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for n, x in spec.items()}


def _frozen_clip(path: str | None, stage, mesh) -> tuple[models.FrozenClip | None, dict]:
    """(the frozen CLIP that a config describes, its abstract parameters whole on every chip)."""
    if not path:
        return None, {}
    clip = models.build_stage(models.to_plain(runpy.run_path(path)["get_config"]()))
    wanted = getattr(stage, "embed_dim", clip.embed_dim)
    if wanted != clip.embed_dim:
        raise ValueError(f"{path} has embeddings of {clip.embed_dim} entries, the stage reads {wanted}")
    whole = partition.replicated(mesh)
    params = models.abstract_params(clip)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    return models.FrozenClip(clip), params


def lower_step(config: dict, stage, mesh, clip_config: str | None = None):
    """(the lowered training step of `config`, FLOPs of the model in it, number of parameters)."""
    plan = train.make_plan(config, stage, mesh)
    clip, frozen = _frozen_clip(clip_config, stage, mesh)
    spec, fill = dict(stage.batch_spec(config["batch_size"])), lambda params, batch: batch
    arithmetic = flops.of_step(stage, spec)
    if clip is not None:
        needed = set(spec)
        fill = functools.partial(clip.fill, needed=needed)
        of_clip = clip.stage.batch_spec(config["batch_size"])
        reads = clip.fields(needed)
        given = {("clip_image" if n == "image" else n): x for n, x in of_clip.items()}
        spec = {n: x for n, x in spec.items() if n not in models.CLIP_FIELDS}
        spec |= {n: x for n, x in given.items() if n in reads and n not in spec}
        arithmetic += flops.count(fill, frozen, spec)
    batch = _abstract(spec, partition.batch_sharding(mesh))
    with partition.use_mesh(mesh):
        lowered = train.jit_step(config, stage, plan, fill, mesh).lower(plan.abstract, batch, frozen)
    return lowered, arithmetic, _parameters(plan.abstract.params)


def lower_sampler(config: dict, stage, mesh, count: int):
    """The same of the program that draws `count` examples with parameters whole on every chip."""
    if not hasattr(stage, "sample"):
        raise ValueError(f"stage {config['stage']!r} does not draw: leave --sample out")
    partition.check_batch_size(count, mesh, "--sample")
    params = models.abstract_params(stage)
    whole, rows = partition.replicated(mesh), partition.batch_sharding(mesh)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)
    batch = _abstract(stage.batch_spec(count), rows)
    with partition.use_mesh(mesh):
        lowered = jax.jit(stage.sample).lower(placed, keys, batch)
    return lowered, flops.count(stage.sample, placed, keys, batch), _parameters(params)


def _parameters(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def inspect(
    config: dict,
    topology: str | None = None,
    *,
    clip_config: str | None = None,
    sample: int | None = None,
    hlo: str | None = None,
) -> Report:
    """Compile the training step of `config` (plain JSON types), or its sampler for `sample` examples.

    topology: see `topology_devices`; None: the devices of this machine. hlo: a file for the compiled
    program's text.

    Raises ValueError for settings that do not fit together, before anything is compiled, and for a program
    that the compiler refuses because it needs more memory than a chip has.
    """
    devices = topology_devices(topology) if topology else jax.devices()
    train.check_names(config)
    mesh = partition.make_mesh(**config["mesh"], devices=devices)
    stage = models.build_stage(config)
    if sample:
        lowered, arithmetic, parameters = lower_sampler(config, stage, mesh, sample)
    else:
        train.check_settings(config, stage, mesh)
        lowered, arithmetic, parameters = lower_step(config, stage, mesh, clip_config)
    began = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=partition.compiler_options(mesh=mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "the program needs more memory than a chip has: --config.model.remat=all, "
            "--config.grad_accum=2, more chips, or --config.mesh.data=1 --config.mesh.fsdp=-1. The compiler "
            f"says:\n{_head(str(error))}"
        ) from None
    seconds = time.monotonic() - began
    needs, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    chip = CHIPS.get((topology or "").partition(":")[0])
    text = compiled.as_text()
    if hlo:
        epath.Path(hlo).write_text(text)
    moved, (cycles, untold) = collectives(text), scheduled_cycles(text)
    optimal = costs.get("optimal_seconds", 0.0)
    links = chip and sum(one.bytes for one in moved.values()) / chip.link_bandwidth
    return Report(
        program=f"{config['stage']}, {'drawing' if sample else 'a training step'}",
        chips=len(devices),
        device=devices[0].device_kind,
        mesh=dict(mesh.shape),
        batch_size=sample or config["batch_size"],
        parameters=parameters,
        arguments=needs.argument_size_in_bytes,
        outputs=needs.output_size_in_bytes,
        temporaries=needs.temp_size_in_bytes,
        aliased=needs.alias_size_in_bytes,
        code=needs.generated_code_size_in_bytes,
        memory=chip.memory if chip else _device_memory(devices[0]),
        model_flops=arithmetic,
        compiler_flops=costs.get("flops", 0.0),
        seconds=cycles / chip.clock if chip and cycles else None,
        untold=untold,
        optimal_seconds=optimal if chip and optimal > 0 else None,  # below 0: the compiler does not know
        peak=metrics.peak_flops(devices[0].device_kind),
        collectives=moved,
        link_seconds=links,
        compile_seconds=seconds,
    )


def _head(text: str, lines: int = 12) -> str:
    return "\n".join(line[:200] for line in text.strip().splitlines()[:lines])


def _device_memory(device) -> float | None:
    with contextlib.suppress(Exception):  # not every platform tells
        return (device.memory_stats() or {}).get("bytes_limit")
    return None


FLAGS = flags.FLAGS


def main(argv):
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        if FLAGS.topology:
            jax.config.update("jax_platforms", "cpu")  # a TPU that is not there would be looked for
        partition.initialise()
        config = models.to_plain(FLAGS.config)
        print("compiling; a large stage takes minutes", file=sys.stderr, flush=True)
        report = inspect(config, FLAGS.topology, clip_config=FLAGS.clip, sample=FLAGS.sample, hlo=FLAGS.hlo)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from (error if FLAGS.debug else None)
    print("\n".join(report.lines()))
    if FLAGS.json:
        epath.Path(FLAGS.json).write_text(report.to_json())
    if report.memory is not None and report.total > report.memory:
        raise SystemExit(1)


if __name__ == "__main__":
    define_config()
    flags.DEFINE_string("topology", None, "A described TPU slice, such as v5p:4x4x4; default: what is here.")
    flags.DEFINE_string("clip", None, "Config file of the frozen CLIP that takes part in the step.")
    flags.DEFINE_integer("sample", None, "Compile drawing so many examples instead.", lower_bound=1)
    flags.DEFINE_string("json", None, "Also write the report there.")
    flags.DEFINE_string("hlo", None, "Also write the compiled program's text there.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config"])
    app.run(main)

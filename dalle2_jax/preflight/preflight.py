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

import copy
import dataclasses
import functools
import json
import math
import operator
import re
import runpy
import sys
import time
from collections.abc import Iterable, Mapping

import jax
from absl import flags
from etils import epath

from dalle2_jax.models import flops, models
from dalle2_jax.models.nets import layers
from dalle2_jax.preflight import chips, hlo
from dalle2_jax.preflight.chips import GIB
from dalle2_jax.runtime import metrics, partition
from dalle2_jax.train import train


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


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is looked at: a config (plain JSON types), a described slice (None: the devices of this machine),
    how many examples are drawn (None: a training step)."""

    config: dict
    topology: str | None = None
    sample: int | None = None

    def checked(self):
        """(mesh, stage). Raises ValueError for settings that cannot go together; nothing is compiled."""
        devices = chips.topology_devices(self.topology) if self.topology else jax.devices()
        train.check_names(self.config)
        mesh = partition.make_mesh(**self.config["mesh"], devices=devices)
        stage = models.build_stage(self.config)
        if self.sample is None:
            train.check_settings(self.config, stage, mesh)
        elif not hasattr(stage, "sample"):
            raise ValueError(f"stage {self.config['stage']!r} does not draw: leave --sample out")
        else:
            partition.check_batch_size(self.sample, mesh, "--sample")
        return mesh, stage

    def changed(self, settings: Mapping[str, object]) -> "Asked":
        """The same with these flags, such as {'config.mesh.data': 1, 'topology': 'v5p:4x4x8'}."""
        config, own = copy.deepcopy(self.config), {}
        for name, value in settings.items():
            first, *inner = name.split(".")
            if inner:
                functools.reduce(operator.getitem, inner[:-1], config)[inner[-1]] = value
            else:
                own[first] = value
        return dataclasses.replace(self, config=config, **own)

    def first_accepted(self, alternatives: Iterable[Mapping[str, object]]) -> str:
        """The first of the settings that would not be refused, as flags; '' if all would be."""
        for settings in alternatives:
            try:
                self.changed(settings).checked()
            except ValueError:
                continue
            return " ".join(f"--{name}={value}" for name, value in settings.items())
        return ""


def advise(report: Report, asked: Asked, slices: int = 1) -> tuple[str, ...]:
    """What to change, a sentence each: flags that would be accepted, `or` between them. Nothing where a
    program fits and computes longer than its links need. slices: of the devices.
    """
    if report.fits is False:
        why, offers = (_offers_drawing if asked.sample else _offers_training)(report, asked, slices)
    elif asked.sample is None and (report.link_seconds or 0) > (report.seconds or math.inf):
        why, offers = "the links take longer than the arithmetic", _offers_links(report, asked)
    else:
        return ()
    found = [flag for flag in map(asked.first_accepted, offers) if flag]
    if found or report.fits is not False:
        return (": ".join([why, *([" or ".join(found)] if found else [])]),)
    return (f"{why}, and no setting helps: take chips with more memory, or more of them",)


def _offers_training(report: Report, asked: Asked, slices: int):
    """(why a step does not fit, lists of settings of which the first that is accepted is offered)."""
    config, mesh = asked.config, report.mesh
    whole = {"config.mesh.data": slices, "config.mesh.fsdp": -1}
    twice = {"config.mesh.tensor": 2 * mesh["tensor"]}
    larger = {"topology": chips.resized(asked.topology, larger=True)} if asked.topology else {}
    more_chips = [larger, larger | whole, larger | whole | twice] if larger else []
    if report.temporaries is not None and report.arguments > report.temporaries:
        if mesh["data"] > slices:
            return "the state takes most, and `data` repeats it", [[whole]]
        return "the state takes most, and is split over every chip", [more_chips]
    size, accum = config["batch_size"], config["grad_accum"]
    each = size // accum // (mesh["data"] * mesh["fsdp"])
    remat = config["model"].get("remat", "none")
    remat = {True: "all", False: "none"}.get(remat, remat)
    stronger = layers.REMAT[layers.REMAT.index(remat) + 1 :] if remat in layers.REMAT else ()
    offers = [[{"config.model.remat": what}] for what in stronger]
    offers.append([{"config.grad_accum": n} for n in range(accum + 1, size + 1) if size % n == 0])
    if each == 1:  # an example can only be split inside its layers
        offers.append([whole | twice | {"config.grad_accum": 2 * accum}])
    return f"activations take most, of {each} examples a chip", [*offers, more_chips]


def _offers_drawing(report: Report, asked: Asked, slices: int):
    """As `_offers_training`; parameters are whole on every chip, so neither mesh nor more chips help."""
    needed = report.memory if report.total is None else report.total
    one_each = {"config.mesh.data": -1, "config.mesh.fsdp": 1, "config.mesh.tensor": 1}
    roomier = []
    for version, chip in sorted(chips.CHIPS.items(), key=lambda item: item[1].memory):
        if asked.topology and chip.memory > needed:
            name = f"{version}:{'2x2x1' if chip.axes == 3 else '2x2'}"
            roomier += [{"topology": name}, {"topology": name} | one_each]
    if report.temporaries is not None and report.arguments > report.temporaries:
        return "the parameters take most, and every chip has all of them", [roomier]
    shards = report.mesh["data"] * report.mesh["fsdp"]
    each = asked.sample // shards
    offers = [[{"sample": shards * (each // 2)}]] if each > 1 else []
    if asked.config["model"].get("dtype", "float32") == "float32":
        offers.append([{"config.model.dtype": "bfloat16"}])
    return f"activations take most, of {each} examples a chip", [*offers, roomier]


def _offers_links(report: Report, asked: Asked):
    """Lists of settings with which fewer bytes go over the links, as far as there is memory for them."""
    room = math.inf if report.memory is None else report.memory - report.total
    offers = []
    if report.arguments <= room:
        offers.append([{"config.mesh.data": 2 * report.mesh["data"], "config.mesh.fsdp": -1}])
    if asked.topology and report.total <= room:
        offers.append([{"topology": chips.resized(asked.topology, larger=False)}])
    return offers


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program, the model's FLOPs in it, numbers of parameters, bytes a chip of its arguments."""

    lowered: jax.stages.Lowered
    flops: int
    parameters: int
    arguments: int


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


def lower_step(config: dict, stage, mesh, clip_config: str | None = None) -> Program:
    """The training step of `config`."""
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
    return Program(
        lowered, arithmetic, _parameters(plan.abstract.params), _held((plan.abstract, batch, frozen))
    )


def lower_sampler(stage, mesh, count: int) -> Program:
    """Drawing `count` examples with parameters whole on every chip, as `generate` has them."""
    params = models.abstract_params(stage)
    whole, rows = partition.replicated(mesh), partition.batch_sharding(mesh)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)
    batch = _abstract(stage.batch_spec(count), rows)
    with partition.use_mesh(mesh):
        lowered = jax.jit(stage.sample, out_shardings=rows).lower(placed, keys, batch)
    arithmetic = flops.count(stage.sample, placed, keys, batch)
    return Program(lowered, arithmetic, _parameters(params), _held((placed, keys, batch)))


def _parameters(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _held(tree) -> int:
    """Bytes of a tree of ShapeDtypeStructs on each chip."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def inspect(
    config: dict,
    topology: str | None = None,
    *,
    clip_config: str | None = None,
    sample: int | None = None,
    hlo_path: str | None = None,
) -> Report:
    """Compile the training step of `config` (plain JSON types), or its sampler for `sample` examples.

    topology: see `chips.topology_devices`; None: the devices of this machine. hlo_path: a file for the
    compiled program's text.

    Raises ValueError for settings that do not fit together, before anything is compiled.
    """
    asked = Asked(config, topology, sample)
    mesh, stage = asked.checked()
    if sample is None:
        program = lower_step(config, stage, mesh, clip_config)
    else:
        program = lower_sampler(stage, mesh, sample)
    devices = list(mesh.devices.flat)
    report = Report(
        program=f"{config['stage']}, {'a training step' if sample is None else 'drawing'}",
        chips=len(devices),
        device=devices[0].device_kind,
        mesh=dict(mesh.shape),
        batch_size=config["batch_size"] if sample is None else sample,
        parameters=program.parameters,
        arguments=program.arguments,
        memory=chips.memory_of(devices[0]),
        model_flops=program.flops,
        peak=metrics.peak_flops(devices[0].device_kind),
    )
    began = time.monotonic()
    try:
        compiled, refusal = program.lowered.compile(partition.compiler_options(mesh=mesh)), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, str(error)
    report = dataclasses.replace(report, compile_seconds=time.monotonic() - began)
    if compiled is None:
        report = _refused(report, refusal)
    else:
        text = compiled.as_text()
        if hlo_path:
            epath.Path(hlo_path).write_text(text)
        report = _told(report, compiled, text, chips.chip_of(devices[0]))
    return dataclasses.replace(report, advice=advise(report, asked, partition.num_slices(devices)))


def _told(report: Report, compiled, text: str, chip: chips.Chip | None) -> Report:
    """`report` with what a compiled program, whose text is given, says of itself."""
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


def _refused(report: Report, message: str) -> Report:
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


FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        if FLAGS.topology:
            jax.config.update("jax_platforms", "cpu")  # a TPU that is not there would be looked for
        partition.initialise()
        config = models.to_plain(FLAGS.config)
        print("compiling; a large stage takes minutes", file=sys.stderr, flush=True)
        report = inspect(
            config, FLAGS.topology, clip_config=FLAGS.clip, sample=FLAGS.sample, hlo_path=FLAGS.hlo
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from (error if FLAGS.debug else None)
    print("\n".join(report.lines()))
    if FLAGS.json:
        epath.Path(FLAGS.json).write_text(report.to_json())
    if report.fits is False:
        raise SystemExit(1)

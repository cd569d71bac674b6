"""dalle2-jax benchmark --config=configs/X.py [--config.a.b=value ...]

Measures training steps of a stage on this machine: examples a second, utilisation, memory, the time to
compile. The batches are synthetic and on the devices: no data is read. The program is the one that
`dalle2_jax.train` compiles.

  --sample=8    draws 8 examples at a time with the stage's settings; no training steps
  --steps=10    how many are measured, after two that are not
  --json=FILE   the report as JSON

The same run then measures the machine: the rate of products of large square matrices in the stage's compute
type, and the rate at which large arrays are copied. The fields that a frozen CLIP computes are synthetic,
too: --config.clip makes no difference.
"""

from dalle2_jax.runtime import start

start.begin(__name__, "benchmark: loading JAX")


import dataclasses
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from dalle2_jax.models import flops, models
from dalle2_jax.runtime import commandline, metrics, partition, processes
from dalle2_jax.runtime.batch import field
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks
from dalle2_jax.train.plan import Plan, make_plan

GIB = 2**30
WARM_UP = 2
# Side of the matrices, and bytes of the array on each device, where they are smaller than by default.
MATRIX_SIDE = {"cpu": 1024}
COPY_BYTES = {"cpu": 64 << 20}
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of times or rates, and the quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of one or more values."""
        low, high = np.quantile(values, (0.25, 0.75))
        return Spread(statistics.median(values), float(low), float(high))

    @property
    def relative(self) -> float:
        """The distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median

    def rate(self, count: float) -> "Spread":
        """The rates of `count` things in these times."""
        return Spread(count / self.median, count / self.high, count / self.low)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of all devices: matrix FLOP/s by type, bytes/s read and written by a copy; peak FLOP/s in
    bfloat16 by the datasheet."""

    devices: int
    kind: str
    matrix: dict[str, float]
    copy: float
    datasheet: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """A measurement.

    Attributes:
      program, batch_size, parameters, dtype, mesh: the program, and its devices.
      model_flops: of a step, by `flops`. compiler_flops: by the compiler, with recomputations; 0: unknown.
      seconds: a step. compile_seconds: tracing and compiling, or reading the compiled program.
      memory: peak bytes of a device since the process began. planned_memory: bytes of the program on a device
        by the compiler.
      host_memory: peak bytes of this process.
    """

    program: str
    batch_size: int
    parameters: int
    dtype: str
    mesh: dict[str, int]
    machine: Machine
    model_flops: int
    compiler_flops: float
    seconds: Spread
    steps: int
    compile_seconds: float
    memory: int | None
    planned_memory: int
    host_memory: int

    @property
    def flops_per_second(self) -> float:
        """The model's, on all devices."""
        return self.model_flops / self.seconds.median

    @property
    def of_matrix(self) -> float:
        """Utilisation: the share of this machine's measured rate of products of matrices."""
        return self.flops_per_second / self.machine.matrix[self.dtype]

    @property
    def of_datasheet(self) -> float | None:
        """Utilisation: the share of the datasheet's peak in bfloat16; None: unknown."""
        return self.flops_per_second / self.machine.datasheet if self.machine.datasheet else None

    def lines(self) -> list[str]:
        """The report as lines of text."""
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        examples, seconds, machine = self.seconds.rate(self.batch_size), self.seconds, self.machine
        shares = f"{self.of_matrix:.1%} of the products of matrices measured here"
        if machine.datasheet:
            shares += f", {self.of_datasheet:.1%} of the datasheet's {machine.datasheet / 1e12:.0f} TFLOP/s"
        held = f"{self.host_memory / GIB:.2f} GiB of this process"
        if self.memory is not None:
            held = f"{self.memory / GIB:.2f} GiB at most on a device, {held}"
        rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {name}" for name, rate in machine.matrix.items())
        return [
            f"{self.program}: {self.parameters / 1e6:.2f}M parameters, batch {self.batch_size} in "
            f"{self.dtype} on {machine.devices} x {machine.kind} ({mesh})",
            f"  speed        {examples.median:.4g} examples/s (quartiles {examples.low:.4g} .. "
            f"{examples.high:.4g}); {seconds.median:.4g} s a step, median of {self.steps}",
            f"  arithmetic   {self.model_flops / 1e9:.4g} GFLOP a step of the model, "
            f"{self.flops_per_second / 1e9:.4g} GFLOP/s",
            f"  utilisation  {shares}",
            f"  memory       {held}; {self.planned_memory / GIB:.2f} GiB a device planned for the program",
            f"  compiling    {self.compile_seconds:.1f} s",
            f"  machine      {rates}; copies {machine.copy / 1e9:.4g} GB/s",
        ]

    def to_json(self) -> str:
        """The report as JSON."""
        derived = dict(
            flops_per_second=self.flops_per_second,
            of_matrix=self.of_matrix,
            of_datasheet=self.of_datasheet,
            examples_per_second=dataclasses.asdict(self.seconds.rate(self.batch_size)),
            jax=jax.__version__,
        )
        return json.dumps(dataclasses.asdict(self) | derived, indent=2) + "\n"


def timed(run: Callable[[], object], count: int, warm_up: int = WARM_UP) -> list[float]:
    """Seconds of each of `count` runs after `warm_up` others; `run` returns the arrays to wait for."""
    seconds = []
    for i in range(warm_up + count):
        began = time.perf_counter()
        jax.block_until_ready(run())
        if i >= warm_up:
            seconds.append(time.perf_counter() - began)
    return seconds


def measure_machine(mesh, dtypes: Sequence[str]) -> Machine:
    """The rates of the mesh's devices, all of them at work; the best of a few runs."""
    devices = mesh.devices.ravel()
    platform, split = devices[0].platform, partition.all_devices(mesh)

    def best(function, shape: tuple, dtype: str) -> tuple[int, float]:
        """(bytes of an array split over the devices, seconds of the function of it)."""
        x = jax.jit(lambda: jnp.full((len(devices), *shape), 1e-4, dtype), out_shardings=split)()
        run = jax.jit(function, out_shardings=split)
        return x.nbytes, min(timed(lambda: run(x), REPEATS))

    side = MATRIX_SIDE.get(platform, 8192)
    products = 2 * len(devices) * side**3
    matrix = {name: products / best(lambda x: x @ x, (side, side), name)[1] for name in dtypes}
    size, seconds = best(lambda x: x + 1, (COPY_BYTES.get(platform, 1 << 30) // 4,), "float32")
    copy = 2 * size / seconds
    peak = metrics.peak_flops(devices[0].device_kind)
    return Machine(len(devices), devices[0].device_kind, matrix, copy, peak and peak * len(devices))


def synthetic_batch(plan: Plan, size: int) -> dict[str, jax.Array]:
    """A batch of noise made on the devices, with captions of full length."""
    vocabulary = (plan.config["model"].get("text") or {}).get("vocab_size", 2)

    def one(key: jax.Array, name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        kind = field(name).kind
        if kind == "mask":
            return jnp.ones(spec.shape, bool)
        if kind == "tokens":
            return jax.random.randint(key, spec.shape, 1, vocabulary, spec.dtype)
        if kind in ("number", "label", "codes"):  # the first corner, the first class
            return jnp.zeros(spec.shape, spec.dtype)
        if kind in ("embedding", "states"):
            noise = jax.random.normal(key, spec.shape, spec.dtype)
            return noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)
        return jax.random.uniform(key, spec.shape, spec.dtype, -1, 1)

    def make() -> dict[str, jax.Array]:
        specs = enumerate(sorted(plan.stage.batch_spec(size).items()))
        return {name: one(jax.random.key(number), name, spec) for number, (name, spec) in specs}

    return jax.jit(make, out_shardings=partition.batch_sharding(plan.mesh))()


def run(
    config: dict,
    *,
    sample: int | None = None,
    steps: int = 10,
    warm_up: int = WARM_UP,
    machine: Machine | None = None,
) -> Report:
    """Measure training steps of `config` (plain JSON types), or drawing `sample` examples at a time.

    machine: its rates, in float32 and the stage's type; None: measured here, after the stage, so that their
    arrays do not count as the stage's memory.

    Raises ValueError for settings that do not fit together, before anything is compiled.
    """
    plan = make_plan(config, sample=sample)
    mesh, size = plan.mesh, config["batch_size"] if sample is None else sample
    dtype = config["model"].get("dtype", "float32")
    batch = synthetic_batch(plan, size)
    with partition.use_mesh(mesh):
        step, program, compile_seconds, arithmetic = (
            training_step(plan, batch) if sample is None else drawing(plan, batch, size)
        )
        seconds = timed(step, steps, warm_up)
    needs, costs = program.memory_analysis(), program.cost_analysis() or {}
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    peak = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    del batch, step  # frees their arrays
    return Report(
        program=f"{config['stage']}, {'a training step' if sample is None else 'drawing'}",
        batch_size=size,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(models.abstract_params(plan.stage))),
        dtype=dtype,
        mesh=dict(mesh.shape),
        machine=measure_machine(mesh, sorted({dtype, "float32"})) if machine is None else machine,
        model_flops=arithmetic,
        compiler_flops=costs.get("flops", 0.0),
        seconds=Spread.of(seconds),
        steps=steps,
        compile_seconds=compile_seconds,
        memory=peak or None,
        planned_memory=needs.argument_size_in_bytes
        + needs.output_size_in_bytes
        - needs.alias_size_in_bytes
        + needs.temp_size_in_bytes,
        # KiB on Linux, bytes on macOS
        host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    )


def _compiled(jitted, *arguments):
    """(the program, seconds that tracing and compiling took)."""
    began = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    return program, time.perf_counter() - began


def training_step(plan: Plan, batch: dict):
    """(function that runs a step, its program, seconds of compiling, FLOPs)."""
    held, frozen = [plan.init()], plan.abstract_frozen
    frozen = jax.device_put(models.zeros(frozen), jax.tree.map(lambda x: x.sharding, frozen))
    program, seconds = _compiled(plan.jit_step(), held[0], batch, frozen)

    def step():
        held[0], scalars = program(held[0], batch, frozen)
        return held[0], scalars

    return step, program, seconds, flops.of_step(plan.stage, batch, plan.frozen)


def drawing(plan: Plan, batch: dict, count: int):
    """As `training_step`, of drawing `count` examples; the devices hold parameters, no train state."""
    stage, mesh = plan.stage, plan.mesh
    init = jax.jit(
        lambda: stage.init(jax.random.key(0), models.zeros(stage.batch_spec(1))),
        out_shardings=partition.replicated(mesh),
        compiler_options=partition.compiler_options(once=True),
    )
    params, split = init(), partition.batch_sharding(mesh)
    keys = jax.device_put(jax.random.split(jax.random.key(0), count), split)
    options = partition.compiler_options()
    jitted = jax.jit(lambda p, k, b: stage.sample(p, k, b), out_shardings=split, compiler_options=options)
    program, seconds = _compiled(jitted, params, keys, batch)
    arithmetic = flops.count(stage.sample, params, keys, batch)
    return lambda: program(params, keys, batch), program, seconds, arithmetic


FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    with processes.fail_together(debug=FLAGS.debug):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        partition.initialise()
        print("compiling; a large stage takes minutes", file=sys.stderr, flush=True)
        report = run(models.to_plain(FLAGS.config), sample=FLAGS.sample, steps=FLAGS.steps)
    print("\n".join(report.lines()))
    if FLAGS.json:
        epath.Path(FLAGS.json).write_text(report.to_json())


if __name__ == "__main__":
    define_config()
    flags.DEFINE_integer("sample", None, "Draw so many examples at a time instead.", lower_bound=1)
    flags.DEFINE_integer("steps", 10, "How many steps are measured.", lower_bound=3)
    commandline.DEFINE_path("json", None, "Also write the report there.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config"])
    start.run(main, settings=checks.settings_of_flag)

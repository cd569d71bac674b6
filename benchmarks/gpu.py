"""python -m benchmarks.gpu --json=FILE [--cases=decoder64_512,drawing_8] [--seconds=480] [--debug]

The paper's networks on one accelerator, in about 8 minutes: training steps of the decoder at three widths,
and sampling of each stage with the paper's steps and guidance. Run it from the repository's root, without
TensorFlow or torch. Results are printed and written at once; cases that would begin after --seconds are named
as left out.

  decoder64_WIDTH         a training step without the text tower, whose FLOPs are the U-Net's alone
  decoder64_512_text      the same with it, 3.6B parameters: 53 GiB of state
  drawing_8, drawing_1    prior, decoder64, upsampler256, upsampler1024 with 8 pictures or 1 at a time
  attention               cuDNN's against XLA's in the decoder's shapes, forward and gradient

A batch that does not fit into memory is halved. --debug runs everything with the presets `debug`. Utilisation
is as in `dalle2_jax.benchmark`: of the datasheet's dense bfloat16 peak, and of products of matrices measured
here. Memory is the compiler's plan for the program, and the device's peak since the script began.
"""

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from dalle2_jax import benchmark
from dalle2_jax.configs import decoder64, prior, upsampler256, upsampler1024
from dalle2_jax.models import models
from dalle2_jax.models.nets import layers
from dalle2_jax.runtime import files, partition

WIDTHS = {192: 256, 320: 128, 512: 64}  # channels: the first batch size
WITH_TEXT = 32
STAGES = dict(prior=prior, decoder64=decoder64, upsampler256=upsampler256, upsampler1024=upsampler1024)
STEPS, DRAWINGS = 10, 1
CONDITIONS = 4 + 256  # positions of image embedding and caption in every attention
DEBUG_BATCH = 8


def settings(recipe, debug: bool, **model) -> dict:
    """A recipe's config on one device as JSON values, with these settings of its model."""
    config = models.to_plain(recipe.get_config("debug" if debug else ""))
    config["model"] |= model
    config["mesh"] = dict(data=-1, fsdp=1, tensor=1)
    return config


def largest_that_fits(run: Callable[[int], benchmark.Report], size: int, least: int) -> benchmark.Report:
    """run(size), with half of the size for as long as the device's memory is not enough."""
    while True:
        try:
            return run(size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size // 2 < least:
                raise
            print(f"  {size} examples do not fit", flush=True)
        size //= 2  # outside the handler, which references the device's arrays


def reported(report: benchmark.Report) -> dict:
    """The JSON values of a report."""
    return json.loads(report.to_json()) | {"seconds_per_example": report.seconds.median / report.batch_size}


def trained(width: int, batch_size: int, text: bool) -> Callable:
    """A training case with the largest batch that fits, of `batch_size` and its halves."""

    def case(debug: bool, machine: benchmark.Machine) -> Iterator[dict]:
        changes = ({} if text else dict(text=None)) | ({} if debug else dict(channels=width))
        config = settings(decoder64, debug, **changes)
        run = functools.partial(training, config, machine)
        report = largest_that_fits(run, DEBUG_BATCH if debug else batch_size, jax.device_count())
        print("\n".join(report.lines()), flush=True)
        yield reported(report)

    return case


def training(config: dict, machine: benchmark.Machine, size: int) -> benchmark.Report:
    """Training steps on batches of that size."""
    return benchmark.run(config | {"batch_size": size}, steps=STEPS, machine=machine)


def drawn(count: int) -> Callable:
    """A case of sampling `count` pictures at a time, by stage, and the sum."""

    def case(debug: bool, machine: benchmark.Machine) -> Iterator[dict]:
        found, devices = {}, jax.device_count()
        for name, recipe in STAGES.items():
            run = functools.partial(drawing, settings(recipe, debug), machine)
            report = largest_that_fits(run, max(count, devices), devices)
            print("\n".join(report.lines()), flush=True)
            found[name] = reported(report)
            yield found
        total = sum(stage["seconds_per_example"] for stage in found.values())
        print(f"{total:.3g} s a picture", flush=True)
        yield found | {"seconds_per_picture": total}

    return case


def drawing(config: dict, machine: benchmark.Machine, size: int) -> benchmark.Report:
    """Sampling of `size` pictures at a time, after one run that does not count."""
    return benchmark.run(config, sample=size, steps=DRAWINGS, warm_up=1, machine=machine)


def attention(debug: bool, machine: benchmark.Machine) -> Iterator[dict]:
    """The decoder's levels with attention, after 260 positions of conditions. Raises ValueError if a GPU does
    not use cuDNN, or if its error is more than twice XLA's."""
    found = {}
    for side, heads in ((8, 2),) if debug else ((32, 16), (16, 24), (8, 32)):
        found[f"{side}x{side}"] = both_attentions(side * side, heads, 2 if debug else 32)
        print(f"attention {side} x {side}, {heads} heads: {found[f'{side}x{side}']}", flush=True)
        yield found
    for name, row in found.items():
        if jax.default_backend() == "gpu" and not row["cudnn_ran"]:
            raise ValueError(f"attention {name}: cuDNN was not chosen")
        errors = row["cudnn"]["error"], row["xla"]["error"]
        if not errors[0] <= 2 * errors[1]:
            raise ValueError(f"attention {name}: cuDNN's error {errors[0]:.2g}, XLA's {errors[1]:.2g}")


def both_attentions(length: int, heads: int, batch_size: int) -> dict:
    """Seconds of attention with its gradient, and the largest error of either against float32, as a share of
    the largest entry."""
    shape, keys = (batch_size, length + CONDITIONS, heads, 64), jax.random.split(jax.random.key(0), 4)
    q, k, v, slope = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    inputs = q[:, :length], k, v, slope[:, :length]

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(cudnn, q, k, v, slope):
        def loss(q, k, v):
            out = layers.attention(q, k, v, cudnn=cudnn).astype(jnp.float32)
            return (out * slope.reshape(out.shape)).sum(), out

        (_, out), by = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *by

    with jax.default_matmul_precision("highest"):
        exact = gradients(False, *(x.astype(jnp.float32) for x in inputs))
    row = {"cudnn_ran": layers.cudnn_attention.__name__ in str(gradients.trace(True, *inputs).jaxpr)}
    for name, cudnn in (("xla", False), ("cudnn", True)):
        pairs = zip(gradients(cudnn, *inputs), exact, strict=True)
        pairs = [(np.asarray(a, np.float32), np.asarray(b)) for a, b in pairs]
        # By numpy, whose maximum is NaN where an entry is: XLA's on a CPU passes over them.
        error = float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))
        seconds = benchmark.timed(functools.partial(gradients, cudnn, *inputs), STEPS)
        row[name] = dict(seconds=benchmark.Spread.of(seconds).median, error=error)
    return row


# The most interesting first: time may run out.
CASES = {
    **{f"decoder64_{width}": trained(width, size, text=False) for width, size in WIDTHS.items()},
    "drawing_8": drawn(8),
    "attention": attention,
    "drawing_1": drawn(1),
    "decoder64_512_text": trained(512, WITH_TEXT, text=True),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's options; ends the process for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--json", required=True, type=files.expand, help="the results are written there")
    parser.add_argument("--seconds", type=float, default=480, help="no case begins after that")
    parser.add_argument("--debug", action="store_true", help="small networks, as a test")
    options = parser.parse_args(arguments)
    unknown = set(options.cases.split(",")) - CASES.keys()
    if unknown:
        parser.error(f"--cases: {', '.join(sorted(unknown))} unknown; there are {', '.join(CASES)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measures, prints and writes; the status is 1 if a case could not be measured."""
    options, began = parse(arguments), time.perf_counter()
    partition.initialise()
    dtypes = ["float32"] if options.debug else ["bfloat16", "float32"]
    machine = benchmark.measure_machine(partition.make_mesh(), dtypes)
    device = jax.devices()[0]
    results = dict(
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        platform=device.client.platform_version,
        device=device.device_kind,
        devices=jax.device_count(),
        memory=(device.memory_stats() or {}).get("bytes_limit"),
        debug=options.debug,
        cases={},
        failed={},
    )
    for name in options.cases.split(","):
        if time.perf_counter() - began > options.seconds:
            results["failed"][name] = f"left out: {options.seconds:.0f} s were over"
            print(f"{name} is {results['failed'][name]}", flush=True)
        else:
            try:
                for found in CASES[name](options.debug, machine):
                    results["cases"][name] = found
                    Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
            except Exception as error:  # the other cases are still of use
                results["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
                traceback.print_exc()
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A training step, or a program that draws, compiled for described devices or for those of this machine."""

import dataclasses
import math
import runpy
import time

import jax
from etils import epath

from dalle2_jax.models import flops, models
from dalle2_jax.preflight import chips
from dalle2_jax.preflight.advice import Setup, advise
from dalle2_jax.preflight.report import Report, compiled_report, refused_report
from dalle2_jax.runtime import commandline, metrics, partition
from dalle2_jax.train.plan import Plan

# a lowered program, the model's FLOPs in it, its arguments as ShapeDtypeStructs
Program = tuple[jax.stages.Lowered, int, tuple]


def _placed(tree, sharding):
    """ShapeDtypeStructs with this sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _with_clip(plan: Plan, path: str) -> Plan:
    """The plan with the frozen CLIP that the recipe `path` describes."""
    clip = models.build_stage(models.to_plain(runpy.run_path(commandline.recipe_file(path))["get_config"]()))
    width = getattr(plan.stage, "embed_dim", 0) or clip.embed_dim  # 0: it reads no embedding
    if width != clip.embed_dim:
        raise ValueError(f"{path} has embeddings of {clip.embed_dim} entries, the stage reads {width}")
    return dataclasses.replace(plan, frozen_stages={**plan.frozen_stages, "clip": clip})


def lower_step(plan: Plan) -> Program:
    """The training step of a plan, with the parameters of its frozen stages as arguments."""
    size, frozen = plan.config["batch_size"], plan.abstract_frozen
    spec = plan.frozen.dataset_spec(size)
    arithmetic = flops.of_step(plan.stage, plan.stage.batch_spec(size), plan.frozen)
    arithmetic += flops.count(plan.frozen.encode_batch, frozen, spec)
    arguments = plan.abstract, _placed(spec, partition.batch_sharding(plan.mesh)), frozen
    with partition.use_mesh(plan.mesh):
        lowered = plan.jit_step().lower(*arguments)
    return lowered, arithmetic, arguments


def lower_sampler(plan: Plan, count: int) -> Program:
    """Drawing `count` examples; every chip has all parameters, as in `generate`."""
    stage, split = plan.stage, partition.batch_sharding(plan.mesh)
    params = _placed(models.abstract_params(stage), partition.replicated(plan.mesh))
    keys = _placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)), split)
    batch = _placed(stage.batch_spec(count), split)
    with partition.use_mesh(plan.mesh):
        lowered = jax.jit(stage.sample, out_shardings=split).lower(params, keys, batch)
    arithmetic = flops.count(stage.sample, params, keys, batch)
    return lowered, arithmetic, (params, keys, batch)


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
    setup = Setup(config, topology, sample)
    plan = setup.plan()
    if sample is not None:
        lowered, arithmetic, arguments = lower_sampler(plan, sample)
    else:
        lowered, arithmetic, arguments = lower_step(_with_clip(plan, clip_config) if clip_config else plan)
    leaves = jax.tree.leaves(arguments)
    devices = list(plan.mesh.devices.flat)
    report = Report(
        program=f"{config['stage']}, {'a training step' if sample is None else 'drawing'}",
        chips=len(devices),
        device=devices[0].device_kind,
        mesh=dict(plan.mesh.shape),
        batch_size=config["batch_size"] if sample is None else sample,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(models.abstract_params(plan.stage))),
        arguments=sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves),
        memory=chips.memory_of(devices[0]),
        model_flops=arithmetic,
        peak=metrics.peak_flops(devices[0].device_kind),
    )
    began = time.monotonic()
    try:
        compiled, refusal = lowered.compile(partition.compiler_options(mesh=plan.mesh)), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, str(error)
    report = dataclasses.replace(report, compile_seconds=time.monotonic() - began)
    if compiled is None:
        report = refused_report(report, refusal)
    else:
        text = compiled.as_text() or ""
        if hlo_path:
            epath.Path(hlo_path).write_text(text)
        report = compiled_report(report, compiled, text, chips.chip_of(devices[0]))
    return dataclasses.replace(report, advice=advise(report, setup, partition.num_slices(devices)))

"""A training step, or a program that draws, compiled for described devices or for those of this machine."""

import dataclasses
import math
import runpy
import time
from collections.abc import Mapping

import jax
from etils import epath

from dalle2_jax.models import flops, models
from dalle2_jax.models.stages import code_sampling
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


def with_frozen(plan: Plan, recipes: Mapping[str, str]) -> Plan:
    """The plan with the frozen stages that recipes describe, name -> file."""
    stages = dict(plan.frozen_stages)
    for name, path in recipes.items():
        config = models.to_plain(runpy.run_path(commandline.recipe_file(path))["get_config"]())
        stages[name] = stage = models.build_stage(config)
        width = getattr(plan.stage, "embed_dim", 0)
        if name == "clip" and width not in (0, stage.embed_dim):  # 0: it reads no embedding
            raise ValueError(f"{path} has embeddings of {stage.embed_dim} entries, the stage reads {width}")
        code_sampling.check_codes(
            plan.stage, path, *(getattr(stage, x, None) for x in ("grids", "num_codes"))
        )
    plan = dataclasses.replace(plan, frozen_stages=stages)
    used = {encoder.owner for encoder in plan.frozen.encoders} | {*getattr(plan.stage, "uses", ())}
    if unused := sorted(recipes.keys() - used):
        raise ValueError(f"stage {plan.config['stage']!r} reads nothing of {', '.join(unused)}: leave it out")
    return plan


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
    frozen: Mapping[str, str] | None = None,
    sample: int | None = None,
    hlo_path: str | None = None,
) -> Report:
    """Compile the training step of `config` (plain JSON types), or its sampler for `sample` examples.

    topology: see `chips.topology_devices`; None: the devices of this machine. frozen: name -> config file of
    the frozen stages that are part of the step. hlo_path: a file for the compiled program's text.

    Raises ValueError for settings that do not fit together, before anything is compiled.
    """
    setup = Setup(config, topology, sample)
    plan = setup.plan()
    if sample is not None and frozen:
        raise ValueError("--frozen and --clip are of a training step: leave --sample out")
    if sample is not None:
        lowered, arithmetic, arguments = lower_sampler(plan, sample)
    else:
        lowered, arithmetic, arguments = lower_step(with_frozen(plan, frozen or {}))
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

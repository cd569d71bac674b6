"""A `Plan` is what a training step computes, and on which devices: no data, no workdir, no state.

Training makes one first; preflight and benchmark make a plan alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from dalle2_jax.models import models, trainable
from dalle2_jax.models.frozen import Frozen, paths
from dalle2_jax.models.nets import cpu
from dalle2_jax.runtime import machine, partition
from dalle2_jax.train import checks, optim
from dalle2_jax.train.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a training step computes, and on which devices. Nothing is computed until it is asked for.

    Attributes:
      config: the run's settings, plain JSON types.
      stage: the stage that is trained.
      mesh: of all devices.
      frozen_stages: name -> frozen stage.
    """

    config: dict
    stage: Any
    mesh: Mesh
    frozen_stages: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """What the frozen stages compute for the stage."""
        return Frozen(self.stage, self.frozen_stages)

    @property
    def trainable(self) -> Sequence[str]:
        """Patterns of the parameters that are trained; none: all."""
        return self.config.get("trainable") or ()

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Of config.optim."""
        return optim.make_optimizer(**self.config["optim"], num_steps=self.config["num_steps"])

    @functools.cached_property
    def _init(self):
        """() -> TrainState."""
        return functools.partial(
            init_state,
            self.stage,
            self.optimizer,
            jax.random.key(self.config["seed"]),
            models.zeros(self.stage.batch_spec(1)),
            self.config["spike_sigma"],
            self.trainable,
        )

    def _placed(self, shapes):
        """Shapes with the shardings of parameters."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            partition.shardings(shapes, self.mesh),
        )

    @functools.cached_property
    def abstract(self) -> TrainState:
        """The train state as ShapeDtypeStructs with shardings."""
        return self._placed(jax.eval_shape(self._init))

    @functools.cached_property
    def abstract_frozen(self) -> dict[str, dict]:
        """The parameters that a step gets beside the state, in float32, as ShapeDtypeStructs with shardings:
        those of frozen stages, and in 'base' the stage's own that rest."""
        found = {name: models.abstract_params(stage) for name, stage in self.frozen_stages.items()}
        if self.trainable:
            found[trainable.BASE] = trainable.split(models.abstract_params(self.stage), self.trainable)[1]
        return self._placed(found)

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf of the train state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    def init(self) -> TrainState:
        """The state before the first step. Parameters are born sharded: no device ever holds all of them."""
        options = partition.compiler_options(once=True)
        return jax.jit(self._init, out_shardings=self.shardings, compiler_options=options)()

    def jit_step(self):
        """The training step, (state, batch, frozen_params) -> (state, scalars), jitted; the state is
        donated."""
        train_step = make_train_step(
            self.stage,
            self.optimizer,
            seed=self.config["seed"],
            ema_decay=self.config["ema_decay"],
            spike_sigma=self.config["spike_sigma"],
            grad_accum=self.config["grad_accum"],
            frozen=self.frozen,
        )
        if self.config.get("cpu_products") == "bfloat16":
            train_step = cpu.with_bfloat16_products(train_step)
        return jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(self.shardings, partition.replicated(self.mesh)),
            compiler_options=partition.compiler_options(mesh=self.mesh),
        )


def cpu_products(config: Mapping, mesh: Mesh) -> str:
    """Of config.cpu_products, or where that is empty of these devices: 'bfloat16' on CPUs that multiply
    faster in it, else 'float32'."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    fast = on_cpu and jax.process_count() == 1 and machine.has_fast_bfloat16()
    return config.get("cpu_products") or ("bfloat16" if fast else "float32")


def make_plan(config: dict, *, devices: list | None = None, sample: int | None = None) -> Plan:
    """The plan of `config`, checked. Of the frozen stages it has those that the stage's loss calls; what the
    others compute may be given in a batch. The plan's config has `cpu_products` filled in.

    devices: None for those of this machine. sample: check for drawing so many examples, not for training.
    Raises ValueError for settings that cannot go together; nothing is compiled.
    """
    checks.check_names(config)
    mesh = partition.make_mesh(**config["mesh"], devices=devices)
    config = config | {"cpu_products": cpu_products(config, mesh)}
    stage, found = models.build_stage(config), paths(config)
    if sample is None:
        checks.check_settings(config, stage, mesh)
    elif not hasattr(stage, "sample"):
        raise ValueError(f"stage {config['stage']!r} does not draw: leave --sample out")
    else:
        partition.check_batch_size(sample, mesh, "--sample")
    used = getattr(stage, "uses", ()) if sample is None else ()
    for name in used:
        if name not in found:
            raise ValueError(f"stage {config['stage']!r} uses a {name}: give --config.frozen.{name}=PATH")
    return Plan(config, stage, mesh, {name: models.open_stage(found[name], name)[0] for name in used})

"""A `Plan` is what a training step computes, and on which devices: no data, no workdir, no state.

Training makes one first; preflight and benchmark make a plan alone.
"""

import dataclasses
import functools

import jax
import optax
from jax.sharding import Mesh

from dalle2_jax.models import models
from dalle2_jax.runtime import partition
from dalle2_jax.train import checks, optim
from dalle2_jax.train.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a training step computes, and on which devices. Nothing is computed until it is asked for.

    Attributes:
      config: the run's settings, plain JSON types.
      stage: the stage that is trained.
      mesh: of all devices.
      clip: the frozen CLIP that fills embeddings into batches; None: no CLIP.
    """

    config: dict
    stage: object
    mesh: Mesh
    clip: models.FrozenClip | None = None

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
        )

    @functools.cached_property
    def abstract(self) -> TrainState:
        """The train state as ShapeDtypeStructs with shardings."""
        shapes = jax.eval_shape(self._init)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            partition.shardings(shapes, self.mesh),
        )

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf of the train state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    def init(self) -> TrainState:
        """The state before the first step. Parameters are born sharded: no device ever holds all of them."""
        options = partition.compiler_options(once=True)
        return jax.jit(self._init, out_shardings=self.shardings, compiler_options=options)()

    def fill(self, frozen: dict, batch: dict) -> dict:
        """`batch` with what the stage reads of the CLIP, whose parameters are `frozen`; {} without one."""
        return batch if self.clip is None else self.clip.fill(frozen, batch, set(self.stage.batch_spec(1)))

    def jit_step(self):
        """The training step, (state, batch, frozen) -> (state, scalars), jitted; the state is donated."""
        train_step = make_train_step(
            self.stage,
            self.optimizer,
            seed=self.config["seed"],
            ema_decay=self.config["ema_decay"],
            spike_sigma=self.config["spike_sigma"],
            grad_accum=self.config["grad_accum"],
            fill=self.fill,
        )
        return jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(self.shardings, partition.replicated(self.mesh)),
            compiler_options=partition.compiler_options(mesh=self.mesh),
        )


def make_plan(config: dict, *, devices: list | None = None, sample: int | None = None) -> Plan:
    """The plan of `config`, checked, without a CLIP.

    devices: None for those of this machine. sample: check for drawing so many examples, not for training.
    Raises ValueError for settings that cannot go together; nothing is compiled.
    """
    checks.check_names(config)
    mesh = partition.make_mesh(**config["mesh"], devices=devices)
    stage = models.build_stage(config)
    if sample is None:
        checks.check_settings(config, stage, mesh)
    elif not hasattr(stage, "sample"):
        raise ValueError(f"stage {config['stage']!r} does not draw: leave --sample out")
    else:
        partition.check_batch_size(sample, mesh, "--sample")
    return Plan(config, stage, mesh)

"""TrainState and the one train step, the same for every stage.

The PRNG is fold_in(key(seed), step), so there is no random state to save. Parameters, their average and the
optimizer are float32 and sharded alike. A step whose loss or gradient is not finite changes nothing but the
counters of such steps, which are part of the state, so that the host may look at them now and then and misses
none.

Spikes are skipped likewise where `spike_sigma` is above 0. A step is a spike if its loss or its gradient's
norm is above mean + spike_sigma * (standard deviation) of the last SPIKE_WINDOW finite steps that were not
skipped, once SPIKE_HISTORY of these are known (the window of 128 and the half of it are those of levanter and
OLMo, as are six deviations). At most SPIKES_IN_A_ROW are skipped one after the other: what stays up is a new
level and no spike.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dalle2_jax.models import trainable
from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.stages import Loss

SPIKE_WINDOW, SPIKE_HISTORY, SPIKES_IN_A_ROW = 128, 64, 8
MAX_BAD_STEPS = 8  # non-finite steps in a row that are a streak, which ends a run
# Leaves that checkpoints of older runs lack, or that a setting adds later: all of them begin at zero.
ZERO_AT_FIRST = ("bad_total", "bad_streak", "spikes")
_UPDATE = 0x757064  # folded into a step's key for a stage's `update`; losses fold in small numbers


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step.

    params: the trained ones, see `trainable`; ema_params and opt_state are of these.
    bad_steps: non-finite steps in a row. bad_total: of the whole run. bad_streak: the number of the step that
    was the last MAX_BAD_STEPS-th in a row, 0 for none. spikes: what the rule for spikes remembers, {} where
    there is none.
    """

    step: jax.Array
    params: dict
    ema_params: dict
    opt_state: optax.OptState
    bad_steps: jax.Array
    bad_total: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    bad_streak: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    spikes: dict = dataclasses.field(default_factory=dict)


def init_state(
    stage,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch: dict,
    spike_sigma: float = 0.0,
    patterns: Sequence[str] = (),
) -> TrainState:
    """The state before the first step; the average starts at the parameters. patterns: config.trainable."""
    params, _ = trainable.split(stage.init(key, batch), patterns)
    # No two leaves may share a buffer: the step donates its state.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        bad_steps=jnp.zeros((), jnp.int32),
        spikes=_no_spikes() if spike_sigma else {},
    )


def _no_spikes() -> dict:
    """The memory of the rule for spikes before the first step: the last losses and norms, and counters."""
    return {
        "loss": jnp.zeros(SPIKE_WINDOW, jnp.float32),
        "grad_norm": jnp.zeros(SPIKE_WINDOW, jnp.float32),
        "known": jnp.zeros((), jnp.int32),  # steps that were ever entered above
        "in_a_row": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def _judge(spikes: dict, sigma: float, finite: jax.Array, **values: jax.Array) -> tuple[jax.Array, dict]:
    """(whether a step with these values is a spike to skip, the memory after it)."""
    count = jnp.minimum(spikes["known"], SPIKE_WINDOW)
    there, above = jnp.arange(SPIKE_WINDOW) < count, jnp.zeros((), bool)
    for name, value in values.items():
        mean = jnp.where(there, spikes[name], 0).sum() / jnp.maximum(count, 1)
        variance = jnp.where(there, jnp.square(spikes[name] - mean), 0).sum() / jnp.maximum(count - 1, 1)
        above |= value > mean + sigma * jnp.sqrt(variance)
    spike = finite & above & (count >= SPIKE_HISTORY)
    skip = spike & (spikes["in_a_row"] < SPIKES_IN_A_ROW)
    entered = finite & ~skip
    place = spikes["known"] % SPIKE_WINDOW
    after = {
        name: jnp.where(entered, spikes[name].at[place].set(value.astype(jnp.float32)), spikes[name])
        for name, value in values.items()
    }
    after["known"] = spikes["known"] + entered
    after["in_a_row"] = jnp.where(spike, spikes["in_a_row"] + 1, jnp.where(finite, 0, spikes["in_a_row"]))
    after["skipped"] = spikes["skipped"] + skip
    return skip, after


def ema_decay_at(step: jax.Array, ema_decay: float) -> jax.Array:
    """min(ema_decay, (1 + step) / (10 + step)): short runs average over what they have (Karras et al.,
    TensorFlow's EMA)."""
    step = step.astype(jnp.float32)
    return jnp.minimum(ema_decay, (1 + step) / (10 + step))


def is_statistic(path: tuple) -> bool:
    """Whether the parameter at a key path of jax.tree_util is a statistic: (^|/)stats/ in its name."""
    return any(getattr(key, "key", None) == "stats" for key in path[:-1])


def _value_and_grad(frozen: Frozen, frozen_params: dict, step: jax.Array) -> Callable:
    """Returns f(params, key, batch) -> ((loss, (scalars, statistics)), gradients); f encodes the batch."""

    def loss_of(params, key, batch):
        held = jax.tree_util.tree_map_with_path(
            lambda path, p: jax.lax.stop_gradient(p) if is_statistic(path) else p, params
        )
        held, keywords = frozen.whole(held, frozen_params), frozen.loss_keywords(frozen_params)
        loss = frozen.stage.loss(held, key, batch, step=step, train=True, **keywords)
        return loss.value, (loss.scalars, loss.statistics)

    def value_and_grad(params, key, batch):
        batch = frozen.encode_batch(frozen_params, batch)
        return jax.value_and_grad(loss_of, has_aux=True)(params, key, batch)

    return value_and_grad


def _accumulated(value_and_grad: Callable, params, key, batch, grad_accum: int) -> tuple[Loss, dict]:
    """(the loss with statistics stacked [grad_accum, ...], the gradients) of a batch, in `grad_accum` parts
    one after the other."""
    if grad_accum == 1:
        (value, (scalars, statistics)), grads = value_and_grad(params, key, batch)
        return Loss(value, scalars, jax.tree.map(lambda x: x[None], statistics)), grads
    # Part i takes every grad_accum-th example, so that a batch sharded over devices stays where it is.
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, grad_accum, *x.shape[1:]), 0, 1), batch)

    def add(total, part):
        (value, (scalars, statistics)), grads = value_and_grad(params, *part)
        return jax.tree.map(jnp.add, total, (value, scalars, grads)), statistics

    keys = jax.random.split(key, grad_accum)
    shapes = jax.eval_shape(lambda p: value_and_grad(p, keys[0], jax.tree.map(lambda x: x[0], parts)), params)
    (value, (scalars, _)), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, statistics = jax.lax.scan(add, (value, scalars, grads), (keys, parts))
    value, scalars, grads = jax.tree.map(lambda x: x / grad_accum, total)
    return Loss(value, scalars, statistics), grads


def make_train_step(
    stage,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    grad_accum: int = 1,
    spike_sigma: float = 0.0,
    frozen: Frozen | None = None,
) -> Callable:
    """train_step(state, batch, frozen_params) -> (state, scalars), to be jitted with `state` donated.

    A stage that has `update(params, statistics, key)` changes its parameters after the optimizer (CLIP's
    temperature, the decoder's history of L_vlb). The optimizer leaves statistics as they are, and the average
    copies them: see `is_statistic`.

    Args:
      stage, optimizer: what `init_state` made the state of. seed: of all draws.
      ema_decay: see `ema_decay_at`.
      grad_accum: the parts of a batch, which are encoded and differentiated one after the other.
      spike_sigma: see the module; the state must come from `init_state` with the same.
      frozen: the frozen stages of `stage`; None: there are none. Their parameters are an argument, never a
        constant in a closure.
    """
    frozen = Frozen(stage) if frozen is None else frozen

    def train_step(state: TrainState, batch: dict, frozen_params: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value_and_grad = _value_and_grad(frozen, frozen_params, state.step)
        (loss, scalars, statistics), grads = _accumulated(
            value_and_grad, state.params, key, batch, grad_accum
        )
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if hasattr(stage, "update"):
            whole, more = stage.update(
                frozen.whole(params, frozen_params), statistics, jax.random.fold_in(key, _UPDATE)
            )
            params, scalars = trainable.like(whole, params), scalars | more
        decay = ema_decay_at(state.step, ema_decay)
        ema_params = jax.tree_util.tree_map_with_path(
            lambda path, e, p: p if is_statistic(path) else e + (1 - decay) * (p - e),
            state.ema_params,
            params,
        )
        taken, spikes = finite, state.spikes
        if spike_sigma:
            skipped, spikes = _judge(spikes, spike_sigma, finite, loss=loss, grad_norm=grad_norm)
            taken = finite & ~skipped
            scalars = scalars | {"spikes": spikes["skipped"]}

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)

        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema_params=keep(ema_params, state.ema_params),
            opt_state=keep(opt_state, state.opt_state),
            bad_steps=bad_steps,
            bad_total=state.bad_total + ~finite,
            bad_streak=jnp.where(bad_steps == MAX_BAD_STEPS, state.step + 1, state.bad_streak),
            spikes=spikes,
        )
        counters = {name: getattr(state, name) for name in ("bad_steps", "bad_total", "bad_streak")}
        return state, dict(scalars, loss=loss, grad_norm=grad_norm, **counters)

    return train_step

"""The train step: its average of the parameters, accumulation of gradients, and steps that are not finite."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.stages import Loss
from dalle2_jax.train import optim
from dalle2_jax.train.step import MAX_BAD_STEPS, SPIKES_IN_A_ROW, TrainState, init_state, make_train_step

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Line:
    """A stage that fits batch['y'] by a two-layer network of batch['x']; with `noise` its loss is random."""

    noise: float = 0.0

    def init(self, key, batch):
        a, b = jax.random.split(key)
        return {"one": jax.random.normal(a, (3, 4)), "two": {"kernel": jax.random.normal(b, (4, 2))}}

    def loss(self, params, key, batch, *, step=0, train=True):
        draw = jax.random.normal(key)
        out = jnp.tanh(batch["x"] @ params["one"]) @ params["two"]["kernel"]
        loss = jnp.square(out - batch["y"]).mean() + self.noise * draw * params["one"].sum()
        return Loss(loss, {"size": jnp.abs(out).mean(), "draw": draw, "draw_squared": draw**2})


class Bounded(Line):
    """Its parameters are kept at 0.01 or below, as CLIP's temperature is kept at 100."""

    def update(self, params, statistics, key):
        return jax.tree.map(lambda p: jnp.minimum(p, 0.01), params), {}


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((size, 3)).astype(np.float32),
        "y": rng.standard_normal((size, 2)).astype(np.float32),
    }


OPTIMIZER = optim.make_optimizer(learning_rate=1e-2, num_steps=100)


def start(stage=None, optimizer=OPTIMIZER):
    return init_state(stage or Line(), optimizer, KEY, batch_of(8))


@functools.cache
def step_of(stage=None, **options):
    """train_step(state, batch, frozen={}), compiled once for all tests."""
    settings = dict(seed=0, ema_decay=0.9) | options
    step = jax.jit(make_train_step(stage or Line(), OPTIMIZER, **settings))
    return lambda train_state, batch, frozen=None: step(train_state, batch, frozen or {})


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(
        (np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


# --- the average ---


def test_the_average_starts_at_the_parameters_but_is_no_alias():
    """The step donates its state: a buffer that is there twice cannot be donated."""
    first = start()
    assert_equal(first.params, first.ema_params)
    pairs = zip(jax.tree.leaves(first.params), jax.tree.leaves(first.ema_params), strict=True)
    assert all(a is not b for a, b in pairs)
    donating = jax.jit(make_train_step(Line(), OPTIMIZER, seed=0, ema_decay=0.9), donate_argnums=0)
    assert donating(first, batch_of(8), {})[0].step == 1


@pytest.mark.parametrize(
    "decay, first_step, number", [(0.9999, 10**6, 1000), (0.9999, 0, 500), (0.9, 0, 300)]
)
def test_the_average_has_its_closed_form(decay, first_step, number):
    """Trap 18. Of parameters that stay at 2, an average that starts at 1 is 2 - prod d_k after n steps, with
    d_k = min(decay, (1 + k) / (10 + k)).

    The product of (1 + k) / (10 + k) over k < m is m! 9! / (m + 9)!; decay takes over at the first k with
    (1 - decay) k >= 10 decay - 1. In bfloat16 the average would stay at 1 for good: 0.9999 rounds to 1.
    """
    frozen = optax.sgd(0.0)
    train_step = make_train_step(Line(), frozen, seed=0, ema_decay=decay)
    ones = jax.tree.map(jnp.ones_like, start(optimizer=frozen).params)
    begin = TrainState(
        jnp.int32(first_step), jax.tree.map(lambda x: 2 * x, ones), ones, frozen.init(ones), jnp.int32(0)
    )
    batch = batch_of(2)
    run = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: (train_step(s, batch, {})[0], None), s, length=number)[0]
    )
    end = run(begin)
    assert end.step == first_step + number
    crossing = max(0, math.ceil((10 * decay - 1) / (1 - decay) - 1e-6) - first_step)
    warm = min(crossing, number)
    product = math.exp(math.lgamma(warm + 1) + math.lgamma(10) - math.lgamma(warm + 10)) * decay ** (
        number - warm
    )
    for leaf in jax.tree.leaves(end.ema_params):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, 2 - product, rtol=1e-4)
    if first_step:
        np.testing.assert_allclose(2 - product, 1.09517, atol=1e-5)


def test_the_average_follows_moving_parameters():
    train_state, train_step, decay = start(), step_of(ema_decay=0.5), 0.5
    expected = jax.tree.map(np.float64, train_state.params)
    for k in range(12):
        train_state, _ = train_step(train_state, batch_of(8, seed=k))
        d = min(decay, (1 + k) / (10 + k))
        expected = jax.tree.map(
            lambda e, p, d=d: d * e + (1 - d) * np.float64(p), expected, train_state.params
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), train_state.ema_params, expected)
    assert differ(train_state.ema_params, train_state.params)


# --- accumulation ---


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(grad_accum):
    whole, whole_scalars = step_of()(start(), batch_of(8))
    parts, scalars = step_of(grad_accum=grad_accum)(start(), batch_of(8))
    for name in ("loss", "grad_norm", "size"):
        np.testing.assert_allclose(scalars[name], whole_scalars[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parts, whole)
    assert differ(whole.params, start().params)


def test_parts_draw_different_noise():
    """The variance of the parts' draws is the mean of squares less the square of the mean."""
    _, scalars = step_of(grad_accum=4)(start(), batch_of(8))
    assert scalars["draw_squared"] - scalars["draw"] ** 2 > 1e-3


def test_noise_is_a_function_of_seed_and_step():
    train_step, other_seed = step_of(), step_of(seed=1)
    first, scalars = train_step(start(), batch_of(8))
    assert train_step(start(), batch_of(8))[1]["draw"] == scalars["draw"]
    assert train_step(first, batch_of(8))[1]["draw"] != scalars["draw"]
    assert other_seed(start(), batch_of(8))[1]["draw"] != scalars["draw"]


# --- steps that are not finite ---


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value, grad_accum):
    train_step, good = step_of(grad_accum=grad_accum), batch_of(8)
    before, _ = train_step(start(), good)
    bad = batch_of(8) | {"y": np.where(np.arange(16).reshape(8, 2) == 5, np.float32(value), good["y"])}
    after = before
    for count in (1, 2):
        after, scalars = train_step(after, bad)
        assert_equal(
            (after.params, after.ema_params, after.opt_state),
            (before.params, before.ema_params, before.opt_state),
        )
        assert after.bad_steps == scalars["bad_steps"] == count
        assert after.step == before.step + count  # the next step draws other noise and reads the next batch
    recovered, scalars = train_step(after, good)
    assert recovered.bad_steps == scalars["bad_steps"] == 0
    assert np.isfinite(scalars["loss"]) and differ(recovered.params, before.params)
    # But for the average's warm-up, which counts steps, it is as if the bad ones had never been.
    expected, _ = train_step(before, good)
    assert_equal((recovered.params, recovered.opt_state), (expected.params, expected.opt_state))


def test_bad_steps_are_counted_one_by_one_and_in_streaks():
    """Isolated ones leave a trace, and so does a streak that has ended: its eighth step is remembered."""
    train_step, good = step_of(), batch_of(8)
    bad = good | {"y": np.full((8, 2), np.nan, np.float32)}
    lengths, train_state = (1, MAX_BAD_STEPS - 1, MAX_BAD_STEPS + 2, 3), start()
    for length in lengths:
        for batch in [bad] * length + [good]:
            train_state, scalars = train_step(train_state, batch)
    assert train_state.bad_steps == scalars["bad_steps"] == 0
    assert train_state.bad_total == scalars["bad_total"] == sum(lengths)
    # steps 1 and 2, then 8, then 8 of the third streak: it alone is long enough
    assert train_state.bad_streak == scalars["bad_streak"] == 2 + MAX_BAD_STEPS + MAX_BAD_STEPS
    assert train_state.bad_total.dtype == train_state.bad_streak.dtype == jnp.int32


class Root(Line):
    """sqrt has an infinite slope at 0: the loss is finite where its gradient is not."""

    def loss(self, params, key, batch, *, step=0, train=True):
        return Loss(jnp.sqrt(jnp.square(params["one"] * batch["x"][0, 0]).sum()))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_caught():
    batch = batch_of(8) | {"x": np.zeros((8, 3), np.float32)}
    after, scalars = step_of(Root())(start(), batch)
    assert np.isfinite(scalars["loss"]) and not np.isfinite(scalars["grad_norm"])
    assert_equal(after.params, start().params)
    assert after.bad_steps == 1


def unchanging(train_state):
    """What a step that is not taken leaves alone."""
    return train_state.params, train_state.ema_params, train_state.opt_state


class Half(Line):
    """Computes in bfloat16 and is above its largest number, 3.39e38, where the batch says so (R18)."""

    def loss(self, params, key, batch, *, step=0, train=True):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        out = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ half["one"]) @ half["two"]["kernel"]
        square = jnp.square(out - batch["y"].astype(jnp.bfloat16))
        return Loss(square.mean().astype(jnp.float32))


def test_an_overflow_of_bfloat16_is_a_step_that_is_not_finite():
    train_step, good = step_of(Half()), batch_of(8)
    after, scalars = train_step(start(), good | {"y": np.full((8, 2), 2.0**66, np.float32)})
    assert np.isposinf(scalars["loss"]) and after.bad_steps == 1
    assert_equal(
        (after.params, after.ema_params, after.opt_state), (start().params, start().params, start().opt_state)
    )
    assert differ(train_step(after, good)[0].params, start().params)


# --- spikes ---


def spiked(count: int, size: float = 0.0) -> dict:
    """A batch for step `count`, whose losses vary a little; `size` is added to all that is asked for."""
    batch = batch_of(8)
    return batch | {"y": batch["y"] + np.float32(size + 0.01 * (count % 7))}


def spike_run(sizes, sigma=6.0):
    """(states, scalars) after each of so many steps."""
    train_step = step_of(spike_sigma=sigma)
    train_state = init_state(Line(), OPTIMIZER, KEY, batch_of(8), sigma)
    states, scalars = [], []
    for count, size in enumerate(sizes):
        train_state, told = train_step(train_state, spiked(count, size))
        states.append(train_state)
        scalars.append(jax.device_get(told))
    return states, scalars


def test_a_spike_is_skipped_once_there_is_a_history_of_64_steps():
    states, scalars = spike_run([0] * 63 + [30] + [0] * 10 + [30] + [0])
    losses = [float(told["loss"]) for told in scalars]
    assert losses[63] > 100 * losses[62] and losses[74] > 100 * losses[73]
    assert scalars[63]["spikes"] == 0 and differ(states[63].params, states[62].params)  # too early to tell
    # The window holds that first one, so the next has to be larger still: half of it is above six deviations.
    window = np.array(losses[:74])
    bound = window.mean() + 6 * window.std(ddof=1)
    assert (losses[74] > bound) == bool(scalars[74]["spikes"]) and losses[74] > bound


def test_a_skipped_step_changes_nothing_and_is_forgotten():
    states, scalars = spike_run([0] * 70 + [30] + [0] * 2)
    norms = [float(told["grad_norm"]) for told in scalars]
    losses = np.array([float(told["loss"]) for told in scalars])
    assert losses[70] > losses[:70].mean() + 6 * losses[:70].std(ddof=1)
    before, after = states[69], states[70]
    assert scalars[70]["spikes"] == 1 and after.bad_steps == 0 and after.step == before.step + 1
    assert_equal(
        (after.params, after.ema_params, after.opt_state),
        (before.params, before.ema_params, before.opt_state),
    )
    assert after.spikes["known"] == before.spikes["known"] == 70
    assert_equal(
        (after.spikes["loss"], after.spikes["grad_norm"]), (before.spikes["loss"], before.spikes["grad_norm"])
    )
    np.testing.assert_allclose(after.spikes["grad_norm"][:70], norms[:70], rtol=1e-6)
    assert differ(states[71].params, after.params) and states[71].spikes["in_a_row"] == 0
    assert scalars[72]["spikes"] == 1
    # Without the rule the step is taken; without a spike the rule changes nothing.
    assert differ(spike_run([0] * 70 + [30], sigma=0.0)[0][-1].params, before.params)
    assert_equal(spike_run([0] * 70, sigma=0.0)[0][-1].params, before.params)


def test_what_stays_up_is_a_new_level_and_no_spike():
    states, scalars = spike_run([0] * 70 + [30] * 12)
    skipped = np.diff([int(told["spikes"]) for told in scalars])[69:]
    assert skipped.tolist() == [1] * SPIKES_IN_A_ROW + [0] * (12 - SPIKES_IN_A_ROW)
    assert differ(states[-1].params, states[69].params)


def test_a_step_that_is_not_finite_is_no_spike_and_not_remembered():
    states, scalars = spike_run([0] * 70 + [np.nan, 0])
    assert scalars[70]["bad_steps"] == 1 and scalars[70]["spikes"] == 0
    assert states[70].spikes["known"] == 70 and np.isfinite(states[70].spikes["loss"]).all()
    assert states[71].spikes["known"] == 71


# --- the rest of a step ---


def test_a_stage_updates_parameters_after_the_optimizer_and_before_the_average():
    train_state, _ = step_of(Bounded())(start(), batch_of(8))
    free, _ = step_of()(start(), batch_of(8))
    assert max(leaf.max() for leaf in jax.tree.leaves(free.params)) > 0.1
    assert_equal(train_state.params, Bounded().update(free.params, {}, KEY)[0])
    expected = jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, start().params, train_state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), train_state.ema_params, expected)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_frozen_stages_encode_each_part_of_a_batch(grad_accum):
    seen = []

    class Gain(Frozen):
        def encode_batch(self, params, batch):
            seen.append(batch["z"].shape[0])
            return {"x": batch["z"] * params["gain"], "y": batch["y"]}

    batch = batch_of(8)
    given = {"z": batch["x"] / 4, "y": batch["y"]}
    step = step_of(frozen=Gain(Line()), grad_accum=grad_accum)
    encoded, _ = step(start(), given, {"gain": jnp.float32(4)})
    assert_equal(encoded, step_of(grad_accum=grad_accum)(start(), batch)[0])
    assert set(seen) == {8 // grad_accum}


def test_everything_is_float32_whatever_the_batch_is():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), batch_of(8))
    train_state, _ = step_of()(start(), half)
    leaves = jax.tree.leaves((train_state.params, train_state.ema_params, train_state.opt_state))
    assert {leaf.dtype for leaf in leaves} <= {jnp.dtype("float32"), jnp.dtype("int32")}

"""PixelSNAIL priors: no code sees itself or a later one; the level below follows the one above."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.stages import pixelsnail
from dalle2_jax.models.stages.code_sampling import kept
from tests.models.stages.test_token_model import example_codes, parameters

NET = dict(width=8, hidden=8, num_blocks=1, num_res_blocks=1, num_heads=2, kernel=3, out_blocks=1)
GRIDS, NUM_CODES = ((2, 2), (4, 4)), (5, 7)
KEYS = jax.random.split(jax.random.key(3), 4)


@functools.cache
def model():
    stage = pixelsnail.build(
        grids=GRIDS,
        num_codes=NUM_CODES,
        nets=(NET, NET | dict(upper_blocks=1)),
        num_classes=3,
        label_drop=0.1,
    )
    batch = {"codes": example_codes(GRIDS, NUM_CODES, 4), "label": np.array([0, 2, -1, 1], np.int32)}
    return stage, parameters(stage), batch


@functools.cache
def logits_of(level):
    """(codes [4, h, w], the level above, label) -> logits, compiled once for each level."""
    stage, params, _ = model()

    def logits(codes, upper, label=0):
        return stage._logits(params, level, codes, upper, jnp.full(len(codes), label))

    return jax.jit(logits)


@functools.cache
def drawing():
    """(keys, batch, forced, guidance_scale) -> codes at temperature 0.8, compiled once."""
    stage, params, _ = model()
    return jax.jit(
        lambda keys, batch, forced, scale: stage._draw(
            params, keys, batch, forced, guidance_scale=scale, temperature=0.8
        )
    )


@pytest.mark.parametrize("level", [0, 1])
def test_a_code_depends_on_those_before_it_and_on_the_level_above(level):
    """Brute force: every code is changed in turn, and reaches all later logits but not its own."""
    stage, _, batch = model()
    maps = [x[:1] for x in stage._split(batch["codes"])]
    codes, upper = maps[level], maps[0] if level else None
    count = codes.size
    changed = np.repeat(codes.reshape(1, -1), count, axis=0)
    changed[np.arange(count), np.arange(count)] = (codes.reshape(-1) + 1) % NUM_CODES[level]
    uppers = None if upper is None else np.repeat(upper, count, axis=0)
    before = np.asarray(logits_of(level)(np.repeat(codes, count, axis=0), uppers))
    after = np.asarray(logits_of(level)(changed.reshape(count, *codes.shape[1:]), uppers))
    moved = np.abs(after - before).max(axis=-1).reshape(count, count) > 1e-7  # [changed, code]
    assert not np.tril(moved).any()
    if level == 0:  # attention reaches every later code
        assert moved.sum() == count * (count - 1) // 2
    else:  # convolutions of 3 reach the next one, unless a row ends
        within = np.arange(1, count) % GRIDS[1][1] > 0
        assert np.diagonal(moved, 1)[within].all()
        other = logits_of(level)(np.repeat(codes, count, axis=0), (uppers + 1) % NUM_CODES[0])
        assert (np.abs(np.asarray(other) - before).max(axis=-1) > 1e-7).all()


def test_a_sample_follows_from_its_own_key_and_the_logits_of_the_whole_map():
    """Guided: the logits are u + s (c - u), of the class and of none."""
    stage, _, batch = model()
    batch = {"codes": batch["codes"], "label": np.zeros(4, np.int32)}
    free = np.full(batch["codes"].shape, -1)
    drawn = np.asarray(drawing()(KEYS, batch, free, 1.5))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(drawing()(KEYS[order], batch, free, 1.5), drawn[order])
    top, bottom = stage._split(drawn)
    for level, codes, upper in ((0, top, None), (1, bottom, top)):
        c, u = (np.asarray(logits_of(level)(codes, upper, label)) for label in (0, -1))
        logits = (u + 1.5 * (c - u)).reshape(4, -1, NUM_CODES[level]) / 0.8
        for row, key in enumerate(KEYS):
            fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
            keys = fold(jax.random.fold_in(key, level), np.arange(logits.shape[1]))
            wanted = jax.vmap(jax.random.categorical)(keys, logits[row])
            np.testing.assert_array_equal(codes[row].reshape(-1), wanted)


def test_completed_maps_keep_their_first_rows():
    stage, _, batch = model()
    forced = kept(batch["codes"], GRIDS, 0.5)
    made = np.asarray(drawing()(KEYS, batch, forced, 1.5))
    for drawn, given in zip(stage._split(made), stage._split(batch["codes"]), strict=True):
        half = given.shape[1] // 2
        np.testing.assert_array_equal(drawn[:, :half], given[:, :half])
        assert (drawn[:, half:] != given[:, half:]).any()


def test_the_loss_is_the_mean_of_a_code():
    stage, params, batch = model()
    loss = jax.jit(functools.partial(stage.loss, train=False))(params, jax.random.key(0), batch)
    parts = loss.scalars["level0_loss"], loss.scalars["level1_loss"]
    np.testing.assert_allclose(loss.value, (4 * parts[0] + 16 * parts[1]) / 20, rtol=1e-6)


def test_a_prior_of_three_levels():
    """Each level reads the one above it and no other; all are drawn and completed in one row of codes."""
    grids, num_codes = ((1, 2), (2, 4), (4, 8)), (5, 7, 3)
    net = NET | dict(attention=False, out_blocks=0)
    nets = (net, net | dict(upper_blocks=1), net | dict(upper_blocks=1))
    stage = pixelsnail.build(grids=grids, num_codes=num_codes, nets=nets)
    params, codes = parameters(stage), example_codes(grids, num_codes, 4)
    maps = stage._split(codes)

    @jax.jit
    def compute(params, maps):
        pairs = zip(maps, [None, *maps[:-1]], strict=True)
        logits = [stage._logits(params, level, own, upper, None) for level, (own, upper) in enumerate(pairs)]
        row = jnp.concatenate([x.reshape(4, -1) for x in maps], axis=1)
        return logits, stage.loss(params, jax.random.key(0), {"codes": row})

    logits, loss = compute(params, maps)
    for level, count in enumerate(num_codes):
        other, _ = compute(params, [x if i != level else (x + 1) % count for i, x in enumerate(maps)])
        moved = [(np.abs(a - b) > 1e-6).any() for a, b in zip(other, logits, strict=True)]
        assert moved == [level <= i <= level + 1 for i in range(3)]
    parts = [loss.scalars[f"level{level}_loss"] for level in range(3)]
    np.testing.assert_allclose(loss.value, np.dot(parts, [2, 8, 32]) / 42, rtol=1e-6)
    forced = kept(codes, grids, 0.5)
    draw = jax.jit(functools.partial(stage._draw, guidance_scale=1, temperature=1e-6))
    made = np.asarray(draw(params, KEYS, {}, forced))
    greedy, _ = compute(params, stage._split(made))
    for drawn, x, given in zip(stage._split(made), greedy, stage._split(forced), strict=True):
        np.testing.assert_array_equal(drawn, np.where(given >= 0, given, np.argmax(x, axis=-1)))
    assert (np.asarray(forced) >= 0).sum() == 4 * (0 + 4 + 16)


def test_a_prior_of_no_class():
    """VQ-VAE's: one level, no label, no attention; guidance is without effect."""
    net = NET | dict(attention=False)
    stage = pixelsnail.build(grids=((3, 4),), num_codes=(5,), nets=(net,))
    params, codes = parameters(stage), example_codes(((3, 4),), (5,), 4)
    assert [*stage.batch_spec(1)] == ["codes"] and not stage.conditional

    @jax.jit
    def compute(params, codes):
        loss = stage.loss(params, jax.random.key(0), {"codes": codes}).value
        return loss, stage._logits(params, 0, stage._split(codes)[0], None, None)

    loss, logits = compute(params, codes)
    log_p = np.asarray(jax.nn.log_softmax(logits)).reshape(4, 12, 5)
    wanted = -np.take_along_axis(log_p, codes[..., None], axis=-1).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    drawn = np.asarray(jax.jit(functools.partial(stage.sample, guidance_scale=3.0))(params, KEYS, {}))
    assert drawn.shape == (4, 12) and len(np.unique(drawn, axis=0)) == 4
    wanted = [
        jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, 0), k), row[k])
        for key, row in zip(KEYS, np.asarray(compute(params, drawn)[1]).reshape(4, 12, 5), strict=True)
        for k in range(12)
    ]
    np.testing.assert_array_equal(drawn.ravel(), wanted)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(nets=(NET,)), "must have a value for each level"),
        (dict(grids=((3, 3), (4, 4))), "must be a multiple of the one above it"),
        (dict(nets=(NET | dict(kernel=4), NET)), "kernel 4 must be odd"),
        (dict(nets=(NET | dict(num_heads=3), NET)), "num_heads must divide half of its width 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pixelsnail.build(**dict(grids=GRIDS, num_codes=NUM_CODES, nets=(NET, NET)) | settings)

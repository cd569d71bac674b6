"""The token model: its loss by hand, the cache against the whole sequence, what a sample depends on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import layers
from dalle2_jax.models.stages import token_model
from dalle2_jax.models.stages.code_sampling import kept
from dalle2_jax.models.tokens.masks import rows

TEXT = dict(vocab_size=11, context_length=4)
NET = dict(width=16, num_heads=2)
KINDS = {"full": ("full",) * 2, "all": ("row", "column", "conv3")}
SIZE = 3


def build(kinds="all", grids=((3, 4),), num_codes=(7,), text=TEXT, **settings):
    net = NET | {"kinds": KINDS[kinds], "depth": len(KINDS[kinds])} | settings.pop("net", {})
    return token_model.build(grids=grids, num_codes=num_codes, net=net, text=text, **settings)


def example_codes(grids, num_codes, size, seed=0):
    """Random codes int32 [size, N] of all levels."""
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, k, (size, h * w)) for (h, w), k in zip(grids, num_codes, strict=True)]
    return np.concatenate(codes, axis=1).astype(np.int32)


def example(stage, size=SIZE, seed=0):
    """A batch of random fields; captions of different lengths."""
    rng, batch = np.random.default_rng(seed), {}
    batch["codes"] = example_codes(stage.grids, stage.num_codes, size)
    if stage.context_length:
        mask = np.arange(stage.context_length) < np.arange(2, 2 + size)[:, None]
        tokens = rng.integers(0, TEXT["vocab_size"], mask.shape)
        batch |= {"tokens": np.where(mask, tokens, 0).astype(np.int32), "token_mask": mask}
    elif stage.num_classes:
        batch["label"] = rng.integers(0, stage.num_classes, size).astype(np.int32)
    return batch


def parameters(stage, seed=0):
    """Such that every position and every id matters: no norm's bias outweighs them."""
    spec = stage.batch_spec(1)
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in spec.items()}
    with layers.shapes_only(True):
        shapes = jax.eval_shape(stage.init, jax.random.key(0), zeros)
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = path[-1].key
        std = {"embedding": 1.0, "bias": 0.1}.get(name, 0.3)
        return jnp.asarray((name == "scale") + std * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def joined(stage, batch):
    return stage.layout.join(stage._condition(batch) | stage._split(batch["codes"]))


def stepwise(stage, params, ids):
    """Logits of the codes by prefill and steps, [B, codes, ids of codes]."""
    text, length, table = stage.condition.length, stage.layout.length, stage.layout.rows()
    first = stage.layout.places()[1].id
    count = stage.layout.vocab_size - first
    net = functools.partial(stage.net.apply, {"params": params["net"]})

    @jax.jit
    def prefill():
        caches = net(len(ids), length, method="empty_caches")
        if text == 1:
            return caches
        read = ids[:, : text - 1], table[: text - 1], stage._masks(0, text - 1, text - 1), caches
        return net(*read, method="states")[1]

    @jax.jit
    def step(caches, at):
        row, now = jax.lax.dynamic_slice_in_dim(table, at, 1), jax.lax.dynamic_slice_in_dim(ids, at, 1, 1)
        states, caches = net(now, row, stage._masks(at, 1), caches, at, method="states")
        return net(states[:, 0], first, count, method="head"), caches

    caches = prefill()
    found = []
    for at in range(text - 1, length - 1):
        logits, caches = step(caches, at)
        found.append(logits)
    return np.stack(found, axis=1)


@functools.cache
def model(size=4):
    """All sparse kinds of masks in one network."""
    stage = build("all")
    return stage, parameters(stage), example(stage, size)


@functools.cache
def whole():
    """(params, ids [4, length]) -> logits of the codes by the whole sequence, compiled once."""
    stage = model()[0]
    return jax.jit(lambda params, ids: stage.logits(params, ids)["level0"])


@functools.cache
def drawing():
    """(params, keys, batch, forced, guidance_scale, temperature) -> codes, compiled once."""
    stage = model()[0]

    def draw(params, keys, batch, forced, guidance_scale, temperature):
        settings = dict(guidance_scale=guidance_scale, temperature=temperature)
        return stage._draw(params, keys, batch, forced, **settings)

    return jax.jit(draw)


FREE = np.full((4, 12), -1)  # no code is given
GREEDY = 1e-6  # the temperature


def test_logits_of_prefill_and_steps_are_those_of_the_whole_sequence():
    """Of every mask, in one network; the full one is below."""
    stage, params, batch = model()
    ids = joined(stage, batch)
    got = stepwise(stage, params, ids)
    np.testing.assert_allclose(got, whole()(params, ids), atol=1e-5)
    assert np.std(got) > 0.1


def test_two_levels_are_one_sequence_too():
    stage = build("full", grids=((2, 2), (3, 4)), num_codes=(5, 7), text=None, num_classes=3, label_drop=0.1)
    params, batch = parameters(stage), example(stage)
    ids = joined(stage, batch)
    got, logits = stepwise(stage, params, ids), jax.jit(stage.logits)(params, ids)
    np.testing.assert_allclose(got[:, :4, :5], logits["level0"], atol=1e-5)
    np.testing.assert_allclose(got[:, 4:, 5:], logits["level1"], atol=1e-5)
    sample = jax.jit(functools.partial(stage.sample, guidance_scale=2.0, top_k=5, top_p=0.95))
    drawn = sample(params, jax.random.split(jax.random.key(0), SIZE), batch)
    assert drawn.shape == (SIZE, 16) and drawn.min() >= 0
    assert 2 <= drawn[:, :4].max() < 5 <= drawn[:, 4:].max() < 7


def test_a_logit_depends_on_what_its_masks_reach_and_nothing_else():
    """Every id is changed in turn, pads of the caption too."""
    stage, params, batch = model()
    ids = np.asarray(joined(stage, batch))[:1]
    count, text = stage.layout.length - 1, stage.context_length
    reach = np.eye(count, dtype=int)
    for kind in KINDS["all"]:
        own = np.asarray(rows((kind,), 0, count, count, text, 4))[0, 0, 0].astype(int)
        reach = ((own @ reach) > 0).astype(int)
    changed = np.repeat(ids, 16, axis=0)  # the last one stays
    for j in range(count):  # the next id of its part, or another pad
        low, high = (0, 11) if ids[0, j] < 11 else (11, 18) if ids[0, j] < 18 else (18, 22)
        changed[j, j] = low + (ids[0, j] + 1 - low) % (high - low)
    found = np.concatenate([whole()(params, changed[i : i + 4]) for i in range(0, 16, 4)])
    moved = np.abs(found[:count] - found[count]).max(axis=-1).T > 1e-5  # [codes, changed position]
    np.testing.assert_array_equal(moved, reach[text - 1 :] > 0)


@functools.cache
def dropping():
    """(stage, parameters, batch, its loss compiled once) of a model that drops nearly all captions."""
    stage = build("full", text_drop=0.999)
    return stage, parameters(stage), example(stage), jax.jit(stage.loss)


def test_the_loss_is_the_weighted_mean_of_two_cross_entropies():
    """1/8 of the caption's, over its real tokens, and 7/8 of the codes', each from those before it."""
    stage, params, batch, compiled = dropping()
    loss = compiled(params, jax.random.key(0), batch, train=False)
    ids = np.asarray(joined(stage, batch))
    mask = np.tril(np.ones((16, 16), bool))[None, None, None]
    net = jax.jit(stage.net.apply)
    logits = np.asarray(net({"params": params["net"]}, ids, stage.layout.rows(), mask))  # of all 18 ids
    text, codes = [], []
    for row in range(SIZE):
        for position in range(1, 16):
            low, high = (0, 11) if position < 4 else (11, 18)
            x = logits[row, position - 1, low:high].astype(np.float64)
            if position >= 4 or batch["token_mask"][row, position]:
                value = np.log(np.exp(x).sum()) - x[ids[row, position] - low]
                (text if position < 4 else codes).append(value)
    np.testing.assert_allclose(loss.scalars["text_loss"], np.mean(text), rtol=1e-5)
    np.testing.assert_allclose(loss.scalars["code_loss"], np.mean(codes), rtol=1e-5)
    np.testing.assert_allclose(loss.value, np.mean(text) / 8 + 7 * np.mean(codes) / 8, rtol=1e-5)
    assert stage.text_weight == 1 / 8


def test_a_dropped_caption_is_a_caption_of_pads():
    _, params, batch, loss = dropping()
    key = next(k for k in map(jax.random.key, range(9)) if jax.random.bernoulli(k, 0.999, (SIZE,)).all())
    dropped = loss(params, key, batch, train=True).scalars
    pads = loss(params, key, batch | {"token_mask": np.zeros((SIZE, 4), bool)}, train=False).scalars
    np.testing.assert_allclose(dropped["code_loss"], pads["code_loss"], rtol=1e-6)
    assert dropped["text_loss"] == 0 != loss(params, key, batch, train=False).scalars["text_loss"]


KEYS = jax.random.split(jax.random.key(3), 4)


def test_a_permuted_batch_gives_permuted_samples():
    stage, params, batch = model()
    order = np.array([2, 0, 3, 1])
    drawn = np.asarray(drawing()(params, KEYS, batch, FREE, 1.5, 1.0))
    permuted = {name: x[order] for name, x in batch.items()}
    np.testing.assert_array_equal(drawing()(params, KEYS[order], permuted, FREE, 1.5, 1.0), drawn[order])
    assert len(np.unique(drawn, axis=0)) == 4


def test_greedy_codes_are_those_of_the_whole_sequence():
    """Guided: of a caption and of pads, each by the whole sequence."""
    stage, params, batch = model()
    drawn = np.asarray(drawing()(params, KEYS, batch, FREE, 2.5, GREEDY))
    apply = lambda fields: whole()(params, joined(stage, fields))  # noqa: E731
    known = batch | {"codes": drawn}
    c, u = (apply(known | more) for more in ({}, {"token_mask": np.zeros((4, 4), bool)}))
    np.testing.assert_array_equal((u + 2.5 * (c - u)).argmax(-1), drawn)
    negative = {"negative_tokens": batch["tokens"][::-1], "negative_token_mask": batch["token_mask"][::-1]}
    drawn = np.asarray(drawing()(params, KEYS, batch | negative, FREE, 2.5, GREEDY))
    known = batch | {"codes": drawn}
    c = apply(known)
    u = apply(known | {name: batch[name][::-1] for name in token_model.TEXT})
    np.testing.assert_array_equal((u + 2.5 * (c - u)).argmax(-1), drawn)


def test_a_completed_picture_keeps_the_first_rows():
    stage, params, batch = model()
    assert stage.ops["complete"].reads == ("tokens", "token_mask", "codes")
    forced, other = (kept(codes % 7, stage.grids, 0.67) for codes in (batch["codes"], batch["codes"] + 1))
    assert (np.asarray(forced) >= 0).sum() == 4 * 8
    drawn, changed = (np.asarray(drawing()(params, KEYS, batch, x, 1.5, 1.0)) for x in (forced, other))
    np.testing.assert_array_equal(drawn[:, :8], batch["codes"][:, :8])
    assert (drawn[:, 8:] != batch["codes"][:, 8:]).any()
    assert (changed[:, 8:] != drawn[:, 8:]).any()  # it reads what is kept


def test_blocks_in_one_loop_compute_the_same():
    stage, params, batch = model()
    looped, ids = build("all", net=dict(scan_blocks=True), remat="all"), joined(stage, batch)
    got = jax.jit(looped.logits)(params, ids)["level0"]
    np.testing.assert_allclose(got, whole()(params, ids), atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_codes=(7, 8)), "must have a value for each level of codes"),
        (dict(num_classes=3), "reads text or classes"),
        (dict(net=dict(kinds=("full",))), "net.kinds has 1 kinds of attention, net.depth is 3"),
        (dict(net=dict(kinds=("full", "full", "row4"))), "kind 'row4' of attention is unknown"),
        (dict(net=dict(num_heads=3)), "net.width 16 is not a multiple of net.num_heads 3"),
        (dict(net=dict(heads=3)), "net.heads is not a setting"),
        (dict(top_p=0.0), "top_p 0.0 must lie in"),
        (dict(text_weight=1.0), "must be in"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)

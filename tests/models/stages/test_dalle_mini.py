"""dalle-mini's stage: its loss by hand, the cache against the whole sequence, what a sample depends on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.stages import dalle_mini
from dalle2_jax.models.stages.code_sampling import kept
from tests.models.stages.test_token_model import FREE, GREEDY, KEYS, TEXT, example, parameters

NET = dict(width=16, depth=2, num_heads=2, hidden=24)
# Of the 9 ids 7 are codes; one is neither a code nor the start.
SIZES = dict(text=TEXT, net=NET, grids=((3, 4),), num_codes=(7,), num_ids=9, start_code=8)


@functools.cache
def model():
    """(stage, parameters, 4 captions of 2 to 4 tokens, with codes); it drops nearly all captions."""
    stage = dalle_mini.build(**SIZES, text_drop=0.999)
    batch = example(stage, 4)
    batch["tokens"][:, 0] = 3  # every caption begins alike
    return stage, parameters(stage), batch


@functools.cache
def whole():
    """(tokens, token_mask, codes) -> logits [4, 12, 9] of all codes at once, compiled once."""
    stage, params, _ = model()

    @jax.jit
    def logits(params, tokens, token_mask, codes):
        before = jnp.concatenate([jnp.full((4, 1), 8), codes[:, :-1]], axis=1)
        return stage.net.apply({"params": params["net"]}, tokens, token_mask, before)

    return lambda *fields: np.asarray(logits(params, *fields))


@functools.cache
def drawing():
    """(keys, batch, forced, guidance_scale, temperature) -> codes of all 7, compiled once."""
    stage, params, _ = model()

    @jax.jit
    def draw(params, keys, batch, forced, guidance_scale, temperature):
        how = dict(guidance_scale=guidance_scale, temperature=temperature, top_k=0)
        return stage._draw(params, keys, batch, forced, **how)

    return lambda *arguments: np.asarray(draw(params, *arguments))


@functools.cache
def losses():
    """The stage's loss, compiled once."""
    stage, params, _ = model()
    return functools.partial(jax.jit(stage.loss), params)


def null_caption(batch):
    """Start and end of each caption: its first token, its last real one."""
    tokens = np.zeros_like(batch["tokens"])
    last = batch["token_mask"].sum(axis=1) - 1
    tokens[:, 0], tokens[:, 1] = batch["tokens"][:, 0], batch["tokens"][np.arange(4), last]
    return {"tokens": tokens, "token_mask": np.broadcast_to(np.arange(4) < 2, tokens.shape)}


def test_the_loss_is_the_cross_entropy_of_the_codes():
    """Of the codes' ids alone; the start comes before the first one."""
    _, _, batch = model()
    loss = losses()(jax.random.key(0), batch, train=False)
    logits = whole()(batch["tokens"], batch["token_mask"], batch["codes"])[..., :7].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_p, batch["codes"][..., None], axis=-1).mean()
    np.testing.assert_allclose(loss.value, expected, rtol=1e-5)
    np.testing.assert_allclose(loss.scalars["accuracy"], (logits.argmax(-1) == batch["codes"]).mean())


def test_a_dropped_caption_is_start_and_end_alone():
    _, _, batch = model()
    key = next(k for k in map(jax.random.key, range(9)) if jax.random.bernoulli(k, 0.999, (4, 1)).all())
    dropped = losses()(key, batch, train=True).value
    null = losses()(key, batch | null_caption(batch), train=False).value
    np.testing.assert_allclose(dropped, null, rtol=1e-6)
    assert abs(dropped - losses()(key, batch, train=False).value) > 1e-3


def test_logits_with_the_cache_are_those_of_the_whole_sequence():
    stage, params, batch = model()
    net = functools.partial(stage.net.apply, {"params": params["net"]})
    before = np.concatenate([np.full((4, 1), 8), batch["codes"][:, :-1]], axis=1)

    @jax.jit
    def stepwise(tokens, mask):
        read = net(net(tokens, mask, method="encode"), method="read")

        def step(caches, at):
            code = jax.lax.dynamic_slice_in_dim(jnp.asarray(before), at, 1, axis=1)
            logits, caches = net(code, read, mask, caches, at, method="decode")
            return caches, logits[:, 0]

        caches = net(4, method="empty_caches")
        return jax.lax.scan(step, caches, jnp.arange(12))[1].swapaxes(0, 1)

    expected = whole()(batch["tokens"], batch["token_mask"], batch["codes"])
    np.testing.assert_allclose(stepwise(batch["tokens"], batch["token_mask"]), expected, atol=1e-5)
    assert expected.std() > 0.1


def test_logits_depend_on_the_real_tokens_and_the_codes_before():
    _, _, batch = model()
    tokens, mask, codes = (batch[name] for name in ("tokens", "token_mask", "codes"))
    logits = whole()(tokens, mask, codes)
    np.testing.assert_array_equal(whole()(np.where(mask, tokens, 5), mask, codes), logits)
    assert np.abs(whole()(np.where(mask, (tokens + 1) % 11, 0), mask, codes) - logits).max() > 1e-3
    for place in (0, 5, 10):
        changed = codes.copy()
        changed[:, place] = (changed[:, place] + 1) % 7
        moved = np.abs(whole()(tokens, mask, changed) - logits).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(12) > place)


def test_greedy_codes_are_guided_by_the_caption_of_nothing():
    """u + s (c - u), or away from a negative caption; only ids of codes are drawn."""
    _, _, batch = model()
    drawn = drawing()(KEYS, batch, FREE, 3.0, GREEDY)
    fields = [(x["tokens"], x["token_mask"]) for x in (batch, null_caption(batch))]
    c, u = (whole()(*each, drawn)[..., :7] for each in fields)
    np.testing.assert_array_equal((u + 3.0 * (c - u)).argmax(-1), drawn)
    assert len(np.unique(drawn)) > 2
    order = np.array([3, 2, 1, 0])
    negative = {f"negative_{name}": batch[name][order] for name in ("tokens", "token_mask")}
    drawn = drawing()(KEYS, batch | negative, FREE, 3.0, GREEDY)
    c, u = (whole()(batch["tokens"][i], batch["token_mask"][i], drawn)[..., :7] for i in (slice(4), order))
    np.testing.assert_array_equal((u + 3.0 * (c - u)).argmax(-1), drawn)


def test_a_permuted_batch_gives_permuted_samples():
    _, _, batch = model()
    order = np.array([2, 0, 3, 1])
    drawn = drawing()(KEYS, batch, FREE, 1.5, 1.0)
    permuted = {name: x[order] for name, x in batch.items()}
    np.testing.assert_array_equal(drawing()(KEYS[order], permuted, FREE, 1.5, 1.0), drawn[order])
    assert len(np.unique(drawn, axis=0)) == 4


def test_a_completed_picture_keeps_the_first_rows():
    stage, params, batch = model()
    forced = kept(batch["codes"], stage.grids, 0.67)
    drawn = drawing()(KEYS, batch, forced, 1.5, 1.0)
    np.testing.assert_array_equal(drawn[:, :8], batch["codes"][:, :8])
    assert (drawn[:, 8:] != batch["codes"][:, 8:]).any()
    other = drawing()(KEYS, batch, kept((batch["codes"] + 1) % 7, stage.grids, 0.67), 1.5, 1.0)
    assert (other[:, 8:] != drawn[:, 8:]).any()  # it reads what is kept
    assert stage.ops["complete"].reads == ("tokens", "token_mask", "codes")
    complete = jax.jit(functools.partial(stage.complete, keep=0.67, top_k=0))
    fields = [batch[name] for name in stage.ops["complete"].reads]
    made = complete(params, KEYS, *fields, guidance_scale=jnp.float32(1.5), temperature=jnp.float32(1.0))
    np.testing.assert_array_equal(made, drawn)


def test_its_defaults_are_super_conditioning():
    stage = dalle_mini.build(**SIZES)
    assert stage.sampling == dict(guidance_scale=10.0, temperature=1.0, top_k=256, top_p=1.0)
    assert stage.conditional


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_codes=(7, 7), grids=((3, 4), (3, 4))), "must have one level of codes"),
        (dict(start_code=9), "has no room for 7 codes and the start 9"),
        (dict(text_drop=1.0), "must be in"),
        (dict(net=NET | dict(num_heads=3)), "net.width 16 is not a multiple of net.num_heads 3"),
        (dict(net=NET | dict(kinds=())), "net.kinds is not a setting"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dalle_mini.build(**SIZES | changes)

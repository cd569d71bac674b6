"""The decode loop against plain loops: each option by its definition in numpy, the cache against no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.tokens.decode import Options, decode, guide, restrict

KEY = jax.random.key(0)
BATCH, LENGTH, VOCAB = 4, 5, 7
FIRST = 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHTS, TABLE = 2 * normal(LENGTH, 3, VOCAB), normal(VOCAB, 3, seed=1)
CONDITION = normal(2 * BATCH, VOCAB, seed=2)  # with and without a condition in turn


def network(condition):
    """Logits of token k: (the sum of the embeddings of all before it) @ WEIGHTS[k] + condition."""

    def step(tokens, k, total):
        total = total + jnp.asarray(TABLE)[tokens]
        return total @ jnp.asarray(WEIGHTS)[k] + condition, total

    return step


def draw(condition, keys, options, length=LENGTH):
    """By the decode loop, whose cache is the sum."""
    rows = len(condition)
    first, cache = jnp.full(rows, FIRST), jnp.zeros((rows, 3))
    return decode(network(condition), lambda tokens: tokens, first, cache, keys, length, options)


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def plain_probabilities(logits, options, k):
    """Of one row, float64, by a loop over the tokens in falling order."""
    logits = logits.astype(np.float64)
    if options.allowed is not None:
        logits = np.where(np.broadcast_to(options.allowed, (LENGTH, VOCAB))[k], logits, -np.inf)
    p = softmax(logits / options.temperature)
    order = np.argsort(-p, kind="stable")
    if options.top_k is not None:
        p[order[options.top_k :]] = 0
        p /= p.sum()
    if options.top_p is not None:
        total, kept = 0.0, []
        for token in order:
            kept.append(token)
            total += p[token]
            if total >= options.top_p:
                break
        p[[token for token in range(VOCAB) if token not in kept]] = 0
        p /= p.sum()
    return p


def plain_draw(condition, keys, options):
    """Token by token without a cache: the whole history is summed for every token."""
    guided, out = options.guidance_scale is not None, np.zeros((len(keys), LENGTH), int)
    for k in range(LENGTH):
        for row, key in enumerate(keys):
            history = TABLE[[FIRST, *out[row, :k]]].sum(axis=0) @ WEIGHTS[k]
            if guided:
                c, u = history + condition[2 * row], history + condition[2 * row + 1]
                scale = np.broadcast_to(np.asarray(options.guidance_scale), (len(keys), 1))[row, 0]
                logits = u + scale * (c - u)
            else:
                logits = history + condition[row]
            with np.errstate(divide="ignore"):
                p = np.log(plain_probabilities(logits, options, k))
            token = jax.random.categorical(jax.random.fold_in(key, k), jnp.asarray(p, jnp.float32))
            forced = -1 if options.forced is None else options.forced[row, k]
            out[row, k] = forced if forced >= 0 else token
    return out


ALLOWED = np.random.default_rng(5).random((LENGTH, VOCAB)) < 0.5
ALLOWED[:, 2] = True
FORCED = np.where(np.random.default_rng(6).random((BATCH, LENGTH)) < 0.5, 5, -1).astype(np.int32)
OPTIONS = {
    "plain": Options(),
    "temperature": Options(0.3),
    "top-k": Options(top_k=2),
    "top-p": Options(top_p=0.6),
    "all three": Options(1.5, top_k=4, top_p=0.8),
    "guidance": Options(guidance_scale=2.5),
    "guidance by row": Options(guidance_scale=np.array([[0.0], [1], [2], [5]], np.float32)),
    "allowed": Options(allowed=ALLOWED),
    "allowed anywhere": Options(allowed=ALLOWED[0]),
    "forced": Options(forced=FORCED),
    "all": Options(0.7, 3, 0.9, 3.0, ALLOWED, FORCED),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_a_plain_loop_without_a_cache(name):
    options, keys = OPTIONS[name], jax.random.split(KEY, BATCH)
    condition = CONDITION if options.guidance_scale is not None else CONDITION[::2]
    tokens = np.asarray(jax.jit(functools.partial(draw, options=options))(condition, keys))
    assert tokens.dtype == np.int32 and tokens.shape == (BATCH, LENGTH)
    np.testing.assert_array_equal(tokens, plain_draw(condition, keys, options))
    if options.forced is not None:
        np.testing.assert_array_equal(tokens[FORCED >= 0], FORCED[FORCED >= 0])
    elif options.allowed is not None:
        allowed = np.broadcast_to(options.allowed, (LENGTH, VOCAB))
        assert all(allowed[k, token] for row in tokens for k, token in enumerate(row))


@pytest.mark.parametrize("top_k", [None, 1, 3, VOCAB])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_probabilities_are_the_definitions(top_k, top_p, temperature):
    logits = 2 * normal(20, VOCAB, seed=4)
    options = Options(temperature, top_k, top_p)
    got = jax.nn.softmax(restrict(logits, options), axis=-1)
    wanted = [plain_probabilities(row, options, 0) for row in logits]
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    traced = jax.jit(lambda *numbers: restrict(logits, Options(*numbers)))(temperature, top_k, top_p)
    np.testing.assert_allclose(jax.nn.softmax(traced, axis=-1), wanted, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    count, options = 4000, Options(0.8, top_k=5, top_p=0.9)
    condition = np.broadcast_to(CONDITION[:1], (count, VOCAB))
    tokens = jax.jit(functools.partial(draw, options=options, length=1))(
        condition, jax.random.split(KEY, count)
    )
    p = plain_probabilities(TABLE[FIRST] @ WEIGHTS[0] + CONDITION[0], options, 0)
    share = np.bincount(tokens[:, 0], minlength=VOCAB) / count
    assert (share[p == 0] == 0).all() and (p == 0).any()
    assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / count)).all()


def test_guidance_is_on_logits():
    logits = normal(6, VOCAB)
    for scale in (0.0, 1.0, 3.0, normal(3, 1)):
        wanted = logits[1::2] + scale * (logits[::2] - logits[1::2])
        np.testing.assert_allclose(guide(logits, scale), wanted, rtol=1e-6)


def test_a_top_p_of_1_and_a_top_k_of_all_leave_everything():
    logits = np.array([[40.0, 0, 0, -40, -80]], np.float32)  # the small ones are lost in a float32 sum
    np.testing.assert_array_equal(restrict(logits, Options(top_k=5, top_p=1.0)), logits)


def test_a_token_depends_on_its_own_key_and_row_alone():
    sample = jax.jit(functools.partial(draw, options=Options()))
    keys = jax.random.split(KEY, 2 * BATCH)
    whole, part = sample(CONDITION, keys), sample(CONDITION[2:4], keys[2:4])
    np.testing.assert_array_equal(whole[2:4], part)


def test_an_option_that_is_not_there_leaves_no_trace():
    keys = jax.random.split(KEY, BATCH)

    def program(options):
        return str(jax.make_jaxpr(functools.partial(draw, options=options))(CONDITION[::2], keys))

    assert " sort[" not in program(Options()) and " sort[" in program(Options(top_k=2))
    assert "-inf" not in program(Options()) and "-inf" in program(Options(allowed=ALLOWED))

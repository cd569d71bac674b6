"""The diffusion prior: scaling of embeddings, what sampling depends on, and learning."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops, models
from dalle2_jax.models.diffusion import guidance
from dalle2_jax.models.stages import prior
from dalle2_jax.models.stages.clip import unit_norm
from tests.learned import assert_within, descend, key_of, share_nearest

KEY = jax.random.key(0)
CHEAP_KEY = jax.random.key(0, impl="rbg")  # programs full of the default's draws take long to compile
LENGTH, VOCAB, EMBED = 5, 11, 16
TEXT = dict(width=32, depth=1, num_heads=2, vocab_size=VOCAB, context_length=LENGTH)
STATES = dict(width=32, depth=1, num_heads=2, states_width=6, context_length=LENGTH)


def build(**changes):
    return prior.build(**(dict(embed_dim=EMBED, text=TEXT, num_steps=4) | changes))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batch_of(size):
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "image_embed": unit(normal(size, EMBED)),
        "text_embed": unit(normal(size, EMBED)),
        "tokens": draw.integers(0, VOCAB, (size, LENGTH)).astype(np.int32),
        "text_states": normal(size, LENGTH, 6),
        "token_mask": np.arange(LENGTH) < 2 + np.arange(size)[:, None] % 4,
    }


@jax.jit
def eight_captions(key):
    """What is learned by heart, drawn from a key."""
    size = 8
    k = jax.random.split(key, 4)
    return {
        "image_embed": unit_norm(jax.random.normal(k[0], (size, EMBED))),
        "text_embed": unit_norm(jax.random.normal(k[1], (size, EMBED))),
        "tokens": jax.random.randint(k[2], (size, LENGTH), 0, VOCAB),
        "text_states": jax.random.normal(k[3], (size, LENGTH, 6)),
        "token_mask": jnp.arange(LENGTH) < 2 + jnp.arange(size)[:, None] % 4,
    }


def random_params(stage):
    """Parameters of the right names and shapes, all random (cheaper than `init`, and no bias is zero)."""
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(stage)
    return jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape), np.float32), shapes)


def other_captions(batch):
    """The same batch with the captions of other rows."""
    return batch | {name: np.roll(batch[name], 1, axis=0) for name in ("tokens", "text_embed", "token_mask")}


BOUNDS = {
    "loss_before": (">", 0.5),
    "loss": ("<", 0.05),
    "nearest": (">", 0.6),
    "similarity": (">", 0.9),
    "off_unit_norm": ("<", 0.15),
}


def learn(seed):
    """(metrics, batch, sample) after 150 steps on eight captions, 8 times in a batch."""
    key = key_of(seed)
    stage, batch = build(num_steps=8), eight_captions(key)
    params = jax.jit(stage.init)(key, batch)
    repeated = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), jax.device_get(batch))
    params, metrics = descend(stage, params, key, repeated, steps=150, learning_rate=3e-3)

    @jax.jit
    def sample(params, keys, batch, guidance_scale=1.0):
        return stage.sample(params, keys, batch, guidance_scale=jnp.float32(guidance_scale))

    return metrics, batch, functools.partial(sample, params)


def reached(seed, learned=None):
    """How well it has learned, and how near eight samples are to the embeddings of their captions."""
    metrics, batch, sample = learned or learn(seed)
    samples = np.asarray(sample(jax.random.split(jax.random.key(seed + 100), 8), batch))
    assert samples.shape == (8, EMBED) and samples.dtype == np.float32
    similarity = unit(samples) @ np.asarray(batch["image_embed"]).T
    return {
        "loss_before": metrics["loss"][0],
        "loss": np.asarray(metrics["loss"])[-20:].mean(),
        "nearest": share_nearest(similarity),
        "similarity": np.diagonal(similarity).min(),
        "off_unit_norm": np.abs(np.linalg.norm(samples, axis=1) - 1).max(),
    }


@pytest.fixture(scope="module")
def trained():
    return learn(0)


def test_eight_embeddings_are_learned(trained):
    """And trap 8: samples have CLIP's own scale, here a norm of 1 and not 17.2 sqrt(16 / 1024) = 2.15."""
    assert_within(reached(0, trained), BOUNDS)


def test_a_sample_depends_on_its_own_key_and_caption_alone(trained):
    _, batch, sample = trained
    batch = jax.device_get(batch)
    # Random parameters: what has learned eight embeddings by heart draws them from any noise.
    sample = functools.partial(sample.func, random_params(build(num_steps=8)))
    keys = jax.random.split(KEY, 8)
    whole = sample(keys, batch)
    others = jax.tree.map(lambda x, y: np.concatenate([x[:3], y[3:]]), batch, other_captions(batch))
    other_keys = jnp.where(np.arange(8) < 3, keys, jax.random.split(jax.random.key(1), 8))
    changed = sample(other_keys, others)
    np.testing.assert_allclose(whole[:3], changed[:3], atol=1e-5)
    assert (np.abs(whole - changed)[3:].max(axis=1) > 1e-2).all()
    np.testing.assert_array_equal(whole, sample(keys, batch))
    # A network that predicts x0 sees little of the noise; the same keys draw the same to the bit.
    assert (np.abs(whole - sample(jax.random.split(jax.random.key(1), 8), batch)).max(axis=1) > 1e-6).all()


def test_guidance_0_drops_the_text():
    """With one candidate nothing else brings the text back in (the choice of a candidate would)."""
    stage, batch = build(num_candidates=1), batch_of(3)
    params, keys = random_params(stage), jax.random.split(KEY, 3)
    guided = jax.jit(lambda params, *a, scale: stage.sample(params, *a, guidance_scale=scale))
    sample = lambda batch, scale: guided(params, keys, batch, scale=scale)  # noqa: E731
    zero = np.zeros(3, np.float32)
    null, cond = sample(batch, zero), sample(batch, zero + 1)
    np.testing.assert_allclose(null, sample(other_captions(batch), zero), atol=1e-6)
    assert np.abs(cond - sample(other_captions(batch), zero + 1)).max() > 1e-3
    # A scale of the number 1 leaves out the null half, and means the same; scales may differ between rows.
    plain = jax.jit(stage.sample)(params, keys, batch)
    np.testing.assert_allclose(plain, cond, atol=1e-5)
    mixed = sample(batch, np.array([0.0, 1.0, 3.0], np.float32))
    np.testing.assert_allclose(mixed[:2], np.stack([null[0], cond[1]]), atol=1e-5)
    assert np.abs(mixed[2] - cond[2]).max() > 1e-3


def test_guidance_inside_an_interval(monkeypatch):
    """All times inside: plain guidance. None: guidance 1, with each candidate's own text."""
    stage, batch = build(num_candidates=2, num_steps=4), batch_of(3)
    params, keys = random_params(stage), jax.random.split(KEY, 3)
    how, times_inside = dict(return_candidates=True), guidance.times_inside
    scaled = jax.jit(lambda params, scale: stage.sample(params, keys, batch, guidance_scale=scale, **how))
    plain, none = (np.asarray(scaled(params, np.float32(scale))) for scale in (3, 1))

    @jax.jit
    def draw(params, inside):  # the times as an argument: one program for all intervals
        monkeypatch.setattr(guidance, "times_inside", lambda schedule, interval: inside)
        return stage.sample(params, keys, batch, guidance_scale=3.0, guidance_interval=(0.0, 1.0), **how)

    everywhere, nowhere, some = (
        np.asarray(draw(params, times_inside(stage.diffusion.schedule, interval)))
        for interval in ((0.0, 1e9), (1e8, 1e9), (0.5, 1e3))
    )
    np.testing.assert_allclose(everywhere, plain, atol=1e-5)
    np.testing.assert_allclose(nowhere, none, atol=1e-5)
    assert min(np.abs(some - other).max() for other in (plain, none)) > 1e-3


@pytest.mark.parametrize("scale", [pytest.param(1, marks=pytest.mark.slow), 3.0])
def test_reading_the_text_once_draws_what_reading_it_at_every_step_does(scale, monkeypatch):
    stage = build(text=TEXT | dict(depth=2))
    params, batch = random_params(stage), batch_of(4)
    keys, how = jax.random.split(CHEAP_KEY, 4), dict(num_steps=5, guidance_scale=scale)
    # a new function each: what `stage.sample` is made of is replaced below
    drawn = jax.jit(lambda *arguments: stage.sample(*arguments, **how))(params, keys, batch)
    cached = flops.count(lambda: stage.sample(params, keys, batch, **how))
    net, texts = type(stage.net), []
    apply = net.apply

    def whole(self, variables, x_t, t, *text, **options):
        return apply(self, {"params": variables["params"]}, x_t, t, *(text or texts[-1]), **options)

    def read(self, params, *text):  # one caption, with guidance twice, for every candidate
        assert {len(x) for x in text} == {4 * halves}
        of_candidates = np.arange(4 * halves).reshape(4, 1, halves).repeat(stage.num_candidates, 1).ravel()
        texts.append([x[of_candidates] for x in text])
        return {}

    halves = 1 if scale == 1 else 2
    monkeypatch.setattr(net, "read", read)
    monkeypatch.setattr(net, "apply", whole)
    again = jax.jit(lambda *arguments: stage.sample(*arguments, **how))(params, keys, batch)
    np.testing.assert_allclose(again, drawn, atol=1e-5)
    rows = 4 * stage.num_candidates * halves
    a_step = flops.of_step(stage, stage.batch_spec(rows)) // flops.TRAINING_PASSES
    assert flops.count(lambda: stage.sample(params, keys, batch, **how)) == 5 * a_step > 1.5 * cached


def test_the_candidate_nearest_to_the_text_is_kept():
    stage, batch = build(num_steps=1), batch_of(4)
    params, keys = random_params(stage), jax.random.split(KEY, 4)

    def cosine(num_candidates):
        sample = jax.jit(functools.partial(stage.sample, num_candidates=num_candidates))
        samples = np.asarray(sample(params, keys, batch))
        return samples, (unit(samples) * batch["text_embed"]).sum(axis=1)

    one, eight = cosine(1), cosine(8)
    assert (eight[1] >= one[1] - 1e-6).all() and eight[1].mean() > one[1].mean() + 0.005
    # The first of eight is the one of one: where the cosine did not grow, it was kept.
    same = np.isclose(one[0], eight[0], atol=1e-5).all(axis=1)
    np.testing.assert_array_equal(same, np.isclose(one[1], eight[1], atol=1e-6))


def test_method_and_eta_reach_the_sampler():
    stage, batch = build(num_candidates=1, num_steps=2), batch_of(2)
    params, keys = random_params(stage), jax.random.split(CHEAP_KEY, 2)
    ddpm, ddim = (
        jax.jit(functools.partial(stage.sample, method=method))(params, keys, batch)
        for method in ("ddpm", "ddim")
    )
    assert np.abs(ddpm - ddim).max() > 1e-4
    with pytest.raises(ValueError, match="eta must be in"):
        stage.sample(params, keys, batch, method="ddim", eta=2.0)


@pytest.mark.parametrize("dim", [64, 768, 1024])
@pytest.mark.parametrize("mode, std", [("paper", 0.5375), ("l2", 1.0), ("meanstd", 1.0)])
def test_scaled_embeddings_have_the_standard_deviation_of_their_mode(mode, std, dim):
    """Trap 7."""
    embed = unit(np.random.default_rng(0).standard_normal((2000, dim)).astype(np.float32))
    scale = prior.EmbedScale(mode, dim)
    params = {}
    if mode == "meanstd":
        embed = embed * 10 + np.linspace(-3, 3, dim, dtype=np.float32)
        stage = prior.build(embed_dim=dim, text=TEXT, embed_scale=dict(mode=mode))
        params, _ = stage.fit({"net": {}, "stats": {}}, lambda: [{"image_embed": embed}])
    before = embed.copy()
    z = np.asarray(scale.transform(params, embed))
    np.testing.assert_allclose(z.std(), std, rtol=0.05)
    np.testing.assert_allclose(z.std(axis=0), std, rtol=0.1)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=0.1)
    np.testing.assert_allclose(scale.inverse(params, z), embed, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(embed, before)
    np.testing.assert_array_equal(z, scale.transform(params, embed))


def test_the_papers_factor_is_17_2_at_its_own_size():
    np.testing.assert_allclose(prior.EmbedScale("paper", 1024).factor, 17.2, rtol=1e-12)
    np.testing.assert_allclose(prior.EmbedScale("paper", 768).factor, 14.90, atol=5e-3)


def test_statistics_are_kept_by_training_and_used_by_sampling():
    stage, batch = build(embed_scale=dict(mode="meanstd"), num_candidates=1, num_steps=2), batch_of(4)
    params = random_params(stage)
    params["stats"] = {"embed_mean": np.zeros(EMBED, np.float32), "embed_std": np.ones(EMBED, np.float32)}
    fitted, _ = stage.fit(params, lambda: [{"image_embed": 5 * batch["image_embed"] + 2}])
    assert np.abs(params["stats"]["embed_mean"]).max() == 0.0  # the argument is as it was
    fitted = jax.device_get(fitted)
    stats = fitted["stats"]
    np.testing.assert_allclose(stats["embed_mean"], 5 * batch["image_embed"].mean(axis=0) + 2, rtol=1e-5)
    slope = jax.jit(jax.grad(lambda *arguments: stage.loss(*arguments).value))
    gradient = jax.device_get(slope(fitted, CHEAP_KEY, batch))
    assert all((x == 0).all() for x in gradient["stats"].values())
    assert np.abs(gradient["net"]["out_proj"]["kernel"]).max() > 0.0
    keys, sample = jax.random.split(CHEAP_KEY, 4), jax.jit(stage.sample)
    expected = sample(params, keys, batch) * stats["embed_std"] + stats["embed_mean"]
    np.testing.assert_allclose(sample(fitted, keys, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip_range, expected", [(None, 3.0), (2.0, 2.0)])
def test_nothing_is_clipped_unless_asked(clip_range, expected):
    """Scaled embeddings exceed 1: a network whose prediction is constantly 3 must be heard."""
    stage = build(embed_scale=dict(mode="l2"), clip_range=clip_range, num_candidates=1, num_steps=2)
    params = random_params(stage)
    params["net"]["out_proj"] = {
        "kernel": np.zeros((32, EMBED), np.float32),
        "bias": np.full(EMBED, 3, np.float32),
    }
    samples = jax.jit(stage.sample)(params, jax.random.split(CHEAP_KEY, 2), batch_of(2))
    np.testing.assert_allclose(samples * stage.embed_scale.factor, expected, rtol=1e-4)


def test_loss_is_the_plain_squared_error_of_x0():
    """Scaled unit vectors have a mean square of (17.2 / 32)^2, which is the loss of an output of zero."""
    stage, batch = build(), batch_of(6)
    params = random_params(stage)
    params["net"]["out_proj"] = jax.tree.map(np.zeros_like, params["net"]["out_proj"])
    loss, metrics, _ = jax.jit(stage.loss)(params, CHEAP_KEY, batch)
    np.testing.assert_allclose(loss, (17.2 / 32) ** 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["mse"], rtol=1e-6)


@pytest.mark.parametrize("text", [TEXT, STATES | {"null_tokens": 2}], ids=["tokens", "states"])
def test_text_is_dropped_in_training_only(text):
    stage, batch = build(text=text, text_drop=0.999999), batch_of(4)
    params = random_params(stage)
    batch = {name: batch[name] for name in stage.batch_spec(4)}  # nothing else is read
    words = "text_states" if "text_states" in batch else "tokens"
    losses = jax.jit(lambda p, b: [stage.loss(p, CHEAP_KEY, b, train=train)[0] for train in (True, False)])
    both = functools.partial(losses, params)
    training, evaluation = both(batch)
    for name in (words, "text_embed"):
        other = both(batch | {name: np.roll(batch[name], 1, axis=0)})
        assert other[0] == training and other[1] != evaluation


def test_remat_and_bfloat16_keep_names_and_meaning():
    plain, other, batch = build(), build(remat=True, dtype="bfloat16"), batch_of(4)
    params = random_params(plain)
    shapes = jax.eval_shape(other.init, KEY, batch)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    loss = jax.jit(other.loss)(params, CHEAP_KEY, batch).value
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, jax.jit(plain.loss)(params, CHEAP_KEY, batch)[0], rtol=0.05)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [("float32", 1e-5), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)],
)
def test_blocks_as_one_loop_have_the_same_loss_and_draw_the_same(dtype, tolerance):
    common = dict(text=TEXT | dict(depth=2), dtype=dtype, num_steps=2)
    (plain, loop), batch = (build(**common, scan_blocks=scan) for scan in (False, True)), batch_of(4)
    params, keys = random_params(plain), jax.random.split(CHEAP_KEY, 4)
    losses = [lambda p, stage=stage: stage.loss(p, CHEAP_KEY, batch)[0] for stage in (plain, loop)]
    assert [str(jax.make_jaxpr(loss)(params)).count("scan[") for loss in losses] == [0, 1]
    a, b = (jax.jit(jax.value_and_grad(loss))(params) for loss in losses)
    np.testing.assert_allclose(a[0], b[0], rtol=tolerance)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=2 * tolerance * np.abs(x).max())
    a, b = (jax.jit(stage.sample)(params, keys, batch) for stage in (plain, loop))
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(a).max())


def count(stage):
    params = models.abstract_params(stage)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params["net"]))


def test_sizes_of_the_papers_prior_and_of_a_released_one():
    transformer = dict(width=2048, depth=24, num_heads=32)
    paper = prior.build(embed_dim=1024, text=transformer | dict(vocab_size=49408, context_length=256))
    # 24 blocks of 12 w^2 + 13 w are the paper's 1B; the rest is the token table and projections.
    blocks = 24 * (12 * 2048**2 + 13 * 2048)
    assert 1.2e9 < blocks < 1.22e9
    assert count(paper) - blocks - 49408 * 2048 < 0.02e9
    released = transformer | dict(depth=20, states_width=768, context_length=77, null_tokens=2)
    karlo = prior.build(embed_dim=768, text=released, embed_scale=dict(mode="meanstd"))
    nulls, stats = 768 + 2 * 768, 2 * 768
    assert count(karlo) - nulls + stats == 1_022_030_080


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text=TEXT | {"widht": 3}), "did you mean text.width"),
        (dict(text=TEXT | {"states_width": 6}), "either vocab_size .* or states_width"),
        (dict(text=TEXT | {"null_tokens": 2}), "text.null_tokens is for a prior on CLIP's states"),
        (dict(embed_scale=dict(mode="papr")), "embed_scale.mode 'papr' is unknown"),
        (dict(text_drop=1.0), "text_drop must be in"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_caption_of_another_length_is_refused():
    stage, batch = build(), batch_of(2)
    batch = batch | {"tokens": batch["tokens"][:, :3], "token_mask": batch["token_mask"][:, :3]}
    with pytest.raises(ValueError, match="captions of 5 positions, got 3"):
        jax.eval_shape(stage.init, KEY, batch)


def test_statistics_are_for_their_mode_only():
    with pytest.raises(ValueError, match="set it to 'meanstd'"):
        build().fit({}, list)

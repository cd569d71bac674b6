"""The decoder: what its output and its samples depend on, and learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.diffusion import guidance
from dalle2_jax.models.stages import conditions, decoder
from dalle2_jax.train import optim
from dalle2_jax.train.step import init_state, make_train_step
from tests.learned import assert_within, descend, key_of, share_nearest

KEY = jax.random.key(0)
CHEAP_KEY = jax.random.key(0, impl="rbg")  # programs full of the default's draws take long to compile
SIDE, LENGTH, VOCAB, EMBED = 8, 5, 11, 6
TEXT = dict(vocab_size=VOCAB, context_length=LENGTH, width=8, depth=1, num_heads=2)


def build(**changes):
    settings = dict(
        image_size=SIDE,
        embed_dim=EMBED,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        head_dim=8,
        dropout=0.0,
        text=TEXT,
        num_steps=3,
    )
    return decoder.build(**settings | changes)


def build_flat(**changes):
    """A decoder of one level that attends in the middle alone, for what is outside the network: it compiles
    faster."""
    return build(**dict(channel_mult=(1,), attention_resolutions=(1,)) | changes)


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    embed = rng.standard_normal((size, EMBED))
    return {
        "image": rng.uniform(-1, 1, (size, SIDE, SIDE, 3)).astype(np.float32),
        "image_embed": (embed / np.linalg.norm(embed, axis=1, keepdims=True)).astype(np.float32),
        "tokens": rng.integers(1, VOCAB, (size, LENGTH)).astype(np.int32),
        "token_mask": np.arange(LENGTH) < 2 + np.arange(size)[:, None] % 3,
    }


def random_params(stage):
    """Random parameters, none of them zero: fresh ones ignore every condition, as the last layer of every
    branch starts at zero."""
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(stage)
    return jax.tree.map(lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), np.float32), shapes)


def gap(a, b):
    """Largest difference of every row."""
    return np.abs(np.asarray(a) - np.asarray(b)).reshape(len(a), -1).max(axis=1)


# --- one application of the network ---


@pytest.fixture(scope="module")
def network():
    """(apply(params, batch, drop_image, drop_text) -> output, params, batch of 3)."""
    stage, batch = build(), batch_of(3)

    @jax.jit
    def apply(params, batch, drop_image, drop_text):
        read = {"image_embed": batch["image_embed"], "drop_image": drop_image, "drop_text": drop_text}
        read |= {"text": batch["tokens"], "token_mask": batch["token_mask"]}
        return stage.net.apply({"params": params}, batch["image"], jnp.array([10, 400, 990]), read)

    return apply, random_params(stage), batch


NO, YES = np.zeros(3, bool), np.ones(3, bool)


def other_images(batch):
    return batch | {"image_embed": np.roll(batch["image_embed"], 1, axis=0)}


def other_captions(batch):
    return batch | {name: np.roll(batch[name], 1, axis=0) for name in ("tokens", "token_mask")}


def test_the_output_has_three_channels_and_three_of_variance(network):
    apply, params, batch = network
    out = apply(params, batch, NO, NO)
    assert out.shape == (3, SIDE, SIDE, 6) and out.dtype == jnp.float32
    plain = jax.eval_shape(build(learned_variance=False).init, KEY, batch)
    assert plain["net"]["conv_out"]["kernel"].shape[-1] == 3


def test_every_condition_changes_the_output(network):
    apply, params, batch = network
    out = apply(params, batch, NO, NO)
    assert (gap(out, apply(params, other_images(batch), NO, NO)) > 1e-3).all()
    assert (gap(out, apply(params, other_captions(batch), NO, NO)) > 1e-3).all()


@pytest.mark.parametrize("path", ["added", "tokens", "both"])
def test_a_dropped_image_embedding_is_dropped_from_both_paths(network, path):
    """Trap 9. Each path alone carries the embedding, and each alone is silent when it is dropped."""
    apply, params, batch = network
    silenced = {"added": ["image_token_proj"], "tokens": ["image_emb_proj"], "both": []}[path]
    params = params | {name: jax.tree.map(np.zeros_like, params[name]) for name in silenced}
    other = other_images(batch)
    assert (gap(apply(params, batch, NO, NO), apply(params, other, NO, NO)) > 1e-3).all()
    np.testing.assert_array_equal(apply(params, batch, YES, NO), apply(params, other, YES, NO))
    assert (gap(apply(params, batch, YES, NO), apply(params, batch, NO, NO)) > 1e-3).all()


def test_a_dropped_caption_is_dropped_and_the_image_stays(network):
    apply, params, batch = network
    dropped = apply(params, batch, NO, YES)
    np.testing.assert_array_equal(dropped, apply(params, other_captions(batch), NO, YES))
    assert (gap(dropped, apply(params, batch, NO, NO)) > 1e-3).all()
    # Trap 10: the image's tokens are never masked with the text's.
    params = params | {"image_emb_proj": jax.tree.map(np.zeros_like, params["image_emb_proj"])}
    seen = apply(params, batch, NO, YES)
    assert (gap(seen, apply(params, other_images(batch), NO, YES)) > 1e-3).all()
    # A dropped caption is the caption without a token.
    empty = batch | {"token_mask": np.zeros_like(batch["token_mask"])}
    np.testing.assert_array_equal(seen, apply(params, empty, NO, NO))


def test_rows_are_dropped_one_by_one(network):
    apply, params, batch = network
    drop = np.array([True, False, True])
    mixed, kept = apply(params, batch, drop, ~drop), apply(params, batch, NO, ~drop)
    np.testing.assert_array_equal(gap(mixed, kept) > 1e-3, drop)
    np.testing.assert_array_equal(gap(mixed, apply(params, batch, drop, NO)) > 1e-3, ~drop)


def test_ids_of_padding_do_not_matter(network):
    """Trap 10."""
    apply, params, batch = network
    real = batch["token_mask"]
    out = apply(params, batch, NO, NO)
    other_padding = batch | {"tokens": np.where(real, batch["tokens"], 3)}
    np.testing.assert_array_equal(out, apply(params, other_padding, NO, NO))
    other_words = batch | {"tokens": np.where(real, (batch["tokens"] + 1) % VOCAB, batch["tokens"])}
    assert (gap(out, apply(params, other_words, NO, NO)) > 1e-3).all()


# --- the loss ---


def test_remat_bfloat16_and_dropping_change_neither_names_nor_evaluation():
    plain, batch = build_flat(), batch_of(4)
    other = build_flat(remat=True, dtype="bfloat16", dropout=0.9, image_drop=0.999999, text_drop=0.999999)
    params = random_params(plain)
    shapes = jax.eval_shape(other.init, KEY, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )

    def evaluate(stage):
        loss = jax.jit(lambda params, batch: stage.loss(params, CHEAP_KEY, batch, train=False)[0])
        return functools.partial(loss, params)

    evaluation, expected = evaluate(other), evaluate(plain)(batch)
    assert evaluation(batch).dtype == jnp.float32
    np.testing.assert_allclose(evaluation(batch), expected, rtol=0.03)
    for changed in (other_images(batch), other_captions(batch)):
        assert evaluation(changed) != evaluation(batch)
    assert evaluation(batch) == evaluation(batch)


@dataclasses.dataclass
class Spy:
    """A network that notes with which conditions it is called, and predicts zero."""

    seen: list
    names: tuple[str, ...] = ("drop_image", "drop_text")

    def apply(self, variables, x_t, t, conditions, *, deterministic, **options):
        self.seen.append((t, *(conditions[name] for name in self.names), deterministic))
        return jnp.zeros_like(x_t)


def noted(stage, batch):
    """What the stage's `Spy` sees of a batch, in training and outside of it."""

    @jax.jit
    def seen(batch):
        for train in (True, False):
            stage.loss({}, KEY, batch, train=train)
        return stage.net.seen

    return jax.device_get(seen(batch))


def test_conditions_are_dropped_as_often_as_in_the_paper_and_independently():
    """10 %, 50 %, and so 5 % both (section 1.4 of the facts): three standard errors of 20 000 draws."""
    stage = dataclasses.replace(build(learned_variance=False), net=Spy([]))
    batch = batch_of(1)
    small = batch | {"image": np.zeros((1, 1, 1, 3), np.float32)}
    many = jax.tree.map(lambda x: np.broadcast_to(x, (20_000, *x.shape[1:])), small)

    (t, image, text, deterministic), (spread, no_image, no_text, certain) = noted(stage, many)
    for dropped, share in ((image, 0.1), (text, 0.5), (image & text, 0.05)):
        assert abs(dropped.mean() - share) < 3 * (share * (1 - share) / 20_000) ** 0.5
    assert not no_image.any() and not no_text.any()
    assert (deterministic, certain) == (False, True)
    for times in (t, spread):
        assert times.min() == 0 and times.max() == 999 and abs(times.mean() - 499.5) < 7


@pytest.mark.parametrize("kind", ["decoder", "upsampler"])
def test_captions_and_classes_are_dropped_in_training_alone(kind):
    """In every picture stage, each at its own rate: three standard errors of 20 000 draws."""
    how = dict(text_drop=0.2, label_drop=0.1, num_classes=3, text=TEXT, channels=8, channel_mult=(1,))
    how |= dict(attention_resolutions=(SIDE,), head_dim=8, learned_variance=False, num_res_blocks=1)
    own = dict(embed_dim=0) if kind == "decoder" else dict(low_res_size=SIDE // 2, crop_size=SIDE)
    stage = models.build_stage({"stage": kind, "model": how | own | dict(image_size=SIDE)})
    assert stage.guidable
    stage = dataclasses.replace(stage, net=Spy([], ("label", "drop_text")))
    shapes = {name: (20_000, *leaf.shape[1:]) for name, leaf in stage.batch_spec(1).items()}
    shapes |= {name: (20_000, 1, 1, 3) for name in ("image", "low_res") if name in shapes}
    batch = {name: np.ones(shape, np.int32) for name, shape in shapes.items()}
    batch["token_mask"] = batch["token_mask"] > 0

    (_, label, no_text, _), (_, kept, none, _) = noted(stage, batch)
    assert set(np.unique(label)) == {-1, 1} and (kept == 1).all() and not none.any()
    for dropped, share in ((label < 0, 0.1), (no_text, 0.2), ((label < 0) & no_text, 0.02)):
        assert abs(dropped.mean() - share) < 3 * (share * (1 - share) / 20_000) ** 0.5


def test_all_conditions_are_dropped_together():
    """The null of guidance, besides each one's own rate."""
    how = dict(text_drop=0.0, label_drop=0.1, joint_drop=0.2, num_classes=3, text=TEXT, channels=8)
    how |= dict(channel_mult=(1,), attention_resolutions=(SIDE,), head_dim=8, num_res_blocks=1)
    how |= dict(learned_variance=False, embed_dim=0, image_size=SIDE)
    stage = models.build_stage({"stage": "decoder", "model": how})
    stage = dataclasses.replace(stage, net=Spy([], ("label", "drop_text")))
    shapes = {name: (20_000, *leaf.shape[1:]) for name, leaf in stage.batch_spec(1).items()}
    shapes["image"] = (20_000, 1, 1, 3)
    batch = {name: np.ones(shape, np.int32) for name, shape in shapes.items()}
    batch["token_mask"] = batch["token_mask"] > 0
    (_, label, no_text, _), (_, kept, none, _) = noted(stage, batch)
    assert (kept == 1).all() and not none.any() and (label[no_text] < 0).all()
    for dropped, share in ((no_text, 0.2), (label < 0, 0.28)):
        assert abs(dropped.mean() - share) < 3 * (share * (1 - share) / 20_000) ** 0.5


# --- sampling ---


@pytest.fixture(scope="module")
def sampler():
    """(stage, params, batch of 3, keys, sample(keys, batch, scale)) with a traced guidance scale."""
    stage, batch = build_flat(), batch_of(3)
    params = random_params(stage)

    @jax.jit
    def sample(params, keys, batch, scale):
        return stage.sample(params, keys, batch, guidance_scale=scale)

    return stage, params, batch, jax.random.split(KEY, 3), functools.partial(sample, params)


def test_a_sample_depends_on_its_own_key_and_condition_alone(sampler):
    _, _, batch, keys, sample = sampler
    scale = np.full(3, 2.0, np.float32)
    whole = sample(keys, batch, scale)
    assert whole.shape == (3, SIDE, SIDE, 3) and np.abs(whole).max() <= 1.0
    np.testing.assert_array_equal(whole, sample(keys, batch, scale))
    other_keys = jax.random.split(jax.random.key(1), 3)
    mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]), batch, batch_of(3, seed=1))
    changed = sample(jnp.where(np.arange(3) == 0, keys, other_keys), mixed, scale)
    np.testing.assert_allclose(changed[0], whole[0], atol=1e-5)
    assert (gap(changed, whole)[1:] > 1e-2).all()
    assert (gap(sample(other_keys, batch, scale), whole) > 1e-2).all()
    assert (gap(sample(keys, other_images(batch), scale), whole) > 1e-3).all()
    assert (gap(sample(keys, other_captions(batch), scale), whole) > 1e-3).all()


def test_guidance_of_1_guides_nothing(sampler):
    stage, params, batch, keys, sample = sampler
    cond = sample(keys, batch, np.ones(3, np.float32))
    # The number 1 leaves out the null half; scales may differ between rows.
    plain = jax.jit(functools.partial(stage.sample, guidance_scale=1))(params, keys, batch)
    np.testing.assert_allclose(plain, cond, atol=1e-5)
    mixed = sample(keys, batch, np.array([1.0, 2.0, 3.0], np.float32))
    np.testing.assert_array_equal(gap(mixed, cond) > 1e-3, [False, True, True])


def test_guidance_of_0_drops_both_conditions(sampler):
    """With DDIM, which has no use for the variance: that is the conditional branch's at every scale."""
    stage, params, batch, keys, _ = sampler

    by_ddim = jax.jit(functools.partial(stage.sample, method="ddim", num_steps=2))

    def sample(batch, scale):
        return by_ddim(params, keys, batch, guidance_scale=jnp.float32(scale))

    null, other = sample(batch, 0.0), other_captions(other_images(batch))
    np.testing.assert_allclose(null, sample(other, 0.0), atol=1e-5)
    assert (gap(null, sample(batch, 1.0)) > 1e-3).all()
    assert (gap(sample(other, 1.0), sample(batch, 1.0)) > 1e-3).all()


def test_a_decoder_draws_other_sizes_too(sampler):
    stage, params, batch, keys, _ = sampler
    out = jax.eval_shape(lambda: stage.sample(params, keys, batch, image_size=2 * SIDE))
    assert out.shape == (3, 2 * SIDE, 2 * SIDE, 3)


# --- learning ---


BOUNDS = {
    "loss_before": (">", 0.45),
    "loss_before_at_most": ("<", 1.0),
    "loss_fell_to": ("<", 0.25),
    "nearest": (">", 0.6),
    "error": ("<", 0.1),  # pictures of random colours are 0.9 apart
    "nearest_of_others": (">", 0.6),
}


def reached(seed):
    """Squares of one colour on another at 4 x 4, from their embeddings; then each is drawn from its own."""
    stage = build_flat(
        image_size=4,
        channels=16,
        text=None,
        objective="v",
        learned_variance=False,
        method="ddim",
        num_steps=10,
    )
    colours = np.random.default_rng(seed).choice([-0.9, -0.3, 0.3, 0.9], (2, 8, 1, 1, 3))
    inside = np.pad(np.ones((2, 2), bool), 1)[None, :, :, None]
    images = np.where(inside, *colours).astype(np.float32)
    batch = {"image": images, "image_embed": batch_of(8, seed)["image_embed"]}
    key = key_of(seed)
    params = jax.jit(stage.init)(key, batch)
    repeated = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), batch)
    params, metrics = descend(stage, params, key, repeated, steps=320, learning_rate=6e-3)
    history = np.asarray(metrics["loss"])

    keys = jax.random.split(jax.random.key(seed + 100), 8)
    sample = jax.jit(lambda params, keys, batch: stage.sample(params, keys, batch, guidance_scale=1))

    def distances(batch):
        """[8 drawn, 8 pictures], mean squared differences."""
        drawn = np.asarray(sample(params, keys, batch))
        return np.square(drawn[:, None] - images[None]).mean(axis=(2, 3, 4))

    own, others = distances(batch), distances(other_images(batch))
    return {
        # A fresh network predicts 0, whose error is alpha_bar + (1 - alpha_bar) E x0^2, between 0.45 and 1.
        "loss_before": history[0],
        "loss_before_at_most": history[0],
        "loss_fell_to": history[-20:].mean() / history[0],
        "nearest": share_nearest(-own),
        "error": own.min(axis=1).mean(),
        "nearest_of_others": share_nearest(-np.roll(others, -1, axis=0)),
    }


def test_eight_pictures_are_learned():
    assert_within(reached(0), BOUNDS)


# --- settings ---


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(
        ValueError, match="image_size 6 must be a multiple of 4 .the halvings of channel_mult"
    ):
        build(image_size=6, channel_mult=(1, 2, 3))


@pytest.mark.parametrize(
    "text, message",
    [(TEXT | {"widht": 8}, "did you mean text.width"), ({"vocab_size": 3}, "text lacks text.context_length")],
)
def test_text_settings_that_cannot_work_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        build(text=text)


class Linear:
    """A network of one layer, for what is outside of it: three channels, and three of variance."""

    def init(self, key, x_t, *arguments, **options):
        return {"params": {"net": {"conv_out": {"kernel": jnp.zeros((3, 6)), "bias": jnp.zeros(6)}}}}

    def apply(self, variables, x_t, *arguments, **options):
        layer = variables["params"]["net"]["conv_out"]
        return x_t @ layer["kernel"] + layer["bias"]


def test_training_by_the_bound_notes_its_terms_and_draws_times_by_them():
    """Two steps of the real train step: the history grows by the batch and is no part of log or gradient."""
    stage, batch = dataclasses.replace(build_flat(loss="vlb", text=None), net=Linear()), batch_of(4)
    batch = {name: batch[name] for name in stage.batch_spec(4)}
    optimizer = optim.make_optimizer(learning_rate=1e-3, num_steps=10, weight_decay=0.1)
    shapes = jax.eval_shape(lambda key: init_state(stage, optimizer, key, batch), KEY)
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = random_params(stage) | {"stats": empty.params["stats"]}
    train_state = dataclasses.replace(empty, params=params, ema_params=params)
    step = jax.jit(make_train_step(stage, optimizer, seed=0, ema_decay=0.9))
    for _ in range(2):
        before = train_state.params
        train_state, scalars = step(train_state, batch, {})
    counters = {"bad_steps", "bad_total", "bad_streak"}
    assert set(scalars) == {"mse", "vb", "loss", "grad_norm"} | counters
    history = train_state.params["stats"]
    assert float(history["vb_count"].sum()) == 8 and float(history["vb_history"].max()) > 0
    assert not np.array_equal(
        train_state.params["net"]["conv_out"]["bias"], before["net"]["conv_out"]["bias"]
    )
    # of two parts of a batch the terms are noted one after the other
    terms = {"t": np.int32([[1, 2], [3, 1]]), "values": np.float32([[4, 5], [6, 7]])}
    noted, _ = jax.jit(stage.update)({"stats": empty.params["stats"]}, terms, KEY)
    table = np.asarray(noted["stats"]["vb_history"])
    assert (table[1, :2].tolist(), table[2, 0], table[3, 0], table.sum()) == ([4, 7], 5, 6, 22)
    # validation draws fixed times and notes nothing
    _, metrics, noted = jax.eval_shape(
        lambda params: stage.loss(params, KEY, batch, train=False), train_state.params
    )
    assert set(metrics) == {"mse", "vb"} and noted == {}
    # where one time's term is a thousand times the others', it is drawn almost always, with a small weight
    terms = np.where(np.arange(1000) == 500, 1e3, 1e-3).astype(np.float32)
    history = {"vb_history": np.tile(terms[:, None], (1, 10)), "vb_count": np.full(1000, 10, np.float32)}
    drawn = jax.jit(lambda *arguments: stage.loss(*arguments).statistics["t"])
    times = drawn(train_state.params | {"stats": history}, KEY, batch)
    assert (np.asarray(times) == 500).mean() > 0.7
    with pytest.raises(ValueError, match="set learned_variance=True"):
        build_flat(loss="vlb", learned_variance=False)


# --- what is known of a picture ---


def test_masks_to_repaint_are_boxes_their_outsides_and_everything():
    masks = np.asarray(jax.jit(lambda key: conditions.random_mask(key, 600, 8))(KEY))[..., 0]
    assert masks.shape == (600, 8, 8) and set(np.unique(masks)) == {0.0, 1.0}

    def is_box(mask):
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        return mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) if len(rows) else False

    whole = (masks == 1).all((1, 2))
    box = np.array([is_box(mask) for mask in masks]) & ~whole
    outside = np.array([is_box(1 - mask) for mask in masks])
    assert (whole | box | outside).all()
    assert abs(whole.mean() - 0.2) < 0.06 and 0.5 < box.mean() < 0.75 and outside.mean() > 0.1


def test_a_decoder_that_repaints_begins_as_the_one_without():
    """Its further input weights are zeros, so `init_from` changes nothing at first; then it listens."""
    plain, seeing = (build_flat(text=None, inpaint=inpaint) for inpaint in (False, True))
    batch = batch_of(3)
    params, keys = random_params(seeing), jax.random.split(CHEAP_KEY, 3)
    kernel = params["net"]["conv_in_known"]["kernel"]
    assert kernel.shape[2] == 4
    fresh = jax.jit(lambda key: seeing.init(key, batch)["net"]["conv_in_known"])(CHEAP_KEY)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))
    params["net"]["conv_in_known"] = jax.tree.map(np.zeros_like, params["net"]["conv_in_known"])
    without = params | {"net": {k: v for k, v in params["net"].items() if k != "conv_in_known"}}
    repaint = np.zeros((3, *batch["image"].shape[1:3], 1), np.float32)
    repaint[:, :2] = 1
    batch |= {"inpaint_image": batch["image"], "inpaint_mask": repaint}
    draw, draw_plain = (
        jax.jit(lambda params, stage=stage: stage.sample(params, keys, batch)) for stage in (seeing, plain)
    )
    unseeing = np.asarray(draw_plain(without))
    np.testing.assert_allclose(draw(params), unseeing, atol=1e-5)
    params["net"]["conv_in_known"] = {"kernel": kernel, "bias": np.zeros(kernel.shape[-1], np.float32)}
    changed = np.asarray(draw(params))
    assert np.abs(changed - unseeing)[:, :2].mean() > 1e-3
    np.testing.assert_array_equal(changed[:, 2:], np.clip(batch["image"], -1, 1)[:, 2:])


def test_repainting_is_trained_with_what_is_kept_in_sight():
    """The gradient reaches the further weights."""
    stage, batch = build_flat(text=None, inpaint=True), batch_of(8)
    params = random_params(stage)

    def loss(further, params):
        net = params["net"] | {"conv_in_known": further}
        return stage.loss(params | {"net": net}, CHEAP_KEY, batch)[0]

    gradient = jax.jit(jax.grad(loss))(params["net"]["conv_in_known"], params)
    assert np.abs(gradient["kernel"]).max() > 0


def test_guidance_inside_an_interval(sampler, monkeypatch):
    """All times inside: plain guidance. None: guidance 1. The setting left out: the same program as ever."""
    stage, params, batch, keys, sample = sampler
    scale = np.full(3, 2.0, np.float32)

    def lowered(**settings):
        draw = jax.jit(lambda *a, scale: stage.sample(*a, guidance_scale=scale, **settings))
        return draw.lower(params, keys, batch, scale=scale).as_text()

    # Without the setting the program is that of a decoder that has never heard of it.
    assert lowered() == lowered(guidance_interval=None)
    assert "stablehlo.case" in lowered(guidance_interval=(0.5, 1e3)) and "stablehlo.case" not in lowered()
    plain, none = sample(keys, batch, scale), sample(keys, batch, np.ones(3, np.float32))
    times_inside = guidance.times_inside

    @jax.jit
    def draw(params, inside):  # the times as an argument: one program for all intervals
        monkeypatch.setattr(guidance, "times_inside", lambda schedule, interval: inside)
        return stage.sample(params, keys, batch, guidance_scale=scale, guidance_interval=(0.0, 1.0))

    everywhere, nowhere, some = (
        draw(params, times_inside(stage.diffusion.schedule, interval))
        for interval in ((0.0, 1e9), (1e8, 1e9), (0.5, 1e3))
    )
    np.testing.assert_allclose(everywhere, plain, atol=1e-5)
    np.testing.assert_allclose(nowhere, none, atol=1e-5)
    assert (gap(some, plain) > 1e-3).all() and (gap(some, none) > 1e-3).all()


def test_outside_the_interval_the_unconditional_half_is_not_computed(monkeypatch):
    """The network notes how many examples it is given at every step."""
    stage, batch, seen = build_flat(num_steps=4), batch_of(3), []
    params, net = random_params(stage), type(stage.net)
    denoise = net.denoise

    def noting(self, x_t, t, *arguments, **options):
        jax.debug.callback(lambda t: seen.append((int(t[0]), len(t))), t)
        return denoise(self, x_t, t, *arguments, **options)

    monkeypatch.setattr(net, "denoise", noting)
    inside = (0.1, 1e3)
    sample = jax.jit(functools.partial(stage.sample, guidance_scale=3.0, guidance_interval=inside))
    jax.block_until_ready(sample(params, jax.random.split(CHEAP_KEY, 3), batch))
    jax.effects_barrier()
    levels = stage.diffusion.schedule.noise_level
    seen.sort(reverse=True)
    assert seen == [(t, 6 if inside[0] < levels[t] <= inside[1] else 3) for t in (999, 666, 333, 0)]
    assert [count for _, count in seen] == [3, 6, 6, 3]


def test_a_negative_caption_takes_the_place_of_none(sampler):
    """With scale 0 only what guidance leads away from is drawn: the negative caption without embedding."""
    stage, params, batch, keys, sample = sampler
    negative = {f"negative_{name}": np.roll(batch[name], 1, axis=0) for name in ("tokens", "token_mask")}
    how = dict(method="ddim", num_steps=2)
    led = jax.jit(functools.partial(stage.sample, **how))
    drawn = led(params, keys, batch | negative, guidance_scale=jnp.float32(0.0))

    @jax.jit
    def by_the_negative_alone(params, keys, embed, tokens, mask):
        variables = {"params": params}
        conditioning = stage.net.apply(variables, embed, YES, tokens, mask, NO, method="condition")
        diffusion = stage.diffusion.with_settings(**how)
        denoise = diffusion.denoiser(
            lambda x_t, t: stage.net.apply(variables, x_t, t, conditioning, method="denoise")
        )
        return diffusion.sample(denoise, keys, batch["image"].shape[1:])

    expected = by_the_negative_alone(params, keys, batch["image_embed"], *negative.values())
    np.testing.assert_allclose(drawn, np.clip(expected, -1, 1), atol=1e-4)


# --- captions by a frozen CLIP ---


def test_a_decoder_reads_the_states_of_a_frozen_clip():
    """Each part of the caption changes the output; padding, and what is dropped, do not."""
    stage = build_flat(text=dict(states_width=7, context_length=LENGTH, width=8))
    assert set(stage.batch_spec(2)) == {"image", "image_embed", "text_states", "text_embed", "token_mask"}
    draw = np.random.default_rng(0)
    batch = {
        name: draw.normal(size=spec.shape).astype(np.float32)
        for name, spec in stage.batch_spec(3).items()
        if name != "token_mask"
    }
    batch["token_mask"] = np.arange(LENGTH) < np.array([2, 3, 4])[:, None]
    params = random_params(stage)

    @jax.jit
    def of(params, batch, drop_text):
        names = ("image_embed", "text_embed", "token_mask")
        read = {name: batch[name] for name in names} | {"text": batch["text_states"]}
        read |= {"drop_image": NO, "drop_text": drop_text}
        return stage.net.apply({"params": params}, batch["image"], jnp.array([10, 400, 990]), read)

    apply = functools.partial(of, params)
    for name in ("text_states", "text_embed"):
        other = batch | {name: batch[name] + 1}
        assert (gap(apply(batch, NO), apply(other, NO)) > 1e-4).all()
        assert (gap(apply(batch, YES), apply(other, YES)) == 0).all()
    padding = np.where(batch["token_mask"][..., None], batch["text_states"], np.float32(9))
    assert (gap(apply(batch, NO), apply(batch | {"text_states": padding}, NO)) == 0).all()
    keys = jax.random.split(CHEAP_KEY, 3)
    negative = {f"negative_{name}": batch[name] for name in ("text_states", "text_embed", "token_mask")}
    other = negative | {"negative_text_states": batch["text_states"] + 1}
    sample = jax.jit(functools.partial(stage.sample, guidance_scale=2.0, num_steps=2))
    assert gap(sample(params, keys, batch | negative), sample(params, keys, batch | other)).max() > 1e-4


# --- without image embeddings ---


@pytest.mark.parametrize(
    ("told", "fields"),
    [
        (dict(text=TEXT), {"image", "tokens", "token_mask"}),
        (dict(text=None, num_classes=3, label_drop=0.5), {"image", "label"}),
        (dict(text=None), {"image"}),
    ],
    ids=["captions", "classes", "nothing"],
)
def test_a_decoder_without_image_embeddings(told, fields):
    stage = build_flat(embed_dim=0, learned_variance=False, **told)  # which guidance leaves alone
    assert stage.batch_spec(2).keys() == fields and stage.guidable == (len(fields) > 1)
    assert stage.guidance_scale == (3 if stage.guidable else 1)
    batch = batch_of(2) | {"label": np.array([0, 2])}
    batch = {name: batch[name] for name in fields}
    params = random_params(stage)
    assert not [name for name in params if name.startswith(("image_", "null_"))]
    assert jax.eval_shape(stage.loss, params, CHEAP_KEY, batch).value.shape == ()
    keys = jax.random.split(CHEAP_KEY, 2)
    draw = jax.jit(lambda params, batch, scale: stage.sample(params, keys, batch, guidance_scale=scale))
    sample = functools.partial(draw, params)
    read = {name: value for name, value in batch.items() if name != "image"}
    if not read:
        drawn = jax.jit(lambda params: stage.sample(params, keys, {}, guidance_scale=1))(params)
        assert drawn.shape == (2, SIDE, SIDE, 3) and gap(drawn[:1], drawn[1:]).min() > 1e-3
        return
    drawn, other = sample(read, 1.0), sample(jax.tree.map(lambda x: x[::-1], read), 1.0)
    assert (gap(drawn, other) > 1e-3).all() and (gap(drawn, sample(read, 3.0)) > 1e-3).all()
    # guidance of 0 is the network without its condition, which sees none of it
    none, others = sample(read, 0.0), sample(jax.tree.map(lambda x: x[::-1], read), 0.0)
    np.testing.assert_allclose(none, others, atol=1e-5)


def test_a_class_that_is_left_out_is_none():
    stage = build_flat(embed_dim=0, text=None, num_classes=3)
    params = random_params(stage)
    condition = jax.jit(lambda label: stage.net.apply({"params": params}, label=label, method="condition")[0])
    none, first, last = np.asarray(condition(np.array([-1, 0, 2])))
    assert (none == 0).all() and np.abs(first - last).max() > 1e-3
    np.testing.assert_array_equal(last, params["label_embed"]["embedding"][2])


def test_states_of_a_clip_without_its_embeddings_are_refused():
    with pytest.raises(ValueError, match="text lacks text.pool_heads"):  # those of a T5
        build(embed_dim=0, text=dict(states_width=4, context_length=LENGTH, width=8))

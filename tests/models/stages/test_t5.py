"""A T5-shaped encoder learns masked tokens, and diffusion stages read its states (Imagen)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.diffusion import schedules
from dalle2_jax.models.diffusion.guidance import dynamic_threshold
from dalle2_jax.models.diffusion.process import Prediction
from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.stages.conditions import LowRes

ENCODER = dict(
    vocab_size=12, width=16, depth=1, num_heads=2, mlp_width=24, head_dim=8, context_length=6, mask_token=11
)
TEXT = dict(states_width=16, context_length=6, width=16, pool_heads=2)
NET = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_dim=8)
RNG = np.random.default_rng(0)


def stage(name, **model):
    return models.build_stage({"stage": name, "model": model})


def randomised(params):
    return jax.tree.map(lambda x: x + 0.1 * RNG.standard_normal(x.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def encoder():
    made = stage("t5", **ENCODER)
    tokens = RNG.integers(1, 11, (4, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([6, 4, 2, 1])[:, None]
    params = jax.jit(made.init)(jax.random.key(0), {"tokens": tokens, "token_mask": mask})
    return made, params, tokens, mask


def test_the_default_is_the_encoder_of_xxl():
    """By the shapes of t5-v1_1-xxl, whose table is padded from 32,100 ids to 32,128."""
    sizes = [leaf.size for leaf in jax.tree.leaves(models.abstract_params(stage("t5")))]
    assert sum(sizes) == 4_762_310_656 and 32_128 * 4096 in sizes


def test_the_loss_counts_real_tokens_alone(encoder):
    made, params, tokens, mask = encoder
    batch = {"tokens": np.tile(tokens, (64, 1)), "token_mask": np.tile(mask, (64, 1))}
    loss = jax.jit(made.loss)
    value, scalars, _ = loss(params, jax.random.key(1), batch)
    table = jax.tree.map(jnp.zeros_like, params["token_embedding"])
    even = loss(params | {"token_embedding": table}, jax.random.key(1), batch).value
    assert float(even) == pytest.approx(2 * np.log(12), rel=1e-6)  # of masked and of kept tokens
    # spans of three at a rate of 0.15 overlap a little, and begin at the first token at the earliest
    assert 0.06 < float(scalars["masked"]) < 0.15
    other = {"tokens": np.where(batch["token_mask"], batch["tokens"], 3), "token_mask": batch["token_mask"]}
    assert float(loss(params, jax.random.key(1), other).value) == pytest.approx(float(value), rel=1e-6)


def test_kept_tokens_have_a_loss(encoder):
    """Stages read their states, which nothing else trains."""
    made, params, tokens, mask = encoder
    made = dataclasses.replace(made, mask_rate=1e-9)
    value, scalars, _ = made.loss(params, jax.random.key(1), {"tokens": tokens, "token_mask": mask})
    states, table = made.encode_text(params, tokens, mask), params["token_embedding"]["embedding"]
    log_p = jax.nn.log_softmax(states @ table.T / 4)  # 4: the square root of the width
    own = np.take_along_axis(np.asarray(log_p), tokens[..., None], axis=-1)[..., 0]
    assert scalars["masked_loss"] == 0 and float(scalars["masked"]) == 0
    assert float(value) == pytest.approx(-own[mask].mean(), rel=1e-5)


def test_a_batch_gets_states(encoder):
    """The frozen encoder computes `text_states` of the run's tokens; no other field is needed."""
    made, params, tokens, mask = encoder
    decoder = stage("decoder", image_size=8, embed_dim=0, text=TEXT, **NET)
    frozen = Frozen(decoder, {"t5": made})
    assert set(frozen.dataset_spec(4)) == {"image", "tokens", "token_mask"}
    batch = {"image": jnp.zeros((4, 8, 8, 3)), "tokens": tokens, "token_mask": mask}
    filled = frozen.encode_batch({"t5": params}, batch)
    states = np.asarray(filled["text_states"])
    assert set(filled) == {"image", "token_mask", "text_states"} and states.shape == (4, 6, 16)
    np.testing.assert_array_equal(states, made.encode_text(params, tokens, mask))


def test_a_dropped_caption_is_zeros_that_are_all_read(encoder):
    """One null for the vector and the keys (Imagen, IF); the null of guidance drops caption and class."""
    _, _, _, mask = encoder
    made = stage("decoder", image_size=8, embed_dim=0, text=TEXT, num_classes=3, label_drop=0.1, **NET)
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: np.float32(0.3) * draw.standard_normal(x.shape).astype(np.float32),
        models.abstract_params(made),
    )
    batch = {"text_states": draw.standard_normal((4, 6, 16)).astype(np.float32), "token_mask": mask}
    batch["label"] = np.array([0, 1, 2, 2])

    @jax.jit
    def embedded(batch, drop_caption, drop_label):
        read = made._read(batch, {"caption": drop_caption, "label": drop_label})
        return made.net.apply({"params": params}, **read, method="condition")

    no, one = np.zeros(4, bool), np.arange(4) == 1
    emb, context, read = jax.device_get(embedded(batch, one, no))
    kept_emb, kept_context, kept_mask = jax.device_get(embedded(batch, no, no))
    np.testing.assert_array_equal(kept_mask, mask)
    np.testing.assert_array_equal(read, mask | one[:, None])
    np.testing.assert_allclose(context[1], np.tile(params["text_states_proj"]["bias"], (6, 1)), atol=1e-6)
    for found, before in ((emb, kept_emb), (context, kept_context)):
        np.testing.assert_array_equal(found[~one], before[~one])
        assert np.abs(found[1] - before[1]).max() > 1e-2
    zeros = {"text_states": 0 * batch["text_states"], "token_mask": np.ones_like(mask)}
    np.testing.assert_allclose(emb[1], embedded(batch | zeros, no, no).emb[1], atol=1e-5)
    null = jax.jit(lambda batch: made._conditionings(params, batch, 4, null=True)[0])(batch)
    expected = embedded(batch | zeros, no, ~no)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tuple(null), tuple(expected))


def test_padding_is_read_where_it_is_not_masked(encoder):
    """IF reads all positions; others read the caption's."""
    _, _, tokens, mask = encoder
    batch = {"token_mask": mask, "text_states": RNG.standard_normal((4, 6, 16)), "image": np.zeros(4)}
    for masked in (True, False):
        made = stage("decoder", image_size=8, embed_dim=0, text=dict(TEXT, masked=masked), **NET)
        read = made.conditions[0].read(batch, np.zeros(4, bool), null=False)
        np.testing.assert_array_equal(read["token_mask"], mask if masked else np.ones_like(mask))


def test_enlarging_with_aligned_corners_equals_torchs_rule():
    """Corners stay; between them the picture is linear, by numpy's interpolation along each axis."""
    low = LowRes(4, 3, "align_corners")
    x = RNG.standard_normal((2, 4, 4, 3)).astype(np.float32)
    at, places = np.linspace(0, 3, 12), np.arange(4)
    rows = np.apply_along_axis(lambda y: np.interp(at, places, y), 1, x)
    expected = np.apply_along_axis(lambda y: np.interp(at, places, y), 2, rows)
    np.testing.assert_allclose(low.enlarge(x), expected, atol=1e-5)
    yx = np.array([[0, 0], [5, 2]], np.int32)
    windows = low.enlarged_windows(x, yx, (6, 6))
    np.testing.assert_allclose(windows[1], expected[1, 5:11, 2:8], atol=1e-5)


def test_noise_behind_the_enlarging_is_that_of_single_pixels():
    """Before it, neighbours share their noise; both have the same level in training and in sampling."""
    schedule, keys = schedules.make_schedule("cosine", 10), jax.random.split(jax.random.key(0), 2)
    small, named = jnp.zeros((2, 8, 8, 3)), {"level": keys[0], "noise": keys[1]}
    batch = {"low_res": small, "crop_yx": jnp.zeros((2, 2), jnp.int32), "image": jnp.zeros((2, 32, 32, 3))}
    for behind in (False, True):
        low = LowRes(8, 4, "nearest", 1.0, 0.5, behind)
        for found in (
            low.for_sampling(keys, small, schedule),
            low.for_training(named, batch, schedule, True),
        ):
            up = np.asarray(found["low_res_up"])
            assert up.shape == (2, 32, 32, 3)
            assert (up[:, ::4] == up[:, 1::4]).all() == (not behind)


def test_the_threshold_has_a_most():
    """s = min(max(1, percentile), most), and the picture is divided by it (IF: 1.5)."""
    schedule = schedules.make_schedule("cosine", 10)
    x0 = jnp.array([[4.0, 2.0, -4.0, 0.5]])
    denoise = dynamic_threshold(lambda x, t: Prediction(x0, x0), schedule, 100, 1.5)
    found = denoise(jnp.ones((1, 4)), jnp.zeros(1, jnp.int32)).x0
    np.testing.assert_allclose(found, [[1, 1, -1, 0.5 / 1.5]], rtol=1e-6)


@pytest.fixture(scope="module")
def reader():
    """(upsampler with a caption and a class that training drops, random parameters)."""
    made = stage(
        "upsampler",
        image_size=8,
        low_res_size=4,
        crop_size=8,
        text=TEXT,
        text_drop=0.1,
        guidance_scale=2.0,
        threshold=99.0,
        low_res_noise=1.0,
        num_steps=2,
        net=dict(efficient=True, context_norm="layer", emb_dim=12),
        **{**NET, "num_res_blocks": (1, 1), "attention_resolutions": (2,)},
    )
    spec = made.batch_spec(2)
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in spec.items()}
    return made, randomised(jax.jit(made.init)(jax.random.key(0), zeros))


def test_an_upsampler_is_guided_by_captions(reader):
    """Guidance 1 is the conditional network, and the null is zeros that are all read."""
    made, params = reader
    assert made.sampling["guidance_scale"] == 2 and made.sampling["threshold"] == 99
    keys = jax.random.split(jax.random.key(0), 2)
    states = RNG.standard_normal((2, 6, 16)).astype(np.float32)
    batch = {"low_res": RNG.standard_normal((2, 4, 4, 3)).astype(np.float32), "text_states": states}
    batch["token_mask"] = np.ones((2, 6), bool)

    def drawn(scale, **changes):
        return np.asarray(
            jax.jit(lambda b: made.sample(params, keys, b, guidance_scale=scale))(batch | changes)
        )

    one, two = drawn(1), drawn(jnp.float32(2.0))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(drawn(jnp.float32(1.0)), one, atol=1e-5)
    null = drawn(jnp.float32(3.0), text_states=np.zeros_like(states))  # its own null: no scale matters
    np.testing.assert_allclose(null, drawn(1, text_states=np.zeros_like(states)), atol=1e-4)
    made.check(made.sampling | dict(guidance_scale=3.0))


def test_an_upsamplers_loss_reads_states(reader):
    made, params = reader
    spec = made.batch_spec(2)
    batch = {name: RNG.standard_normal(x.shape).astype(np.float32) for name, x in spec.items()}
    batch |= {"token_mask": np.ones((2, 6), bool), "crop_yx": np.zeros((2, 2), np.int32)}
    loss = jax.jit(lambda b: made.loss(params, jax.random.key(0), b, train=False).value)
    other = batch | {"text_states": batch["text_states"] + 1}
    assert abs(float(loss(batch)) - float(loss(other))) > 1e-6


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(text=dict(TEXT, pool_heads=3)), "pool_heads 3 must divide"),
        (dict(text={k: v for k, v in TEXT.items() if k != "pool_heads"}), "lacks text.pool_heads"),
        (dict(text=dict(TEXT, null_tokens=2)), "text.null_tokens is not a setting"),
    ],
)
def test_settings_of_states_are_checked(model, message):
    with pytest.raises(ValueError, match=message):
        stage("decoder", image_size=8, embed_dim=0, **NET, **model)


def test_guidance_without_a_null_is_refused():
    with pytest.raises(ValueError, match="needs a null: set text_drop or label_drop"):
        stage("upsampler", image_size=64, low_res_size=16, num_classes=3, guidance_scale=2.0)
    with pytest.raises(ValueError, match="mask_token 12 must be an id below"):
        stage("t5", **ENCODER | dict(mask_token=12))

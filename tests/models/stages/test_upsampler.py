"""The upsampler: that the small picture lies under the large one in training as in sampling, and learning.

Pictures made from crops and whole ones cannot be compared pixel by pixel, not even away from borders: group
norm takes its statistics over all positions of its input. What is compared is the network's input.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.diffusion import sampling, schedules
from dalle2_jax.models.stages import diffusion, upsampler
from dalle2_jax.runtime import partition
from tests.learned import assert_within, descend, key_of
from tests.tiny_model import random_params

KEY = jax.random.key(0)
CHEAP_KEY = jax.random.key(0, impl="rbg")  # programs full of the default's draws take long to compile
RNG = np.random.default_rng(0)


def build(**changes):
    settings = dict(
        image_size=16,
        low_res_size=4,
        crop_size=8,
        channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        dropout=0.0,
        objective="v",
        num_steps=10,
    )
    return upsampler.build(**settings | changes)


def pictures(*shape):
    """Uniform in [-1, 1]."""
    return RNG.uniform(-1, 1, shape).astype(np.float32)


def cubic_matrix(size, factor):
    """[factor size, size] weights of Keys' cubic kernel (a = -1/2), pixel centres at halves, renormalised
    where the kernel leaves the picture."""
    centre = (np.arange(factor * size) + 0.5) / factor - 0.5
    d = np.abs(centre[:, None] - np.arange(size))
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d <= 1, near, np.where(d <= 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def enlarged(low_res, factor=4):
    """low_res [B, h, w, C] in float64, `factor` times as large."""
    rows, columns = (cubic_matrix(size, factor) for size in low_res.shape[1:3])
    return np.einsum("yh,bhwc,xw->byxc", rows, low_res.astype(np.float64), columns)


@dataclasses.dataclass
class Spy:
    """A network that notes the small picture that it is given, and returns it."""

    seen: list = dataclasses.field(default_factory=list)
    deterministic: list = dataclasses.field(default_factory=list)
    levels: list = dataclasses.field(default_factory=list)
    times: list = dataclasses.field(default_factory=list)

    def apply(
        self, variables, x_t, t, conditions, low_res_up=None, low_res_t=None, deterministic=True, **options
    ):
        self.seen.append(low_res_up)
        self.levels.append(low_res_t)
        self.times.append(t)
        self.deterministic.append(deterministic)
        return low_res_up


def spying(**changes):
    """An upsampler whose network's prediction of x0 is its own input."""
    return dataclasses.replace(build(objective="x0", **changes), net=Spy())


def seen_in_training(stage, batch, train=True):
    """What the spy of a stage is given, (low_res_up, level)."""

    @jax.jit
    def seen(batch):
        stage.loss({}, CHEAP_KEY, batch, train=train)
        return stage.net.seen[-1], stage.net.levels[-1]

    return jax.device_get(seen(batch))


def test_the_input_is_the_targets_window_of_the_enlarged_picture():
    """Trap 17, for 100 random windows: never an enlarged crop, never another row's."""
    stage, low_res = spying(), pictures(100, 4, 4, 3)
    yx = RNG.integers(0, 16 - 8 + 1, (100, 2)).astype(np.int32)
    image = np.zeros((100, 8, 8, 3), np.float32)
    seen, _ = seen_in_training(stage, {"image": image, "low_res": low_res, "crop_yx": yx})
    expected = [full[y : y + 8, x : x + 8] for full, (y, x) in zip(enlarged(low_res), yx, strict=True)]
    np.testing.assert_allclose(seen, np.stack(expected), atol=1e-5)


def test_dropout_is_for_training_only():
    stage = spying()
    batch = stage.batch_spec(2)
    for train in (True, False):
        jax.eval_shape(lambda batch, train=train: stage.loss({}, KEY, batch, train=train), batch)
    assert stage.net.deterministic == [False, True]


def test_the_input_lies_on_the_target_without_a_shift():
    """A slope survives averaging and cubic enlarging exactly (but for the border): one and the same slope is
    seen in the picture and in the network's input. Half a pixel of shift would be 1/64."""
    stage = spying(image_size=64, low_res_size=16, crop_size=16)
    y, x = np.meshgrid(*[(np.arange(64) + 0.5) / 32 - 1] * 2, indexing="ij")
    full = np.stack([y, x, (x + y) / 2], axis=-1)
    low_res = full.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    corners = RNG.integers(8, 64 - 16 - 8 + 1, (20, 2)).astype(np.int32)
    image = np.stack([full[y : y + 16, x : x + 16] for y, x in corners])
    low_res = np.broadcast_to(low_res.astype(np.float32), (20, 16, 16, 3))
    image = image.astype(np.float32)
    seen, _ = seen_in_training(stage, {"image": image, "low_res": low_res, "crop_yx": corners})
    np.testing.assert_allclose(seen, image, atol=1e-5)


def test_sampling_sees_the_same_enlarged_picture_whole_of_any_size():
    """The sample of a network that repeats its input is that input, to the last step's clip."""
    low_res = np.rint((pictures(2, 6, 3, 3) + 1) * 127.5) / 127.5 - 1
    sample = jax.jit(lambda keys, low_res: spying().sample({}, keys, {"low_res": low_res}))
    out = sample(jax.random.split(CHEAP_KEY, 2), low_res.astype(np.float32))
    np.testing.assert_allclose(out, np.clip(enlarged(low_res), -1, 1), atol=1e-5)


def test_sampling_rounds_the_small_picture_to_256_levels():
    """Upsamplers are trained on pictures with 256 levels, and fed by a sampler that knows none."""
    low_res = np.linspace(-1.2, 1.2, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    stage, keys = spying(resize="nearest"), jax.random.split(CHEAP_KEY, 2)
    out = np.asarray(jax.jit(lambda keys, x: stage.sample({}, keys, {"low_res": x}))(keys, low_res))
    levels = (out + 1) * 127.5
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert np.abs(out[:, ::4, ::4] - np.clip(low_res, -1, 1)).max() <= 0.5 / 127.5 + 1e-5


def test_resize_names_the_filter():
    """ADM and GLIDE enlarge linearly, the released unCLIP weights with a cubic."""
    low_res = pictures(1, 4, 4, 3)
    linear, cubic = jax.device_get(
        [jax.jit(build(**x).low_res.enlarge)(low_res) for x in (dict(resize="linear"), {})]
    )
    # Row 2 of 16 is centred an eighth of a small pixel behind the centre of the first.
    weights = np.array([0.875, 0.125])
    expected = np.einsum("h,w,hwc->c", weights, weights, low_res[0, :2, :2])
    np.testing.assert_allclose(linear[0, 2, 2], expected, atol=1e-6)
    assert np.abs(linear - cubic).max() > 1e-2


@pytest.mark.parametrize("resize", ["nearest", "linear", "lanczos3"])
def test_windows_are_those_of_the_enlarged_picture_with_any_filter(resize):
    """Its corners too, where a filter leaves the picture."""
    stage, low_res = build(resize=resize), pictures(3, 4, 4, 3)
    corners = np.array([[0, 0], [8, 8], [3, 5]], np.int32)
    found = jax.jit(lambda *arguments: stage.low_res.enlarged_windows(*arguments, (8, 8)))(low_res, corners)
    full = np.asarray(jax.jit(stage.low_res.enlarge)(low_res))
    expected = [picture[y : y + 8, x : x + 8] for picture, (y, x) in zip(full, corners, strict=True)]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)


@pytest.mark.parametrize(
    "spacing, num_steps, asked, visited",
    [("fast27", 27, None, "fast27"), ("fast27", 27, 9, "uniform"), ("trailing", 5, 9, "trailing")],
)
def test_another_number_of_steps_keeps_a_spacing_that_has_one(
    spacing, num_steps, asked, visited, monkeypatch
):
    seen = []
    original = schedules.space_timesteps
    monkeypatch.setattr(schedules, "space_timesteps", lambda *a: seen.append(original(*a)) or seen[-1])
    stage = spying(spacing=spacing, num_steps=num_steps)
    batch = {"low_res": jnp.zeros((1, 4, 4, 3))}
    jax.eval_shape(lambda: stage.sample({}, jax.random.split(KEY, 1), batch, num_steps=asked))
    np.testing.assert_array_equal(seen[0], original(asked or num_steps, 1000, visited))


# --- learning ---


BOUNDS = {
    "loss_fell_to": ("<", 0.2),
    "error_to_blurred": ("<", 0.75),
    "largest": ("<", 1 + 1e-6),
    "changed_by_key": (">", 1e-4),
    "changed_by_picture": (">", 0.5),
}


def learn(seed):
    """(losses, full pictures, small pictures, sample) after 200 steps on crops of eight pictures with a sharp
    edge, which averaging 2 x 2 pixels blurs for every other one."""
    stage = build(image_size=8, low_res_size=4, crop_size=4)
    y, x = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    full = np.where(
        [(x > e) if vertical else (y > e) for vertical in (0, 1) for e in (1, 2, 4, 5)], 0.8, -0.8
    )
    full = np.broadcast_to(full[..., None], (8, 8, 8, 3)).astype(np.float32)
    low_res = full.reshape(8, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    crop = jax.vmap(lambda f, yx: jax.lax.dynamic_slice(f, (yx[0], yx[1], 0), (4, 4, 3)))

    def draw(key, whole):
        yx = jax.random.randint(jax.random.fold_in(key, 1), (16, 2), 0, 5)
        return {"image": crop(whole["image"], yx), "low_res": whole["low_res"], "crop_yx": yx}

    whole = {"image": np.tile(full, (2, 1, 1, 1)), "low_res": np.tile(low_res, (2, 1, 1, 1))}
    key = key_of(seed)
    params = jax.jit(stage.init)(key, {"image": jnp.zeros((1, 4, 4, 3))})
    params, metrics = descend(stage, params, key, whole, draw=draw, steps=200, learning_rate=6e-3)
    sample = jax.jit(lambda params, keys, low_res: stage.sample(params, keys, {"low_res": low_res}))
    return np.asarray(metrics["loss"]), full, low_res, functools.partial(sample, params)


def reached(seed, learned=None):
    """From crops of 4 x 4 to whole pictures of 8 x 8, nearer to the truth than enlarging alone; and how much
    a sample changes, at least, with its key and with its small picture."""
    history, full, low_res, sample = learned or learn(seed)
    keys, other_keys = (jax.random.split(jax.random.key(seed + i), 8) for i in (100, 200))
    out = np.asarray(sample(keys, low_res))
    assert out.shape == full.shape
    by_key, by_picture = (
        np.abs(x - out).max(axis=(1, 2, 3)) for x in (sample(other_keys, low_res), sample(keys, -low_res))
    )
    return {
        "loss_fell_to": history[-20:].mean() / history[0],
        "error_to_blurred": np.square(out - full).mean() / np.square(enlarged(low_res, 2) - full).mean(),
        "largest": np.abs(out).max(),
        "changed_by_key": by_key.min(),
        "changed_by_picture": by_picture.min(),
    }


@pytest.mark.slow  # the decoder learns in every run
def test_eight_pictures_are_sharpened():
    assert_within(reached(0), BOUNDS)


def test_a_sample_depends_on_its_own_key_and_picture_alone():
    stage, low_res = build(image_size=8, low_res_size=4, crop_size=4), pictures(8, 4, 4, 3)
    jitted = jax.jit(lambda params, keys, low_res: stage.sample(params, keys, {"low_res": low_res}))
    sample = functools.partial(jitted, random_params(stage, 0))
    keys = jax.random.split(KEY, 8)
    out = sample(keys, low_res)
    np.testing.assert_array_equal(out, sample(keys, low_res))
    own = np.arange(8) < 3
    mixed_keys = jnp.where(own, keys, jax.random.split(jax.random.key(1), 8))
    mixed = sample(mixed_keys, np.where(own[:, None, None, None], low_res, -low_res))
    np.testing.assert_allclose(mixed[:3], out[:3], atol=1e-4)
    assert (np.abs(mixed - out)[3:].max(axis=(1, 2, 3)) > 1e-2).all()


# --- settings ---


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(low_res_size=5), "image_size 16 must be a multiple of low_res_size 5"),
        (dict(crop_size=7, channel_mult=(1, 2)), "crop_size 7 must be a multiple of 2"),
        (dict(crop_size=32), "crop_size 32 must be at most image_size 16"),
    ],
)
def test_sizes_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_the_crop_is_a_quarter_of_the_side_unless_given():
    """Table 3 of the paper."""
    assert upsampler.build().crop_size == 64
    assert upsampler.build(image_size=1024, low_res_size=256).crop_size == 256
    assert upsampler.build().batch_spec(2)["image"].shape == (2, 64, 64, 3)


# Options


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (8, 21)])
def test_tiles_of_a_pointwise_network_are_the_whole(shape):
    """Blending may not change what every window agrees on, and each pixel is in some window."""
    picture, other = pictures(2, *shape, 3), pictures(2, *shape, 1)
    draw = jax.jit(lambda *x: diffusion.in_tiles(lambda parts: parts[0] ** 2 + parts[1], x, 8))
    drawn = draw(picture, other)
    np.testing.assert_allclose(drawn, picture**2 + other, atol=1e-5)


def test_tiles_are_blended_without_seams():
    """Windows that disagree by a constant meet in a ramp, not in a step."""
    size = 64

    def corner(parts):
        return jnp.broadcast_to(parts[0][:, :1, :1], parts[0].shape)

    x = np.broadcast_to(np.arange(size, dtype=np.float32)[None, None, :, None], (1, 16, size, 1))
    drawn = np.asarray(jax.jit(lambda x: diffusion.in_tiles(corner, (x,), 16))(x))[0, 0, :, 0]
    steps = np.diff(drawn)
    assert steps.min() >= -1e-5 and drawn[0] == 0 and drawn[-1] == size - 16
    assert 0 < steps.max() < 0.6 * 12  # windows are 12 apart, and a seam would jump by all of it


def test_a_picture_drawn_in_tiles_is_close_to_the_whole_one():
    """A random network of one level, whose reach is a few pixels; its norms see a window's statistics."""
    stage = build(num_steps=3)
    low_res = {"low_res": pictures(2, 6, 6, 3)}
    params = jax.jit(stage.init)(CHEAP_KEY, models.zeros(stage.batch_spec(1)))
    kernel = params["net"]["conv_out"]["kernel"]
    params["net"]["conv_out"]["kernel"] = 0.02 * RNG.standard_normal(kernel.shape).astype(np.float32)
    keys = jax.random.split(CHEAP_KEY, 2)
    drawn = {
        tile: np.asarray(jax.jit(functools.partial(stage.sample, tile=tile))(params, keys, low_res))
        for tile in (None, 16, 24, 32)
    }
    assert drawn[None].shape == (2, 24, 24, 3)
    np.testing.assert_array_equal(drawn[24], drawn[None])  # one tile is the whole
    np.testing.assert_array_equal(drawn[32], drawn[None])
    difference = np.abs(drawn[16] - drawn[None]).mean()
    assert 0 < difference < 0.1 * np.abs(drawn[None] - drawn[None].mean()).mean()


def test_drawing_in_tiles_needs_memory_for_a_tile_and_three_pictures():
    """By the compiler's plan. Whole pictures need four times as much for twice the side."""

    @functools.cache
    def planned(side, tile):
        stage = build(image_size=side, low_res_size=side // 4, channels=32, channel_mult=(1, 2), num_steps=2)
        params = models.abstract_params(stage)
        low_res = {"low_res": jax.ShapeDtypeStruct((1, side // 4, side // 4, 3), jnp.float32)}
        sample = jax.jit(lambda params, low_res: stage.sample(params, KEY[None], low_res, tile=tile))
        program = sample.lower(params, low_res).compile(partition.compiler_options(once=True))
        return program.memory_analysis().temp_size_in_bytes

    small, large = 64, 128
    picture = 4 * 3 * large**2
    assert planned(large, None) > 3.5 * planned(small, None) > 3.5 * planned(small, 32)
    assert planned(large, 32) < planned(small, 32) + 3 * picture < planned(large, None) / 8


def test_noise_conditioning_noises_what_the_network_sees_and_says_how_far():
    stage = spying(low_res_noise=0.5, low_res_level=0.2)
    low_res = pictures(64, 4, 4, 3)
    batch = {"image": np.zeros((64, 8, 8, 3), np.float32), "crop_yx": np.zeros((64, 2), np.int32)}
    batch["low_res"] = low_res
    seen, levels = seen_in_training(stage, batch)
    assert levels.min() < 50 and 450 < levels.max() < 500
    clean = enlarged(low_res)[:, :8, :8]
    error = np.abs(seen - clean).mean(axis=(1, 2, 3))
    assert np.corrcoef(levels, error)[0, 1] > 0.8 and error[levels < 20].max(initial=0) < 0.1
    assert (seen_in_training(stage, batch, train=False)[1] == 0).all()

    @jax.jit
    def level_in_sampling(keys, low_res):
        stage.sample({}, keys, {"low_res": low_res})
        return stage.net.levels[-1]

    assert (np.asarray(level_in_sampling(jax.random.split(CHEAP_KEY, 64), low_res)) == 200).all()
    params = models.abstract_params(build(low_res_noise=0.5))
    assert "low_res_time" in params and "low_res_time" not in models.abstract_params(build())
    for changes, message in (
        (dict(low_res_level=0.2), "low_res_level 0.2 must be in 0 .. low_res_noise"),
        (dict(tile=6, channel_mult=(1, 1, 1)), "tile 6 must be a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**changes)


def test_level_and_noise_of_the_small_picture_are_its_own():
    """In training the level is no function of the time, in sampling the noise is not that of the picture."""
    stage, keys = spying(low_res_noise=1.0), jax.random.split(CHEAP_KEY, 2)
    batch = {"image": np.zeros((400, 8, 8, 3), np.float32), "crop_yx": np.zeros((400, 2), np.int32)}
    batch["low_res"] = np.zeros((400, 4, 4, 3), np.float32)

    @jax.jit
    def drawn(batch):
        stage.loss({}, CHEAP_KEY, batch)
        return stage.net.times[-1], stage.net.levels[-1]

    times, levels = jax.device_get(drawn(batch))
    assert min(times.std(), levels.std()) > 250 and abs(np.corrcoef(times, levels)[0, 1]) < 0.25
    low = dataclasses.replace(stage.low_res, factor=1, level=1.0)
    noise = low.for_sampling(keys, jnp.zeros((2, 16, 16, 3)), stage.diffusion.schedule)["low_res_up"]
    first = sampling.init_noise(keys, (16, 16, 3))
    assert np.std(noise) > 0.5 and abs(np.corrcoef(np.ravel(noise), np.ravel(first))[0, 1]) < 0.2


def test_an_upsampler_reads_captions_classes_and_what_is_kept():
    text = dict(vocab_size=9, context_length=4, width=8, depth=1, num_heads=2)
    told = dict(text=text, num_classes=3, inpaint=True, attention_resolutions=(16,), head_dim=8)
    stage = build(**told, channels=8, num_steps=2)
    assert {"tokens", "token_mask", "label"} <= stage.batch_spec(1).keys()
    assert stage.context_length == 4 and build().context_length is None
    shapes = models.abstract_params(stage)
    params = jax.tree.map(lambda x: np.asarray(0.3 * RNG.standard_normal(x.shape), np.float32), shapes)
    batch = {
        "image": pictures(2, 8, 8, 3),
        "low_res": pictures(2, 4, 4, 3),
        "crop_yx": np.array([[0, 3], [8, 1]], np.int32),
        "tokens": np.array([[1, 2, 3, 0], [4, 5, 0, 0]], np.int32),
        "token_mask": np.array([[True, True, True, False], [True, True, False, False]]),
        "label": np.array([0, 2], np.int32),
    }
    assert jax.eval_shape(stage.loss, params, CHEAP_KEY, batch).value.shape == ()
    keys, kept, whole = jax.random.split(CHEAP_KEY, 2), pictures(2, 16, 16, 3), np.ones((2, 16, 16, 1))
    right = whole * (np.arange(16) >= 8)[:, None]

    @jax.jit
    def sample(params, batch, image, mask):
        return stage.sample(params, keys, batch | {"inpaint_image": image, "inpaint_mask": mask}, tile=8)

    draw = functools.partial(sample, params)
    drawn = draw(batch, kept, right)
    np.testing.assert_allclose(drawn[:, :, :8], kept[:, :, :8], atol=1e-6)
    captions = {name: batch[name][::-1] for name in ("tokens", "token_mask")}
    for change in (captions, {"label": batch["label"][::-1]}):
        assert np.abs(draw(batch | change, kept, right) - drawn)[:, :, 8:].max() > 1e-4
    # the network sees what is kept, and nothing of what is drawn anew
    np.testing.assert_array_equal(draw(batch, kept, whole), draw(batch, -kept, whole))
    assert np.abs(draw(batch, kept * [0.5, 1, 1], right) - drawn)[:, :, 8:].max() > 1e-4
    with pytest.raises(ValueError, match="text is read by attention layers: set attention_resolutions"):
        build(text=text)

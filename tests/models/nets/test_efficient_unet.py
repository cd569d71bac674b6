"""Imagen's Efficient U-Net: its size by level, where it halves, what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.denoiser import DenoiserNet
from dalle2_jax.models.nets.efficient_unet import EfficientUNet
from dalle2_jax.models.nets.unet import Style
from dalle2_jax.runtime.modeldir import flatten

RNG = np.random.default_rng(0)
STYLE = Style(efficient=True, emb_dim=1024, context_norm="layer")
PAPER = dict(
    out_channels=3,
    channels=128,
    channel_mult=(1, 2, 4, 8),
    num_res_blocks=(2, 4, 8, 8),
    attention_resolutions=(16,),
    num_heads=8,
    style=STYLE,
)


def shapes(net, side, context_width):
    """Names -> shapes of the parameters, without computing anything."""
    args = jnp.zeros((1, side, side, 6)), jnp.zeros((1, 1024)), jnp.zeros((1, 2, context_width))
    with layers.shapes_only(True):
        return flatten(jax.eval_shape(lambda: net.init(jax.random.key(0), *args, image_size=side))["params"])


def test_the_papers_upsampler_has_its_count_level_by_level():
    found = shapes(EfficientUNet(**PAPER), 256, 1024)
    counts = {}
    for name, leaf in found.items():
        part = "_".join(name.split("/")[0].split("_")[:2])
        counts[part] = counts.get(part, 0) + leaf.size

    def res(before, width):  # two convolutions of 3 x 3, the skip, two norms
        return 9 * before * width + 9 * width**2 + before * width + 3 * width + 2 * (before + width)

    for level, (width, blocks) in enumerate(zip((128, 256, 512, 1024), (2, 4, 8, 8), strict=True)):
        before, after = max(width // 2, 128), max(width // 2, 128)
        ends = 9 * before * width + width + 1025 * width  # the convolution that halves, the embeddings
        down = ends + blocks * res(width, width)
        up = 9 * width * after + after + 1025 * width + blocks * res(2 * width, width)
        if level == 3:  # q, k, v and out; keys and values of 1024 entries a token; two norms
            attention = 4 * (width**2 + width) + 2 * (1024 * width + width) + 2 * width + 2 * 1024
            down, up = down + attention, up + attention
        assert counts[f"down_{level}"] == down and counts[f"up_{level}"] == up, level
    assert sum(counts.values()) == pytest.approx(544.8e6, rel=0.02)  # Imagen's 600M less its text pooling


def test_levels_halve_first_and_double_last():
    """Blocks of level i run at side / 2^(i + 1); the output has the side of the input."""
    net = EfficientUNet(3, 8, (1, 2), (1, 2), (4,), num_heads=2, style=Style(efficient=True))
    x, emb = RNG.standard_normal((2, 16, 16, 6)), RNG.standard_normal((2, 8))
    context = RNG.standard_normal((2, 3, 5))
    variables = jax.jit(lambda: net.init(jax.random.key(0), x, emb, context, image_size=16))()
    _, state = net.apply(
        variables, x, emb, context, image_size=16, capture_intermediates=True, mutable=["intermediates"]
    )
    sides = {
        name: value["__call__"][0].shape[1]
        for name, value in state["intermediates"].items()
        if "_res_" in name or "_attn_" in name or "conv" in name
    }
    assert sides == dict(
        conv_in=16,
        down_0_res_0=8,
        down_1_res_0=4,
        down_1_res_1=4,
        down_1_attn_0=4,
        up_1_res_0=4,
        up_1_res_1=4,
        up_1_attn_0=4,
        up_0_res_0=8,
        conv_out=16,
    )
    with pytest.raises(ValueError, match="multiples of 4"):
        net.apply(variables, x[:, :6], emb, context, image_size=16)


def test_skips_are_scaled_by_the_root_of_a_half():
    """A block without a second convolution is its 1x1 one alone, of [h, skip / sqrt(2)]; h is the last state
    + embeddings."""
    net = EfficientUNet(3, 8, (1,), (1,), style=Style(efficient=True))
    x, emb = RNG.standard_normal((1, 8, 8, 6)), RNG.standard_normal((1, 8))
    with layers.shapes_only(True):
        tree = jax.eval_shape(lambda: net.init(jax.random.key(0), x, emb, image_size=8))["params"]
    params = jax.tree.map(lambda leaf: RNG.standard_normal(leaf.shape).astype(np.float32), tree)
    block = params["up_0_res_0"]
    block["conv2"] = jax.tree.map(np.zeros_like, block["conv2"])

    @jax.jit
    def inner(params):
        kept = dict(capture_intermediates=True, mutable=["intermediates"])
        found = net.apply({"params": params}, x, emb, image_size=8, **kept)[1]["intermediates"]
        return [found[name]["__call__"][0] for name in ("down_0_res_0", "up_0_emb_proj", "up_0_res_0")]

    skip, added, out = jax.device_get(inner(params))
    h = np.concatenate([skip + added[:, None, None], skip / np.sqrt(2)], axis=-1)
    expected = h @ block["skip"]["kernel"][0, 0] + block["skip"]["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


def test_it_reads_time_text_and_mask_and_the_gradient_reaches_all():
    settings = dict(out_channels=3, channels=8, channel_mult=(1, 2), num_res_blocks=(1, 1))
    settings |= dict(attention_resolutions=(4,), num_heads=2, style=Style(efficient=True, emb_dim=12))
    net = DenoiserNet(settings, 16, num_classes=3)
    x, t, low = RNG.standard_normal((2, 16, 16, 3)), np.array([3, 9]), RNG.standard_normal((2, 16, 16, 3))
    label = {"label": np.array([0, 2])}
    params = jax.jit(lambda: net.init(jax.random.key(0), x, t, label, low, t))()["params"]
    params = jax.tree.map(lambda p: p + 0.1 * RNG.standard_normal(p.shape).astype(np.float32), params)

    @jax.jit
    def apply(params, t, level, label):
        return net.apply({"params": params}, x, t, {"label": label}, low, level)

    out = apply(params, t, t, label["label"])
    for changed in ((t + 50, t, label["label"]), (t, t + 50, label["label"]), (t, t, np.array([1, 1]))):
        assert np.abs(apply(params, *changed) - out).max() > 1e-4
    grads = jax.grad(lambda p: jnp.square(apply(p, t, t, label["label"])).sum())(params)
    dead = [name for name, leaf in flatten(grads).items() if not np.abs(leaf).max() > 0]
    assert dead == []


def test_attention_to_the_context_alone():
    """Imagen's 1024 stage has no self-attention: no keys of the picture, and a mask hides tokens."""
    style = Style(efficient=True, context_only=True, context_norm="layer")
    net = EfficientUNet(3, 8, (1,), (1,), (4,), num_heads=2, style=style)
    x, emb = RNG.standard_normal((2, 8, 8, 6)), RNG.standard_normal((2, 8))
    context, mask = RNG.standard_normal((2, 3, 5)), np.array([[True, True, False]] * 2)
    init = jax.jit(lambda: net.init(jax.random.key(0), x, emb, context, mask, image_size=8))
    params = jax.tree.map(lambda p: p + 0.3, init()["params"])
    assert set(params["down_0_attn_0"]) == {"norm", "norm_context", "q", "text_kv", "out"}
    apply = jax.jit(lambda c: net.apply({"params": params}, x, emb, c, mask, image_size=8))
    hidden, read = context.copy(), context.copy()
    hidden[:, 2] = RNG.standard_normal((2, 5))
    read[:, 1] = RNG.standard_normal((2, 5))
    np.testing.assert_array_equal(apply(hidden), apply(context))
    assert np.abs(apply(read) - apply(context)).max() > 1e-4

"""The U-Net against diffusers' networks with random weights, and what remat and bfloat16 leave as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.denoiser import DenoiserNet
from dalle2_jax.models.nets.unet import AttentionBlock, ResBlock, Style, TimeEmbedding, UNet
from dalle2_jax.preflight import hlo
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.modeldir import flatten

KEY = jax.random.key(0)
CHEAP_KEY = jax.random.key(0, impl="rbg")  # programs full of the default's draws take long to compile
RNG = np.random.default_rng(0)
SIDE, CONTEXT = 8, 12


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def random_params(module, *args, **kwargs):
    """Parameters of the right names and shapes, none of them zero."""
    with layers.shapes_only(True):
        shapes = jax.eval_shape(lambda: module.init(KEY, *args, **kwargs))["params"]
    return jax.tree.map(lambda x: np.float32(0.2) * normal(*x.shape), shapes)


# --- names of diffusers' modules -> ours; kernels are transposed, nothing else changes ---


def dense(layer):
    return {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}


def conv(layer):
    return {
        "kernel": layer.weight.detach().numpy().transpose(2, 3, 1, 0),
        "bias": layer.bias.detach().numpy(),
    }


def norm(layer):
    return {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}


def joined(*layers):
    return {
        "kernel": np.concatenate([dense(layer)["kernel"] for layer in layers], axis=1),
        "bias": np.concatenate([dense(layer)["bias"] for layer in layers]),
    }


def res_block(block):
    params = {
        "norm1": norm(block.norm1),
        "conv1": conv(block.conv1),
        "emb_proj": dense(block.time_emb_proj),
        "norm2": norm(block.norm2),
        "conv2": conv(block.conv2),
    }
    return params | ({"skip": conv(block.conv_shortcut)} if block.conv_shortcut is not None else {})


def attention_block(block):
    params = {"norm": norm(block.group_norm), "out": dense(block.to_out[0])}
    if block.to_k is None:
        params["q"] = dense(block.to_q)
    else:
        params["qkv"] = joined(block.to_q, block.to_k, block.to_v)
    if block.norm_cross is not None:
        params["norm_context"] = norm(block.norm_cross)
    if getattr(block, "add_k_proj", None) is not None:
        params["text_kv"] = joined(block.add_k_proj, block.add_v_proj)
    return params


def resampling(block):
    """A residual block, or a convolution alone."""
    return conv(block.conv) if hasattr(block, "conv") else res_block(block)


def unet(model):
    """(params of TimeEmbedding, params of UNet) of a diffusers UNet2DModel or UNet2DConditionModel."""
    params = {"conv_in": conv(model.conv_in)}

    def add(prefix, block):
        params.update({f"{prefix}_res_{j}": res_block(b) for j, b in enumerate(block.resnets)})
        attentions = getattr(block, "attentions", None) or []
        params.update({f"{prefix}_attn_{j}": attention_block(b) for j, b in enumerate(attentions)})

    for level, block in enumerate(model.down_blocks):
        add(f"down_{level}", block)
        if block.downsamplers is not None:
            params[f"down_{level}_down"] = resampling(block.downsamplers[0])
    params["mid_res_0"], params["mid_res_1"] = (res_block(b) for b in model.mid_block.resnets)
    if getattr(model.mid_block, "attentions", None) and model.mid_block.attentions[0] is not None:
        params["mid_attn"] = attention_block(model.mid_block.attentions[0])
    for level, block in enumerate(reversed(model.up_blocks)):
        add(f"up_{level}", block)
        if block.upsamplers is not None:
            params[f"up_{level}_up"] = resampling(block.upsamplers[0])
    params["norm_out"], params["conv_out"] = norm(model.conv_norm_out), conv(model.conv_out)
    time = {
        "fc1": dense(model.time_embedding.linear_1),
        "fc2": dense(model.time_embedding.linear_2),
    }
    return time, params


def diffusers_model(name, **options):
    """A diffusers network with random weights; gains and biases too, which would be 1 and 0."""
    torch = pytest.importorskip("torch", reason="the oracle is diffusers, which runs on torch")
    diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers' U-Nets")
    torch.manual_seed(0)
    common = dict(sample_size=SIDE, block_out_channels=(128, 256), layers_per_block=1, norm_num_groups=32)
    model = getattr(diffusers, name)(**common | dict(attention_head_dim=64) | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return torch, model


def channels_first(torch, x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def assert_same(actual, expected):
    expected = np.moveaxis(expected.numpy(), 1, -1)
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_the_decoders_unet_equals_karlos():
    """Scale and shift, 4 heads of 64, context in front of the keys with a mask."""
    torch, model = diffusers_model(
        "UNet2DConditionModel",
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=CONTEXT,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    x, emb, context, t = normal(2, SIDE, SIDE, 3), normal(2, 512), normal(2, 5, CONTEXT), np.array([3, 871])
    mask = np.arange(5) < np.array([2, 5])[:, None]
    with torch.no_grad():
        expected = model(
            channels_first(torch, x),
            torch.from_numpy(t),
            torch.from_numpy(context),
            class_labels=torch.from_numpy(emb),
            encoder_attention_mask=torch.from_numpy(mask),
        ).sample
    time, params = unet(model)
    net = UNet(6, 128, (1, 2), 1, attention_resolutions=(4,), head_dim=64)

    @jax.jit
    def ours(time, params, mask):
        total = TimeEmbedding(128).apply({"params": time}, t) + emb
        return net.apply({"params": params}, x, total, context, mask, image_size=SIDE)

    actual = ours(time, params, mask)
    assert_same(actual, expected)
    # The mask matters where it hides something, and nowhere else.
    unmasked = ours(time, params, np.ones_like(mask))
    assert np.abs(unmasked - actual)[0].max() > 1e-3
    np.testing.assert_allclose(unmasked[1], actual[1], atol=1e-5)


@pytest.mark.parametrize("scale_shift", [False, True], ids=["karlo", "paper"])
def test_an_upsamplers_network_equals_diffusers(scale_shift):
    """[x_t, low_res] in the channels, no attention anywhere."""
    torch, model = diffusers_model(
        "UNet2DModel",
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    )
    x_t, low_res_up, t = normal(2, SIDE, SIDE, 3), normal(2, SIDE, SIDE, 3), np.array([0, 640])
    with torch.no_grad():
        both = channels_first(torch, np.concatenate([x_t, low_res_up], axis=-1))
        expected = model(both, torch.from_numpy(t)).sample
    time, params = unet(model)
    settings = dict(
        out_channels=3, channels=128, channel_mult=(1, 2), num_res_blocks=1, scale_shift=scale_shift
    )
    net = DenoiserNet(settings, SIDE)
    actual = jax.jit(net.apply)({"params": {"time": time, "net": params}}, x_t, t, {}, low_res_up)
    assert_same(actual, expected)


@pytest.mark.parametrize("pad", [0, 1], ids=["ddpm", "iddpm"])
def test_resampling_by_convolutions_equals_diffusers(pad):
    """DDPM: one head, sines first, epsilon 1e-6, padding of TensorFlow. With padding 1: improved DDPM's."""
    torch, model = diffusers_model(
        "UNet2DModel",
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=pad,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    x, t = normal(2, SIDE, SIDE, 3), np.array([0, 871])
    with torch.no_grad():
        expected = model(channels_first(torch, x), torch.from_numpy(t)).sample
    time, params = unet(model)
    style = Style(
        resample="conv",
        resample_pad=(pad, 1),
        sin_first=True,
        freq_shift=1,
        norm_epsilon=1e-6,
        norm_groups=32,
    )
    settings = dict(out_channels=3, channels=32, channel_mult=(1, 2), num_res_blocks=1, scale_shift=False)
    settings |= dict(attention_resolutions=(4,), num_heads=1, style=style.check())
    net = DenoiserNet(settings, SIDE)
    assert_same(jax.jit(net.apply)({"params": {"time": time, "net": params}}, x, t), expected)


@pytest.mark.parametrize("stage", ["I", "II", "context only"])
def test_deepfloyds_unet_equals_diffusers(stage):
    """GELU and a norm of the context; in stage II a free width of time, and sums by 1 / 1.414."""
    second = stage == "II"
    torch, model = diffusers_model(
        "UNet2DConditionModel",
        in_channels=3,
        out_channels=6,
        block_out_channels=(64, 128),
        layers_per_block=(1, 2) if second else 1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=32,
        cross_attention_norm="group_norm",
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        only_cross_attention=stage == "context only",
        mid_block_only_cross_attention=stage == "context only",
        **dict(
            time_embedding_dim=96,
            time_embedding_act_fn="gelu",
            resnet_skip_time_act=True,
            resnet_out_scale_factor=1.414,
            mid_block_scale_factor=1.414,
        )
        if second
        else {},
    )
    x, context, t = normal(2, SIDE, SIDE, 3), normal(2, 5, 64), np.array([3, 871])
    with torch.no_grad():
        expected = model(channels_first(torch, x), torch.from_numpy(t), torch.from_numpy(context)).sample
    time, params = unet(model)
    style = Style(activation="gelu", context_norm="group", norm_groups=32)
    style = style._replace(context_only=stage == "context only")
    style = style._replace(emb_dim=96, residual_scale=1 / 1.414) if second else style
    blocks = (1, 2) if second else 1
    net = UNet(6, 64, (1, 2), blocks, attention_resolutions=(4,), head_dim=32, style=style.check())

    @jax.jit
    def ours(time, params):
        emb = TimeEmbedding(64, style).apply({"params": time}, t)
        return net.apply({"params": params}, x, emb, context, image_size=SIDE)

    assert_same(ours(time, params), expected)


def test_imagens_text_pathway_equals_deepfloyds():
    """Projected states in front of the keys, and the pooled vector, added to the embedding of time."""
    torch, model = diffusers_model(
        "UNet2DConditionModel",
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        cross_attention_dim=64,
        attention_head_dim=32,
        cross_attention_norm="group_norm",
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
    )
    x, states, t = normal(2, SIDE, SIDE, 3), normal(2, 5, 24), np.array([3, 871])
    states[1] = 0  # the null caption
    with torch.no_grad():
        expected = model(channels_first(torch, x), torch.from_numpy(t), torch.from_numpy(states)).sample
    time, params = unet(model)
    pool = model.add_embedding.pool
    pooling = {
        "norm1": norm(model.add_embedding.norm1),
        "position": {"embedding": pool.positional_embedding.detach().numpy()[0]},
        "q": dense(pool.q_proj),
        "kv": joined(pool.k_proj, pool.v_proj),
        "proj": dense(model.add_embedding.proj),
        "norm2": norm(model.add_embedding.norm2),
    }
    params = {"time": time, "net": params, "text_pool": pooling}
    params["text_states_proj"] = dense(model.encoder_hid_proj)
    style = Style(activation="gelu", context_norm="group", norm_groups=32, emb_dim=128)
    settings = dict(out_channels=6, channels=32, channel_mult=(1, 2), num_res_blocks=1, head_dim=32)
    settings |= dict(attention_resolutions=(4,), style=style)
    text = dict(states_width=24, context_length=5, width=64, pool_heads=4)
    net = DenoiserNet(settings, SIDE, text=text)
    mask, drop = np.ones((2, 5), bool), np.array([False, True])
    given = normal(2, 5, 24)
    given[0] = states[0]
    conditions = dict(text=given, token_mask=mask, drop_text=drop)
    assert_same(jax.jit(net.apply)({"params": params}, x, t, conditions), expected)


@pytest.mark.parametrize(
    "wrong",
    [dict(resample="pool"), dict(resample_pad=(2, 2)), dict(context_norm="batch"), dict(activation="x")],
)
def test_a_style_that_is_not_built_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).replace("(", "\\(")[:3]):
        Style(**wrong).check()


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "style",
    [Style(), Style(sin_first=True, freq_shift=1), Style(time_scale=0.25, emb_dim=5)],
    ids=["adm", "ddpm", "iddpm"],
)
def test_the_embedding_of_time_equals_its_definition(style):
    """DDPM: sines first, frequencies by half - 1. Improved DDPM: times of T = 4000 by 1000 / T, as floats."""
    net, t = TimeEmbedding(8, style), np.array([0, 3, 999])
    params = random_params(net, t)
    args = t[:, None] * style.time_scale * 10_000.0 ** (-np.arange(4) / (4 - style.freq_shift))
    waves = [np.sin(args), np.cos(args)]
    h = np.concatenate(waves if style.sin_first else waves[::-1], axis=1)
    h = silu(h @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    expected = h @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    assert expected.shape == (3, style.emb_dim or 32)
    np.testing.assert_allclose(jax.jit(net.apply)({"params": params}, t), expected, atol=2e-4)


def test_the_epsilon_of_a_style_reaches_its_norms():
    """Variance 1e-6 beside DDPM's epsilon of 1e-6 halves the variance of the output; 1e-5 would leave 9 %."""
    x = np.float32(1e-3) * np.where(np.arange(64) % 2, 1, -1).astype(np.float32)[None, :, None].repeat(8, 2)
    norm, params = Style(norm_epsilon=1e-6).norm("norm"), {"scale": np.ones(8), "bias": np.zeros(8)}
    np.testing.assert_allclose(np.square(norm.apply({"params": params}, x)).mean(), 0.5, rtol=1e-3)


@pytest.mark.parametrize("pad", [(0, 1), (1, 1)], ids=["ddpm", "iddpm"])
def test_the_convolution_that_halves_begins_where_its_padding_says(pad):
    """Output i reads rows 2i - pad .. 2i - pad + 2; a kernel of its first entry alone copies row 2i - pad."""
    net = UNet(3, 4, (1, 1), 1, scale_shift=False, style=Style(resample="conv", resample_pad=pad))
    x, emb = normal(1, SIDE, SIDE, 3), normal(1, 16)
    params = random_params(net, x, emb, image_size=SIDE)
    kernel = np.zeros((3, 3, 4, 4), np.float32)
    kernel[0, 0] = np.eye(4)
    params["down_0_down"] = {"kernel": kernel, "bias": np.zeros(4, np.float32)}

    @jax.jit
    def around(params):
        kept = dict(capture_intermediates=True, mutable=["intermediates"])
        found = net.apply({"params": params}, x, emb, image_size=SIDE, **kept)[1]["intermediates"]
        return [found[name]["__call__"][0] for name in ("down_0_res_0", "down_0_down")]

    before, after = jax.device_get(around(params))
    padded = np.pad(before, ((0, 0), pad, pad, (0, 0)))
    np.testing.assert_allclose(after, padded[:, :SIDE:2, :SIDE:2], atol=1e-6)


def test_attention_reads_text_and_picture_in_one_softmax():
    """Keys and values of the text, behind a layer norm, are concatenated with the picture's (Imagen, IF)."""
    block = AttentionBlock(4, style=Style(context_norm="layer"))
    x, context, mask = normal(2, 2, 3, 8), normal(2, 3, 5), np.array([[True, True, False], [True] * 3])
    params = random_params(block, x, context, mask)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def normed(name, x, groups):
        y = x.reshape(len(x), -1, groups, x.shape[-1] // groups) if groups else x
        axes = (1, 3) if groups else -1
        y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)
        return y.reshape(x.shape) * params[name]["scale"] + params[name]["bias"]

    q, k, v = np.split(dense("qkv", normed("norm", x, 2).reshape(2, 6, 8)), 3, axis=-1)
    both = np.split(dense("text_kv", normed("norm_context", context, 0)), 2, axis=-1)
    k, v = (np.concatenate(pair, axis=1) for pair in zip(both, (k, v), strict=True))  # the text first
    heads = [y.reshape(2, -1, 2, 4) for y in (q, k, v)]
    logits = np.einsum("bqhd,bkhd->bhqk", heads[0], heads[1]) / 2
    read = np.concatenate([mask, np.ones((2, 6), bool)], axis=1)
    weights = np.exp(logits) * read[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    h = np.einsum("bhqk,bkhd->bqhd", weights, heads[2]).reshape(2, 6, 8)
    expected = x + dense("out", h).reshape(x.shape)
    np.testing.assert_allclose(
        jax.jit(block.apply)({"params": params}, x, context, mask), expected, atol=1e-5
    )


def test_the_sum_of_a_residual_block_is_scaled():
    """Both of its branches (IF's second stage)."""
    x, emb = normal(1, 4, 4, 4), normal(1, 6)
    plain, scaled = (ResBlock(8, style=Style(residual_scale=scale)) for scale in (1.0, 0.7071))
    params = {"params": random_params(plain, x, emb, True)}
    one, other = jax.jit(lambda params: [net.apply(params, x, emb, True) for net in (plain, scaled)])(params)
    np.testing.assert_allclose(other, 0.7071 * one, rtol=1e-5, atol=1e-6)


def test_skips_are_scaled_where_they_join():
    """Scaled skips are skips of a network whose kernels behind them are scaled."""
    plain, half = build(), build(style=Style(skip_scale=0.5))
    x, emb = normal(2, SIDE, SIDE, 3), normal(2, 32)
    params = random_params(plain, x, emb, image_size=SIDE)
    out = [net.apply({"params": params}, x, emb, image_size=SIDE) for net in (plain, half)]
    assert np.abs(out[0] - out[1]).max() > 1e-3
    zero = build(style=Style(skip_scale=0.0)).apply({"params": params}, x, emb, image_size=SIDE)
    for j in range(2):  # without skips the kernels that read them are of no use
        block = params[f"up_0_res_{j}"]
        block["skip"]["kernel"][..., 8:, :] = 0
    without = build(style=Style(skip_scale=0.0)).apply({"params": params}, x, emb, image_size=SIDE)
    assert np.abs(zero - without).max() < 1e-5


def test_what_is_zero_at_the_start():
    """Every residual branch and the output: a fresh network predicts 0, and its blocks change nothing."""
    net = UNet(3, 8, (1,), 1, attention_resolutions=(SIDE,), head_dim=8)
    x, emb = jnp.ones((1, SIDE, SIDE, 3)), jnp.ones((1, 32))
    params = jax.jit(lambda: net.init(CHEAP_KEY, x, emb, image_size=SIDE))()["params"]
    kernels = {name: leaf for name, leaf in flatten(params).items() if name.endswith("kernel")}
    zero = {name.removesuffix("/kernel") for name, leaf in kernels.items() if not leaf.any()}
    branches = {f"{name}/conv2" for name in params if "_res_" in name}
    branches |= {f"{name}/out" for name in params if "_attn" in name}
    assert len(branches) == 5 + 4 and zero == branches | {"conv_out"}


def build(**changes):
    """A U-Net of one level that attends in the middle, which compiles fast."""
    settings = dict(channel_mult=(1,), attention_resolutions=(1,), head_dim=4, dropout=0.5)
    return UNet(6, 8, num_res_blocks=1, **settings | changes)


@pytest.fixture(scope="module")
def small():
    """(arguments, random parameters) of `build()`."""
    args = (normal(2, SIDE, SIDE, 3), normal(2, 32), normal(2, 3, CONTEXT))
    return args, random_params(build(), *args, image_size=SIDE)


def gradient_with_dropout(small, remat):
    args, params = small

    def loss(params):
        out = build(remat=remat).apply(
            {"params": params}, *args, image_size=SIDE, deterministic=False, rngs={"dropout": CHEAP_KEY}
        )
        return jnp.square(out).mean()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.fixture(scope="module")
def plain_gradient(small):
    return gradient_with_dropout(small, "none")


# `products` is what is trained with; `all` is the same without its policy.
@pytest.mark.parametrize("remat", ["products", pytest.param("all", marks=pytest.mark.slow)])
def test_remat_does_not_change_gradients(small, plain_gradient, remat):
    """With dropout, whose second draw has to be the first."""
    again = gradient_with_dropout(small, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain_gradient, again)


def test_remat_does_not_change_names(small):
    args, _ = small
    everything = dict(channel_mult=(1, 2), attention_resolutions=(8, 4))
    names, remat_names = (
        jax.eval_shape(lambda net=net: net.init(KEY, *args, image_size=SIDE))
        for net in (build(**everything), build(**everything, remat="products"))
    )
    assert jax.tree.map(jnp.shape, names) == jax.tree.map(jnp.shape, remat_names)


def test_remat_of_all_but_products_convolves_nothing_twice(small):
    args, params = small

    def operations(what):
        def loss(params):
            return jnp.square(build(remat=what).apply({"params": params}, *args, image_size=SIDE)).mean()

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        return text.count("conv_general_dilated["), text.count(" logistic ")

    (convolutions, activations), (again, more), (all_again, most) = map(
        operations, ("none", "products", "all")
    )
    assert convolutions == again < all_again
    assert activations < more <= most
    with pytest.raises(ValueError, match="remat 'some' is unknown"):
        operations("some")


def test_examples_do_not_meet(small):
    """On devices that have some examples each nothing is moved, and gradients are only summed up."""
    args, params = small
    mesh = partition.make_mesh()
    where = (partition.replicated(mesh), [partition.batch_sharding(mesh)] * len(args))
    rows = [jax.ShapeDtypeStruct((partition.batch_shards(mesh), *x.shape[1:]), x.dtype) for x in args]

    def drawn(params, rows):
        return build().apply({"params": params}, *rows, image_size=SIDE)

    def loss(params, rows):
        return jnp.square(drawn(params, rows)).mean()

    def moved(function):
        with partition.use_mesh(mesh):
            program = jax.jit(function, in_shardings=where).lower(params, rows).compile()
        return hlo.collectives(program.as_text())

    assert moved(drawn) == {}
    assert set(moved(jax.grad(loss))) == {"all-reduce"}


def test_dropout_acts_unless_deterministic():
    x, emb = normal(1, 4, 4, 8), normal(1, 4)
    still, wild = ResBlock(8), ResBlock(8, dropout=0.5)
    variables = {"params": random_params(still, x, emb, True)}
    out, same, dropped = (
        jax.jit(lambda v, x, emb, how=how: how[0].apply(v, x, emb, *how[1:], rngs={"dropout": CHEAP_KEY}))(
            variables, x, emb
        )
        for how in ((still, True), (wild, True), (wild, False))
    )
    np.testing.assert_array_equal(out, same)
    assert np.abs(dropped - out).max() > 1e-2


def test_bfloat16_keeps_float32_parameters_and_outputs(small):
    args, params = small

    def apply(net):
        return jax.jit(lambda params: net.apply({"params": params}, *args, image_size=SIDE))(params)

    net = build(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: net.init(KEY, *args, image_size=SIDE))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    exact, rounded = apply(build()), apply(net)
    assert rounded.dtype == jnp.float32
    gap = np.abs(exact - rounded)
    assert 0 < gap.max() and gap.mean() < 0.03 * np.abs(exact).mean()


def test_image_size_and_not_the_input_says_where_attention_is(small):
    """So that a network can be run at another size than it was trained at."""
    args, _ = small
    net = build(channel_mult=(1, 2), attention_resolutions=(4,))
    shapes = jax.eval_shape(lambda: net.init(KEY, *args, image_size=SIDE))
    large = [np.zeros((1, 2 * SIDE, SIDE, 3), np.float32), *(x[:1] for x in args[1:])]
    out = jax.eval_shape(lambda variables: net.apply(variables, *large, image_size=SIDE), shapes)
    assert out.shape == (1, 2 * SIDE, SIDE, 6)


def test_additive_blocks_have_half_the_projection():
    """Trap 12: weights of one kind do not load as the other."""
    x, emb = jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 4))
    for scale_shift, width in ((True, 16), (False, 8)):
        block = ResBlock(8, scale_shift=scale_shift)
        shapes = jax.eval_shape(lambda b=block: b.init(KEY, x, emb, True))["params"]
        assert shapes["emb_proj"]["kernel"].shape == (4, width)


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="2 levels needs sides that are multiples of 2, got"):
        build(channel_mult=(1, 2)).init(KEY, jnp.zeros((2, 5, 8, 3)), jnp.zeros((2, 4)), image_size=SIDE)


@pytest.mark.parametrize("null_tokens", [0, 2])
def test_a_null_caption_that_is_given_gets_no_gradient(null_tokens):
    text = dict(states_width=4, context_length=5, width=8, null_tokens=null_tokens)
    unet = dict(out_channels=6, channels=8, channel_mult=(1,), num_res_blocks=1)
    net = DenoiserNet(unet, text=text, embed_dim=4, image_size=8)
    shown, dropped = np.zeros(2, bool), np.ones(2, bool)
    inputs = normal(2, 4), shown, normal(2, 5, 4), np.ones((2, 5), bool), dropped, normal(2, 4)
    params = random_params(net, *inputs, method="condition")

    def total(params):
        added, context, _ = net.apply({"params": params}, *inputs, method="condition")
        return (added**2).sum() + (context**2).sum()

    grads = jax.jit(jax.grad(total))(params)
    assert (np.abs(grads["null_text_embed"]).max() > 0) == (null_tokens == 0)
    if null_tokens:
        assert not np.abs(grads["null_text_states"]["embedding"]).max()
    assert np.abs(grads["text_emb_proj"]["kernel"]).max() > 0

"""Shared layers against plain numpy and torch: embeddings of times, group norm, attention, resampling."""

import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from dalle2_jax.models.nets import layers, platforms

TORCH = "the oracle is torch.nn"
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


group_norm = jax.jit(layers.GroupNorm().apply)


def group_norm_reference(x, scale, bias, groups):
    """Group norm of x [B, ..., C] in float64, groups of adjacent channels."""
    grouped = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    var = ((grouped - mean) ** 2).mean(axis=(1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("dim", [8, 7])
def test_times_are_cosines_before_sines(dim):
    t = np.array([0, 1, 37, 999])
    freqs = np.exp(-np.log(10_000) * np.arange(dim // 2) / (dim // 2))
    args = t[:, None] * freqs
    expected = np.concatenate([np.cos(args), np.sin(args), np.zeros((4, dim % 2))], axis=1)
    embedding = jax.jit(layers.timestep_embedding, static_argnums=1)(t, dim)
    assert embedding.dtype == jnp.float32
    # float32 holds 999 rad to 6e-5, and its frequencies are rounded too.
    np.testing.assert_allclose(embedding, expected, atol=2e-4)


def test_32_groups_from_128_channels_on_and_never_an_instance_norm():
    for channels in (128, 192, 256, 320, 512, 960, 1280, 2048):
        assert layers.num_groups(channels) == 32
    for channels in range(1, 400):
        groups = layers.num_groups(channels)
        assert channels % groups == 0 and groups <= 32
        assert channels // groups >= min(4, channels)


@pytest.mark.parametrize("shape", [(2, 5, 5, 128), (3, 7, 24), (2, 4, 6, 10)])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm_equals_its_definition(shape, mean):
    """Also where the mean is large: a variance as E[x^2] - E[x]^2 in float32 would be off by percents."""
    x, scale, bias = normal(*shape) + np.float32(mean), normal(shape[-1]), normal(shape[-1])
    actual = group_norm({"params": {"scale": scale, "bias": bias}}, x)
    expected = group_norm_reference(x, scale, bias, layers.num_groups(shape[-1]))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1.0, mean / 10))


def test_group_norm_equals_torch():
    torch = pytest.importorskip("torch", reason=TORCH)
    x, norm = normal(2, 5, 5, 192), torch.nn.GroupNorm(32, 192, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        expected = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    params = {"scale": norm.weight.detach().numpy(), "bias": norm.bias.detach().numpy()}
    np.testing.assert_allclose(group_norm({"params": params}, x), expected, atol=1e-5)


def test_group_norm_is_one_function_on_every_platform_and_under_differentiation():
    """On a CPU what is drawn takes another way than what is trained."""
    x, scale, bias = (normal(*shape) for shape in ((2, 5, 5, 192), (192,), (192,)))

    def norm(x, scale, bias):
        return layers.GroupNorm().apply({"params": {"scale": scale, "bias": bias}}, x)

    def by(target):
        def pulled(slope, *arguments):
            trained, pull = jax.vjp(norm, *arguments)
            return trained, pull(slope)

        with platforms.assumed(platforms.Target(target)):
            program = str(jax.make_jaxpr(norm)(x, scale, bias))
            drawn = jax.jit(lambda *arguments: norm(*arguments))(x, scale, bias)
            return drawn, *jax.jit(pulled)(slope, x, scale, bias), "dot_general" in program

    slope = normal(2, 5, 5, 192)
    drawn, trained, gradient, is_product = by("cpu")
    elsewhere, trained_elsewhere, their_gradient, other_is_product = by("tpu")
    assert is_product and not other_is_product
    np.testing.assert_allclose(drawn, elsewhere, atol=1e-6)
    np.testing.assert_array_equal(trained, trained_elsewhere)
    np.testing.assert_allclose(trained, elsewhere, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradient, their_gradient, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    wanted = normal(2, 5, 5, 192)
    mean = jax.jit(lambda *a: (norm(*a) * wanted).mean())
    jax.test_util.check_grads(mean, (x, scale, bias), 1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_group_norm_of_small_inputs_tells_epsilon():
    """Variance 1e-5 beside an epsilon of 1e-5 halves the output's variance; Flax's 1e-6 would keep 91 %."""
    x = np.sqrt(1e-5).astype(np.float32) * np.where(np.arange(64) % 2, 1, -1)[None, :, None].repeat(8, 2)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    out = np.asarray(group_norm({"params": params}, x))
    np.testing.assert_allclose(np.square(out).mean(), 0.5, rtol=1e-3)


def test_group_norm_is_float32_in_bfloat16_networks():
    x = jnp.asarray(normal(1, 4, 4, 8), jnp.bfloat16)
    variables = jax.jit(layers.GroupNorm().init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = group_norm(variables, x)
    assert out.dtype == jnp.float32
    expected = group_norm_reference(np.asarray(x, np.float32), 1.0, 0.0, 2)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (1, 1)])
def test_convolutions_pad_as_torch_does(kernel_size, stride):
    torch = pytest.importorskip("torch", reason=TORCH)
    conv = torch.nn.Conv2d(3, 4, kernel_size, stride=stride, padding=kernel_size // 2)
    x = normal(1, 6, 6, 3)
    with torch.no_grad():
        expected = conv(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    params = {
        "kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0),
        "bias": conv.bias.detach().numpy(),
    }
    module = layers.conv(4, kernel_size, stride=stride, dtype=jnp.float32, name="conv")
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_its_definition(masked):
    batch, heads, dim, queries, keys = 2, 3, 4, 5, 7
    q, k, v = (
        normal(batch, queries, heads, dim),
        normal(batch, keys, heads, dim),
        normal(batch, keys, heads, dim),
    )
    mask = np.arange(keys) < np.array([3, 7])[:, None] if masked else np.ones((batch, keys), bool)
    expected = np.empty((batch, queries, heads * dim))
    for b in range(batch):
        for h in range(heads):
            logits = q[b, :, h] @ k[b, :, h].T / np.sqrt(dim)
            weights = np.exp(logits) * mask[b]
            expected[b, :, h * dim : (h + 1) * dim] = weights / weights.sum(1, keepdims=True) @ v[b, :, h]
    given = mask[:, None, None, :] if masked else None
    np.testing.assert_allclose(jax.jit(layers.attention)(q, k, v, given), expected, atol=1e-5)


def test_attention_to_nothing_is_finite():
    q = normal(1, 2, 1, 4)
    assert np.isfinite(jax.jit(layers.attention)(q, q, q, np.zeros((1, 1, 1, 2), bool))).all()


def test_resampling_averages_and_repeats():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    small = np.asarray(jax.jit(layers.downsample)(x))
    assert small.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(small[1, 1, 2], x[1, 2:4, 4:6].mean(axis=(0, 1)))
    large = jax.jit(layers.upsample)(small)
    np.testing.assert_array_equal(large, np.repeat(np.repeat(small, 2, axis=1), 2, axis=2))


def test_activations_are_those_that_weights_were_trained_with():
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    erf = np.vectorize(math.erf)
    np.testing.assert_allclose(layers.activation("gelu")(x), x * 0.5 * (1 + erf(x / np.sqrt(2))), atol=1e-6)
    np.testing.assert_allclose(layers.activation("quick_gelu")(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    np.testing.assert_allclose(layers.activation("silu")(x), x / (1 + np.exp(-x)), atol=1e-6)
    with pytest.raises(ValueError, match="activation 'relu' is unknown; choose one of .*'gelu'"):
        layers.activation("relu")

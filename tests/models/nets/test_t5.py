"""The T5 encoder against transformers' with random weights, its buckets against a table, its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.t5 import T5Encoder, buckets
from dalle2_jax.runtime.modeldir import flatten

SMALL = dict(vocab_size=40, width=24, depth=2, num_heads=3, mlp_width=20, head_dim=8)


def test_buckets_follow_the_rule():
    """Of key - query: nearer than 8 exactly, then by the logarithm up to 128, keys behind from 16 on."""
    row = np.asarray(buckets(400))[200]
    expected = {-1: 1, -7: 7, 0: 0, 1: 17, 7: 23, 8: 24, -8: 8, -11: 8, -12: 9, 12: 25, -16: 10, 16: 26}
    expected |= {-32: 12, -64: 14, -91: 15, 91: 31, -127: 15, -128: 15, -199: 15, 128: 31, 199: 31}
    assert {distance: row[200 + distance] for distance in expected} == expected
    assert (np.diff(row[:200]) <= 0).all() and (np.diff(row[201:]) >= 0).all()


def by_definition(params, tokens, mask):
    """The states of T5 v1.1's encoder of SMALL, in float64 numpy."""

    def norm(x, part):
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * part["scale"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def bucket(r):  # r = key - query
        far = 8 + int(8 * np.log(max(abs(r), 8) / 8) / np.log(16))
        return 16 * (r > 0) + (abs(r) if abs(r) < 8 else min(15, far))

    batch, length = tokens.shape
    bias = params["position_bias"][[[bucket(k - q) for k in range(length)] for q in range(length)]]
    x = params["token_embedding"]["embedding"][tokens].astype(np.float64)
    for i in range(SMALL["depth"]):
        block = params[f"block_{i}"]
        qkv = np.split(norm(x, block["norm1"]) @ block["qkv"]["kernel"], 3, axis=-1)
        q, k, v = (y.reshape(batch, length, SMALL["num_heads"], SMALL["head_dim"]) for y in qkv)
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) + bias.transpose(2, 0, 1)  # no 1 / sqrt(d)
        weights = np.exp(logits) * mask[:, None, None]
        weights /= weights.sum(axis=-1, keepdims=True)
        h = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
        x = x + h @ block["out"]["kernel"]
        h = norm(x, block["norm2"])
        h = gelu(h @ block["fc_gate"]["kernel"]) * (h @ block["fc1"]["kernel"])
        x = x + h @ block["fc2"]["kernel"]
    return norm(x, params["norm_out"])


def test_the_encoder_equals_its_definition():
    net, draw = T5Encoder(**SMALL), np.random.default_rng(0)
    tokens, mask = draw.integers(0, 40, (2, 12)).astype(np.int32), np.arange(12) < np.array([[12], [9]])
    with layers.shapes_only(True):
        shapes = jax.eval_shape(net.init, jax.random.key(0), tokens, mask)["params"]
    params = jax.tree.map(lambda x: np.asarray(0.3 * draw.standard_normal(x.shape) + 0.1, np.float32), shapes)
    params["token_embedding"]["embedding"][::2] *= 2e-3  # beside which the norm's epsilon counts
    expected = by_definition(params, tokens, mask)
    actual = jax.jit(net.apply)({"params": params}, tokens, mask)
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_encoder_equals_transformers(bf16):
    torch = pytest.importorskip("torch", reason="the oracle is transformers, which runs on torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=24,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.2))
            if "layer_norm" in name:
                parameter.add_(1)
    tokens = np.random.default_rng(0).integers(1, 40, (3, 50)).astype(np.int32)
    mask = np.arange(50) < np.array([50, 7, 1])[:, None]
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}

    def kernels(*names):
        return {"kernel": np.concatenate([theirs[name].T for name in names], axis=1)}

    params = {
        "token_embedding": {"embedding": theirs["shared.weight"]},
        "norm_out": {"scale": theirs["encoder.final_layer_norm.weight"]},
        "position_bias": theirs["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    }
    for i in range(2):
        one, two = (f"encoder.block.{i}.layer.{j}" for j in range(2))
        params[f"block_{i}"] = {
            "norm1": {"scale": theirs[f"{one}.layer_norm.weight"]},
            "qkv": kernels(*(f"{one}.SelfAttention.{part}.weight" for part in "qkv")),
            "out": kernels(f"{one}.SelfAttention.o.weight"),
            "norm2": {"scale": theirs[f"{two}.layer_norm.weight"]},
            "fc_gate": kernels(f"{two}.DenseReluDense.wi_0.weight"),
            "fc1": kernels(f"{two}.DenseReluDense.wi_1.weight"),
            "fc2": kernels(f"{two}.DenseReluDense.wo.weight"),
        }
    net = T5Encoder(**SMALL, dtype=jnp.bfloat16 if bf16 else jnp.float32)
    actual = np.asarray(jax.jit(net.apply)({"params": params}, tokens, mask))
    assert actual.dtype == np.float32 and expected.std() > 0.3
    off = np.abs(actual - expected)[mask]
    if bf16:
        assert np.sqrt(np.square(off).mean()) < 0.1 * expected[mask].std()
    else:
        assert off.max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    "name, width, depth, num_heads, mlp_width, count",
    [
        ("small", 512, 8, 6, 1024, 35_332_800),
        ("base", 768, 12, 12, 2048, 109_628_544),
        ("large", 1024, 24, 16, 2816, 341_231_104),
        ("xl", 2048, 24, 32, 5120, 1_223_527_424),
        ("xxl", 4096, 24, 64, 10240, 4_762_310_656),
    ],
)
def test_released_sizes_have_their_counts(name, width, depth, num_heads, mlp_width, count):
    net = T5Encoder(32_128, width, depth, num_heads, mlp_width)
    tokens = jnp.zeros((1, 4), jnp.int32)
    with layers.shapes_only(True):
        shapes = jax.eval_shape(net.init, jax.random.key(0), tokens, tokens > -1)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_padding_is_not_read_and_a_text_without_a_token_is_finite():
    net = T5Encoder(**SMALL)
    tokens = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    mask = np.arange(6) < np.array([4, 0])[:, None]
    params = jax.jit(net.init)(jax.random.key(0), tokens, mask)
    states = np.asarray(net.apply(params, tokens, mask))
    assert np.isfinite(states).all()
    other = np.where(mask, tokens, 30)
    np.testing.assert_array_equal(net.apply(params, other, mask)[0, :4], states[0, :4])
    changed = tokens.copy()
    changed[0, 3] = 30
    assert np.abs(net.apply(params, changed, mask) - states)[0, :3].min(axis=-1).max() > 0
    assert set(flatten(params)) and "params/position_bias" in flatten(params)


def test_a_new_encoder_has_the_variances_of_t5():
    """As transformers' T5 begins: tokens 1, q 1 / (C D), k and v 1 / C, out 1 / (H D); nothing else scales
    attention, and a smaller table would drown each token in the first block's output."""
    width, heads, head_dim = 64, 8, 16
    net = T5Encoder(512, width, 1, heads, 128, head_dim)
    params = net.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))["params"]
    block = params["block_0"]
    q, k, v = jnp.split(block["qkv"]["kernel"], 3, axis=1)
    wanted = [(q, 1 / (width * head_dim)), (k, 1 / width), (v, 1 / width)]
    wanted += [(block["out"]["kernel"], 1 / (heads * head_dim)), (params["token_embedding"]["embedding"], 1)]
    for kernel, variance in wanted:
        assert float(jnp.var(kernel)) == pytest.approx(variance, rel=0.1)

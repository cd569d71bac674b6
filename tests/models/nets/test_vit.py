"""The transformer on pixel patches: a second derivation in numpy, positions, conditions, whole stages."""

import functools
import importlib
import importlib.util
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.nets import layers, vit
from dalle2_jax.models.nets.denoiser import DenoiserNet
from dalle2_jax.runtime import modeldir, partition
from dalle2_jax.runtime.modeldir import flatten

RNG = np.random.default_rng(0)
NET = dict(patch_size=2, width=16, depth=2, num_heads=2, bottleneck=6, context_tokens=3)
TEXT = dict(vocab_size=12, context_length=5, width=8, depth=1, num_heads=2)
STATES = dict(states_width=6, context_length=5, width=8)
KEY = jax.random.key(0, impl="rbg")

jit = functools.partial(jax.jit, compiler_options=partition.compiler_options(once=True))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def shapes(net, *args, **kwargs):
    with layers.shapes_only(True):
        return jax.eval_shape(lambda: net.init(KEY, *args, **kwargs))["params"]


def drawn(tree, scale=0.3):
    """Parameters of these shapes, none of which are zero."""
    return jax.tree.map(lambda leaf: np.float32(scale) * normal(*leaf.shape), tree)


def denoiser(**changes):
    body = dict(kind="vit", out_channels=3, **NET) | changes.pop("body", {})
    return DenoiserNet(body, 8, **changes)


def inputs(**changes):
    """(t, conditions of every kind that a decoder on tokens reads) of three pictures."""
    mask = np.arange(5) < np.array([5, 3, 2])[:, None]
    return (
        dict(
            image_embed=normal(3, 4),
            drop_image=np.zeros(3, bool),
            text=RNG.integers(1, 12, (3, 5)).astype(np.int32),
            token_mask=mask,
            drop_text=np.zeros(3, bool),
            label=np.array([0, 1, 2]),
        )
        | changes
    )


# --- the network against a second derivation ---


def rms(x, scale, epsilon=1e-6):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def turned(x, rows, columns):
    """Pairs (i, i + D / 2) of x [N, H, D] as complex numbers, times e^(i angle)."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** -(np.arange(half // 2) / (half // 2))
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=-1)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def block_by_hand(p, x, c, rows, columns, seen, heads):
    """One block over x [N, C] in float64; seen [N] bool: keys that are not masked."""
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(p["modulation"], silu(c)), 6)
    h = rms(x, p["norm1"]["scale"]) * (1 + scale1) + shift1
    q, k, v = (y.reshape(len(x), heads, -1) for y in np.split(linear(p["qkv"], h), 3, axis=-1))
    q, k = (turned(rms(y, p[n]["scale"]), rows, columns) for y, n in ((q, "norm_q"), (k, "norm_k")))
    logits = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    h = np.einsum("hnm,mhd->nhd", weights, v).reshape(len(x), -1)
    x = x + gate1 * linear(p["out"], h)
    h = rms(x, p["norm2"]["scale"]) * (1 + scale2) + shift2
    h = silu(linear(p["fc_gate"], h)) * linear(p["fc1"], h)
    return x + gate2 * linear(p["fc2"], h)


def by_hand(p, x, emb, context, mask, pooled, known):
    """The output for one picture x [H, W, C], patch by patch."""

    def patches(y):
        return np.stack([y[i : i + 2, j : j + 2].reshape(-1) for i in range(0, 4, 2) for j in range(0, 6, 2)])

    h = linear(p["patches_in"], linear(p["patches_bottleneck"], patches(x)))
    h = h + linear(p["patches_known"], patches(known))
    rows, columns = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2])
    h = block_by_hand(p["block_0"], h, emb, rows, columns, np.ones(6, bool), 2)
    learned = pooled + p["position"]["embedding"]
    read = linear(p["context_proj"], rms(context, p["norm_context"]["scale"]))
    h = np.concatenate([learned, read, h])
    seen = np.concatenate([np.ones(3, bool), mask, np.ones(6, bool)])
    rows, columns = (np.concatenate([np.zeros(7, int), y]) for y in (rows, columns))
    h = block_by_hand(p["block_1"], h, emb, rows, columns, seen, 2)[7:]
    shift, scale = np.split(linear(p["modulation_out"], silu(emb)), 2)
    h = linear(p["patches_out"], rms(h, p["norm_out"]["scale"]) * (1 + scale) + shift).reshape(2, 3, 2, 2, 3)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in h], axis=0)


@pytest.fixture(scope="module")
def example():
    """A network of two blocks, the second with context, its inputs and a compiled call."""
    net = vit.PixelViT(3, **NET, context_start=1)
    args = (
        normal(3, 4, 6, 3),
        normal(3, 16),
        normal(3, 4, 5),
        np.array([[1, 1, 1, 1], [1, 0, 1, 0], [1] * 4]) > 0,
    )
    more = dict(pooled=normal(3, 16), known=normal(3, 4, 6, 4))
    params = drawn(shapes(net, *args, **more))
    apply = jax.jit(lambda params, args, more: net.apply({"params": params}, *args, **more))
    return params, args, more, apply


def test_the_network_is_what_its_docstring_says(example):
    params, args, more, apply = example
    actual = apply(params, args, more)
    assert actual.shape == (3, 4, 6, 3) and actual.dtype == jnp.float32
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for i in range(3):
        expected = by_hand(wide, *(x[i] for x in args), more["pooled"][i], more["known"][i])
        np.testing.assert_allclose(actual[i], expected, atol=1e-4 * np.abs(expected).max())


def test_examples_do_not_read_each_other(example):
    params, args, more, apply = example
    order = np.array([2, 0, 1])
    permuted = apply(params, *jax.tree.map(lambda x: x[order], (args, more)))
    np.testing.assert_allclose(permuted, apply(params, args, more)[order], atol=1e-5)


def test_masked_tokens_are_not_read(example):
    params, args, more, apply = example
    x, emb, context, mask = args
    hidden = np.where(mask[..., None], context, 7.0).astype(np.float32)
    np.testing.assert_array_equal(apply(params, (x, emb, hidden, mask), more), apply(params, args, more))


@pytest.mark.parametrize("shift", [(3, 0), (0, 5), (11, 2)])
def test_products_of_queries_and_keys_depend_on_relative_positions(shift):
    q, k = normal(1, 6, 2, 8), normal(1, 6, 2, 8)

    def products(rows, columns):
        waves = vit.rotary_waves(rows, columns, 8)
        return jnp.einsum("bnhd,bmhd->bhnm", vit.rotate(q, waves), vit.rotate(k, waves))

    at = np.arange(2), np.arange(3)
    moved = products(at[0] + shift[0], at[1] + shift[1])
    np.testing.assert_allclose(moved, products(*at), atol=1e-5)
    stretched = products(*(y * (2 if step else 1) for y, step in zip(at, shift, strict=True)))
    assert np.abs(stretched - products(*at)).max() > 0.05  # both axes count


def test_patches_come_back():
    x = normal(2, 6, 4, 5)
    patches = vit.to_patches(jnp.asarray(x), 2)
    assert patches.shape == (2, 6, 20)
    np.testing.assert_array_equal(patches[1, 3], x[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(vit.from_patches(patches, 2, 6, 4), x)
    with pytest.raises(ValueError, match=r"multiples of patch_size 4, got \(6, 4\)"):
        vit.to_patches(jnp.asarray(x), 4)


def test_a_loop_over_blocks_is_the_written_out_network_with_its_dropout_and_remat(example):
    params, args, more, _ = example
    options = dict(context_start=1, scan_blocks=True, remat="products", dropout=0.5)
    plain, scanned = vit.PixelViT(3, **NET, context_start=1), vit.PixelViT(3, **NET, **options)

    def loss(net, params, **how):
        return jnp.square(net.apply({"params": params}, *args, **more, **how)).sum()

    (expected, alone), (value, here) = (
        jit(jax.value_and_grad(functools.partial(loss, net)))(params) for net in (plain, scanned)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, leaf in flatten(alone).items():
        np.testing.assert_allclose(flatten(here)[name], leaf, atol=1e-4 * np.abs(leaf).max(), err_msg=name)
    draw = jit(lambda p, key: loss(scanned, p, deterministic=False, rngs={"dropout": key}))
    first, again, other = (float(draw(params, jax.random.key(seed, impl="rbg"))) for seed in (0, 0, 1))
    assert first == again != other


# --- against the authors' network ---


def jit_module():
    """azula's copy of JiT's network (`pip install --no-deps azula einops`), without what azula imports."""
    found = importlib.util.find_spec("azula")
    if not (found and importlib.util.find_spec("torch") and importlib.util.find_spec("einops")):
        pytest.skip("the comparison needs azula, einops and torch")
    folder = Path(found.submodule_search_locations[0]) / "plugins/jit/_src"
    where = dict(submodule_search_locations=[str(folder)])
    spec = importlib.util.spec_from_file_location("azula_jit", folder / "__init__.py", **where)
    sys.modules["azula_jit"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("azula_jit.model")


def ours_from_jit(state, heads):
    """Parameters of a DenoiserNet. A pair of theirs is (2i, 2i + 1), of ours (i, i + D / 2)."""

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def block(i):
        own = {name.removeprefix(f"blocks.{i}."): x for name, x in state.items() if f"blocks.{i}." in name}
        half = len(own["attn.q_norm.weight"]) // 2
        order = np.concatenate([2 * np.arange(half), 2 * np.arange(half) + 1])
        columns = (2 * half * np.arange(2 * heads)[:, None] + order).reshape(-1)  # of queries and keys
        columns = np.append(columns, np.arange(len(columns), len(columns) * 3 // 2))
        qkv, gates = dense(f"blocks.{i}.attn.qkv"), dense(f"blocks.{i}.mlp.w12")
        (gate, up), (gate_bias, up_bias) = (np.split(gates[name], 2, axis=-1) for name in ("kernel", "bias"))
        return {
            "modulation": dense(f"blocks.{i}.adaLN_modulation.1"),
            "norm1": {"scale": own["norm1.weight"]},
            "norm2": {"scale": own["norm2.weight"]},
            "norm_q": {"scale": own["attn.q_norm.weight"][order]},
            "norm_k": {"scale": own["attn.k_norm.weight"][order]},
            "qkv": {"kernel": qkv["kernel"][:, columns], "bias": qkv["bias"][columns]},
            "out": dense(f"blocks.{i}.attn.proj"),
            "fc_gate": {"kernel": gate, "bias": gate_bias},
            "fc1": {"kernel": up, "bias": up_bias},
            "fc2": dense(f"blocks.{i}.mlp.w3"),
        }

    first, second = (state[f"x_embedder.proj{i}.weight"] for i in (1, 2))
    net = {f"block_{i}": block(i) for i in range(sum("norm1" in name for name in state))}
    net["patches_bottleneck"] = {"kernel": first.transpose(2, 3, 1, 0).reshape(-1, len(first))}
    net["patches_in"] = {"kernel": second[:, :, 0, 0].T, "bias": state["x_embedder.proj2.bias"]}
    net["position"] = {"embedding": state["in_context_posemb"][0]}
    net["norm_out"] = {"scale": state["final_layer.norm_final.weight"]}
    net["modulation_out"] = dense("final_layer.adaLN_modulation.1")
    net["patches_out"] = dense("final_layer.linear")
    time = {"fc1": dense("t_embedder.mlp.0"), "fc2": dense("t_embedder.mlp.2")}
    return {
        "net": net,
        "time": time,
        "label_embed": {"embedding": state["y_embedder.embedding_table.weight"]},
    }


def test_it_is_jits_network():
    """But for JiT's fixed table of positions, which is zero here: rotations are all the positions we have."""
    jit = jit_module()
    import torch

    sizes = dict(input_size=6, patch_size=2, hidden_size=16, depth=3, num_heads=2, num_classes=3)
    theirs = jit.JiT(**sizes, bottleneck_dim=6, in_context_len=3, in_context_start=1).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(0.3 * normal(*parameter.shape)))
        theirs.pos_embed.zero_()
        x, t, label = normal(2, 6, 6, 3), np.array([0.1, 0.8], np.float32), np.array([0, 2])
        torch.compiler.set_stance("force_eager")
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t), torch.tensor(label))
    net = denoiser(num_classes=4, body=dict(depth=3, context_start=1, mlp_width=42))
    params = ours_from_jit({name: y.numpy() for name, y in theirs.state_dict().items()}, heads=2)
    actual = jax.jit(net.apply)({"params": params}, x, t, {"label": label})
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


# --- with its conditions ---


def test_a_fresh_network_gives_zero():
    net = denoiser(num_classes=3)
    x, t = normal(3, 8, 8, 3), np.array([1, 500, 999])
    label = {"label": np.array([0, 1, -1])}
    out, params = jit(lambda: net.init_with_output(KEY, x, t, label))()
    params = params["params"]
    assert not np.abs(out).any()
    zero = {
        name for name, leaf in flatten(params).items() if name.endswith("kernel") and not np.abs(leaf).any()
    }
    assert zero == {
        f"net/{name}/kernel"
        for name in ("block_0/modulation", "block_1/modulation", "modulation_out", "patches_out")
    }


def test_it_reads_every_condition_and_each_has_a_null():
    """Image embedding, caption and class reach the output; a dropped one is the same whatever it was."""
    net = denoiser(embed_dim=4, text=TEXT, num_classes=3, inpaint=True, body=dict(out_channels=6))
    x, t, low, known = normal(3, 8, 8, 3), np.array([3, 90, 700]), normal(3, 8, 8, 3), normal(3, 8, 8, 4)
    read = inputs()
    params = drawn(shapes(net, x, t, read, low, t, known), 0.5)
    apply = jax.jit(lambda *args: net.apply({"params": params}, *args))
    out = np.asarray(apply(x, t, read, low, t, known))
    assert out.shape == (3, 8, 8, 6)

    def moves(*args):
        return np.abs(apply(*args) - out).max(axis=(1, 2, 3))

    others = dict(
        image_embed=normal(3, 4), text=(read["text"] % 11 + 1).astype(np.int32), label=np.array([1, 2, 0])
    )
    for name, value in others.items():
        assert moves(x, t, read | {name: value}, low, t, known).min() > 1e-3, name
    for i, args in enumerate([(x, t + 9, read, low, t, known), (x, t, read, low + 1, t, known)]):
        assert moves(*args).min() > 1e-3, i
    assert moves(x, t, read, low, t + 9, known).min() > 1e-3
    assert moves(x, t, read, low, t, known + 1).min() > 1e-3
    nulls = dict(drop_image=np.ones(3, bool), drop_text=np.ones(3, bool), label=np.full(3, -1))
    unconditional = apply(x, t, read | nulls, low, t, known)
    np.testing.assert_array_equal(apply(x, t, read | others | nulls, low, t, known), unconditional)


def test_states_of_frozen_encoders_are_read_and_their_padding_is_not():
    mask = np.arange(5) < np.array([5, 3, 2])[:, None]
    x, t, states = normal(3, 8, 8, 3), np.array([3, 90, 700]), normal(3, 5, 6)
    clip = dict(image_embed=normal(3, 4), drop_image=np.zeros(3, bool), text_embed=normal(3, 4))
    for text, own, embed_dim in ((STATES, clip, 4), (STATES | dict(pool_heads=2), {}, 0)):
        net = denoiser(embed_dim=embed_dim, text=text)
        read = own | dict(text=states, token_mask=mask, drop_text=np.zeros(3, bool))
        params = drawn(shapes(net, x, t, read))
        apply = jax.jit(lambda read, net=net, params=params: net.apply({"params": params}, x, t, read))
        out = apply(read)
        padding = np.where(mask[..., None], states, 5.0).astype(np.float32)
        np.testing.assert_array_equal(apply(read | {"text": padding}), out)
        assert np.abs(apply(read | {"text": states + 1}) - out).max(axis=(1, 2, 3)).min() > 1e-4


def test_parameters_by_a_closed_formula():
    """For JiT-B/16's sizes: 131M parameters (the paper's table), less its fixed table of positions."""
    body = dict(patch_size=16, width=768, depth=12, num_heads=12, mlp_width=2048, bottleneck=128)
    net = denoiser(num_classes=1000, body=body | dict(context_tokens=32, context_start=4))
    x, t, label = jnp.zeros((1, 256, 256, 3)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    found = {name: leaf.size for name, leaf in flatten(shapes(net, x, t, label)).items()}
    w, m, patch, heads = 768, 2048, 16 * 16 * 3, 12
    block = 3 * w**2 + 3 * w + w**2 + w  # attention
    block += 2 * (w * m + m) + m * w + w  # SwiGLU
    block += 6 * (w**2 + w) + 2 * w + 2 * w // heads  # modulation, norms of tokens, of queries and keys
    ends = patch * 128 + 128 * w + w + 2 * (w**2 + w) + w + w * patch + patch
    others = 256 * w + w + w**2 + w + 1000 * w + 32 * w  # time, classes, learned tokens
    assert sum(found.values()) == 12 * block + ends + others
    assert sum(found.values()) == pytest.approx(131e6, rel=0.01)


# --- whole stages ---

MODEL = dict(
    objective="x0",
    weighting="v",
    learned_variance=False,
    dropout=0.0,
    num_steps=2,
    net=NET | dict(kind="vit"),
)
DECODER = dict(
    image_size=8, embed_dim=4, text=TEXT, num_classes=3, label_drop=0.1, guidance_scale=1.0, **MODEL
)
UPSAMPLER = dict(image_size=16, low_res_size=4, crop_size=8, tile=8, low_res_noise=0.5, **MODEL)
STAGES = {"decoder": DECODER, "upsampler": UPSAMPLER}


def batch_of(stage, size):
    draw, batch = np.random.default_rng(1), {}
    for name, x in stage.batch_spec(size).items():
        if x.dtype == jnp.float32:
            batch[name] = draw.uniform(-1, 1, x.shape).astype(np.float32)
        else:
            batch[name] = np.ones(x.shape, x.dtype)
    return batch


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_learns_on_a_mesh_draws_and_is_loaded(name, tmp_path):
    """tests/test_meshes.py compares training on meshes with that of one device."""
    config = {"stage": name, "model": STAGES[name]}
    stage = models.build_stage(config)
    batch = batch_of(stage, 8)

    @jit
    def descend(params):
        def loss(params):
            return stage.loss(params, KEY, batch, train=False).value

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.03 * g, params, grads), value

    mesh = partition.make_mesh(2, 2, 2)
    params = jit(stage.init)(KEY, jax.tree.map(lambda x: x[:1], batch))
    values = []
    with partition.use_mesh(mesh):
        trained = jax.tree.map(lambda p: p + 0.02 * normal(*p.shape), params)
        trained = jax.device_put(trained, partition.shardings(trained, mesh))
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(trained))
        for _ in range(6):
            trained, value = descend(trained)
            values.append(float(value))
    assert values[-1] < 0.98 * values[0]

    trained = jax.device_get(trained)
    keys = jax.random.split(KEY, 8)
    drawn_by = jit(stage.sample)(trained, keys, batch)
    assert drawn_by.shape == (8, *[stage.image_size] * 2, 3) and np.isfinite(drawn_by).all()
    modeldir.save_stage(tmp_path, config, trained, "float32")
    loaded, _, params = models.load_stage(tmp_path, name)
    assert loaded.net == stage.net
    jax.tree.map(np.testing.assert_array_equal, params, trained)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(net=NET | dict(kind="vti")), "net.kind 'vti' is unknown; choose 'unet' or 'vit'"),
        (dict(net=NET | dict(kind="vit", patch=4)), "did you mean net.patch_size"),
        (dict(net=NET | dict(kind="vit", num_heads=3)), "net.width 16 must be a multiple of 4 net.num_heads"),
        (
            dict(net=NET | dict(kind="vit", context_start=2)),
            "net.context_start 2 must be in 0 .. net.depth - 1",
        ),
        (dict(image_size=9), "image_size 9 must be a multiple of 2 .net.patch_size"),
        (dict(channels=64), "net.kind 'vit' reads no channels"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build_stage({"stage": "decoder", "model": DECODER | changes})

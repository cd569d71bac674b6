"""Transformer blocks against torch.nn, and the prior's network against diffusers' PriorTransformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops
from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import causal_mask
from dalle2_jax.models.nets.transformer import PriorTransformer, TransformerStack

KEY = jax.random.key(0)
CHEAP_KEY = jax.random.key(0, impl="rbg")  # programs full of the default's draws take long to compile


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(net, *args, **kwargs):
    """Every leaf drawn, so that no zero bias or unit gain hides a wrong name; nothing is compiled."""
    with layers.shapes_only(True):
        shapes = jax.eval_shape(lambda: net.init(KEY, *args, **kwargs))["params"]
    draw = np.random.default_rng(0)

    def one(path, x):
        gain = 1 if path[-1].key == "scale" else 0
        return np.asarray(gain + 0.3 * draw.standard_normal(x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def kernel(weight):
    """torch's Linear weight as a kernel."""
    return weight.detach().numpy().T


def dense(linear):
    return {"kernel": kernel(linear.weight), "bias": linear.bias.detach().numpy()}


def norm(layer):
    return {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}


def randomise_torch(torch, model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_equal_torch_encoder_layers(causal):
    torch = pytest.importorskip("torch", reason="the oracle is torch.nn.TransformerEncoderLayer")
    width, heads, depth = 16, 4, 2
    blocks = [
        randomise_torch(
            torch,
            torch.nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            ),
        )
        for _ in range(depth)
    ]
    x = np.random.default_rng(0).normal(size=(2, 5, width)).astype(np.float32)
    hidden = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1) if causal else None
    with torch.no_grad():
        expected = torch.from_numpy(x)
        for layer in blocks:
            expected = layer(expected, src_mask=hidden)
    params = {
        f"block_{i}": {
            "norm1": norm(layer.norm1),
            "attn": {
                "qkv": {
                    "kernel": kernel(layer.self_attn.in_proj_weight),
                    "bias": layer.self_attn.in_proj_bias.detach().numpy(),
                },
                "out": dense(layer.self_attn.out_proj),
            },
            "norm2": norm(layer.norm2),
            "mlp": {"fc1": dense(layer.linear1), "fc2": dense(layer.linear2)},
        }
        for i, layer in enumerate(blocks)
    }
    mask = causal_mask(5) if causal else None
    actual = jax.jit(TransformerStack(depth, heads).apply)({"params": params}, x, mask)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5, rtol=1e-5)


def test_a_causal_stack_never_looks_ahead():
    stack = TransformerStack(2, 2)
    x = normal(1, 6, 8)
    other = x.copy()
    other[:, 3] = normal(8, seed=1)
    apply = jax.jit(lambda params, x: stack.apply({"params": params}, x, causal_mask(6)))
    params = random_params(stack, x)
    before, after = np.asarray(apply(params, x)), np.asarray(apply(params, other))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after).max(axis=-1)[0, 3:] > 1e-3).all()


X = normal(2, 4, 8)


def stack(remat, scan):
    return TransformerStack(2, 2, remat=remat, scan=scan)


@functools.cache
def begun(remat="none", scan=False):
    """The parameters that a stack begins with."""
    return jax.device_get(jax.jit(stack(remat, scan).init)(CHEAP_KEY, X)["params"])


def loss(remat, scan):
    return lambda p: jnp.square(stack(remat, scan).apply({"params": p}, X, causal_mask(4))).sum()


@functools.cache
def gradient(remat, scan):
    return jax.device_get(jax.jit(jax.grad(loss(remat, scan)))(begun()))


def assert_equal_leaves(ours, theirs, **tolerance):
    """Also compares the names."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def test_a_loop_over_blocks_begins_with_the_same_parameters():
    assert_equal_leaves(begun(scan=True), begun(), rtol=0)


@pytest.mark.parametrize(
    "remat", ["products", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("none", "all"))]
)
def test_a_loop_over_blocks_changes_neither_names_nor_gradients_nor_arithmetic(remat):
    params = begun()
    names = jax.eval_shape(stack(remat, True).init, KEY, X)["params"]
    assert jax.tree.structure(names) == jax.tree.structure(params)
    losses = [loss(remat, scan) for scan in (False, True)]
    programs = [str(jax.make_jaxpr(loss)(params)) for loss in losses]
    assert ["scan[" in program for program in programs] == [False, True]
    assert programs[0].count("dot_general[") == 2 * programs[1].count("dot_general[")
    assert flops.count(losses[0], params) == flops.count(losses[1], params)
    assert_equal_leaves(gradient(remat, False), gradient(remat, True), rtol=1e-5, atol=1e-5)


def test_remat_changes_neither_names_nor_gradients():
    assert_equal_leaves(begun("products"), begun(), rtol=0)
    assert_equal_leaves(gradient("products", False), gradient("none", False), rtol=0, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = normal(1, 4, 8)
    stack = TransformerStack(1, 2, dtype=jnp.bfloat16)
    variables = jax.eval_shape(stack.init, KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(stack.apply, variables, x).dtype == jnp.bfloat16


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 8 is not a multiple of num_heads 3"):
        TransformerStack(1, 3).init(KEY, jnp.zeros((1, 2, 8)))


def small_prior(**changes):
    settings = dict(embed_dim=6, context_length=5, width=8, depth=2, num_heads=2, vocab_size=11)
    return PriorTransformer(**(settings | changes))


def prior_inputs(net, size=3):
    text = np.random.default_rng(2).integers(0, 11, (size, 5))
    if net.states_width:
        text = normal(size, 5, net.states_width, seed=2)
    return {
        "x_t": normal(size, net.embed_dim),
        "t": np.arange(size) * 300,
        "text_embed": normal(size, net.embed_dim, seed=1),
        "text": text,
        "token_mask": np.arange(5) < np.arange(2, 2 + size)[:, None],
        "drop_text": np.zeros(size, bool),
    }


KINDS = {
    "tokens": {},
    "states": dict(vocab_size=0, states_width=4),
    "states with null tokens": dict(vocab_size=0, states_width=4, null_tokens=2),
}


@pytest.fixture(scope="module", params=KINDS)
def prior(request):
    net = small_prior(**KINDS[request.param])
    inputs = prior_inputs(net)
    variables = {"params": random_params(net, **inputs)}
    return functools.partial(jax.jit(net.apply), variables), inputs


def gap(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def other_text(inputs):
    """The same batch with another caption in every position, and another text embedding."""
    text = (inputs["text"] + 1) % 11 if inputs["text"].ndim == 2 else inputs["text"] + 1.0
    return inputs | {
        "text": text,
        "text_embed": inputs["text_embed"] + 1.0,
        "token_mask": ~inputs["token_mask"],
    }


def test_the_null_branch_sees_the_noised_embedding_and_no_text(prior):
    apply, inputs = prior
    null = inputs | {"drop_text": np.ones(3, bool)}
    reference = apply(**null)
    assert np.isfinite(reference).all()
    assert gap(reference, apply(**other_text(null))) == 0.0
    assert gap(reference, apply(**null | {"x_t": null["x_t"] + 0.1})) > 1e-3
    assert gap(reference, apply(**null | {"t": null["t"] + 100})) > 1e-3


def test_the_conditional_branch_sees_every_input(prior):
    apply, inputs = prior
    reference = apply(**inputs)
    for name, delta in (("x_t", 0.1), ("t", 100), ("text_embed", 0.1)):
        assert gap(reference, apply(**inputs | {name: inputs[name] + delta})) > 1e-3, name
    first = other_text(inputs)["text"][:, :1]
    text = np.concatenate([first, inputs["text"][:, 1:]], axis=1)
    assert (np.abs(reference - apply(**inputs | {"text": text})).max(axis=1) > 1e-4).all()


def test_padding_does_not_reach_the_prediction(prior):
    apply, inputs = prior
    mask = inputs["token_mask"]
    mask = mask if inputs["text"].ndim == 2 else mask[..., None]
    text = np.where(mask, inputs["text"], other_text(inputs)["text"])
    assert gap(inputs["text"], text) > 0
    assert gap(apply(**inputs), apply(**inputs | {"text": text})) == 0.0


@pytest.mark.parametrize("remat", ["none", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_text_read_before_it_predicts_the_same_from_three_positions(kind, remat):
    net = small_prior(**KINDS[kind], remat=remat)
    x_t, t, *text = prior_inputs(net).values()
    params = random_params(net, x_t, t, *text)
    text[3] = np.array([False, True, False])
    apply = jax.jit(net.apply)
    whole = apply({"params": params}, x_t, t, *text)
    read = jax.jit(net.read)(params, *text)
    assert set(read) == {"cache"}
    np.testing.assert_allclose(apply({"params": params} | read, x_t, t), whole, atol=1e-5)
    other = apply({"params": params} | read, x_t + 1, t + 1)
    np.testing.assert_allclose(other, apply({"params": params}, x_t + 1, t + 1, *text), atol=1e-5)
    assert gap(other, whole) > 1e-3
    assert jax.eval_shape(net.init, KEY, x_t, t, *text).keys() == {"params"}


def test_text_is_dropped_by_example(prior):
    apply, inputs = prior
    drop = np.array([True, False, True])
    mixed = apply(**inputs | {"drop_text": drop})
    whole = apply(**inputs), apply(**inputs | {"drop_text": np.ones(3, bool)})
    np.testing.assert_allclose(mixed, np.where(drop[:, None], whole[1], whole[0]), atol=1e-6)
    assert gap(*whole) > 1e-3


def test_null_tokens_are_the_states_of_a_null_caption():
    net = small_prior(vocab_size=0, states_width=4, null_tokens=2)
    inputs = prior_inputs(net)
    params = random_params(net, **inputs)
    apply = functools.partial(jax.jit(net.apply), {"params": params})
    null = apply(**inputs | {"drop_text": np.ones(3, bool)})
    states = np.zeros((3, 5, 4), np.float32)
    states[:, :2] = params["null_text_states"]["embedding"]
    given = inputs | {
        "text": states,
        "token_mask": np.broadcast_to(np.arange(5) < 2, (3, 5)),
        "text_embed": np.broadcast_to(params["null_text_embed"]["embedding"], (3, 6)),
    }
    np.testing.assert_allclose(null, apply(**given), atol=1e-6)


def from_diffusers(model, width):
    """Parameters of PriorTransformer from those of diffusers' class of the same name."""

    def block(b):
        qkv = [b.attn1.to_q, b.attn1.to_k, b.attn1.to_v]
        return {
            "norm1": norm(b.norm1),
            "attn": {
                "qkv": {
                    "kernel": np.concatenate([kernel(x.weight) for x in qkv], axis=1),
                    "bias": np.concatenate([x.bias.detach().numpy() for x in qkv]),
                },
                "out": dense(b.attn1.to_out[0]),
            },
            "norm2": norm(b.norm3),
            "mlp": {"fc1": dense(b.ff.net[0].proj), "fc2": dense(b.ff.net[2])},
        }

    return {
        "text_states_proj": dense(model.encoder_hidden_states_proj),
        "text_embed_proj": dense(model.embedding_proj),
        "image_embed_proj": dense(model.proj_in),
        "time_fc1": dense(model.time_embedding.linear_1),
        "time_fc2": dense(model.time_embedding.linear_2),
        "position": {"embedding": model.positional_embedding.detach().numpy()[0]},
        "query": {"embedding": model.prd_embedding.detach().numpy().reshape(width)},
        "transformer": {f"block_{i}": block(b) for i, b in enumerate(model.transformer_blocks)},
        "norm_out": norm(model.norm_out),
        "out_proj": dense(model.proj_to_clip_embeddings),
        "null_text_embed": {"embedding": np.zeros(model.config.embedding_dim, np.float32)},
    }


def test_prior_transformer_equals_diffusers():
    torch = pytest.importorskip("torch", reason="diffusers' PriorTransformer is the oracle")
    diffusers = pytest.importorskip("diffusers", reason="diffusers' PriorTransformer is the oracle")
    embed, heads, head_dim, length = 6, 2, 8, 5
    width = heads * head_dim
    model = randomise_torch(
        torch,
        diffusers.PriorTransformer(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=2,
            embedding_dim=embed,
            num_embeddings=length,
            additional_embeddings=4,
        ),
    )
    rng = np.random.default_rng(0)
    x_t, text_embed = (rng.normal(size=(2, embed)).astype(np.float32) for _ in range(2))
    states = rng.normal(size=(2, length, embed)).astype(np.float32)
    mask = np.arange(length) < np.array([[2], [4]])
    mean, std = rng.normal(size=embed).astype(np.float32), rng.uniform(0.5, 2, size=embed).astype(np.float32)
    net = PriorTransformer(
        embed_dim=embed, context_length=length, width=width, depth=2, num_heads=heads, states_width=embed
    )
    params = from_diffusers(model, width)
    apply = jax.jit(net.apply)
    for t in (0, 999):
        with torch.no_grad():
            model.clip_mean.copy_(torch.from_numpy(mean))
            model.clip_std.copy_(torch.from_numpy(std))
            expected = model(
                torch.from_numpy(x_t),
                torch.tensor([t, t]),
                torch.from_numpy(text_embed),
                torch.from_numpy(states),
                torch.from_numpy(mask),
            ).predicted_image_embedding
            expected_embed = model.post_process_latents(expected)
        z = apply({"params": params}, x_t, np.array([t, t]), text_embed, states, mask, np.zeros(2, bool))
        assert np.abs(expected.numpy()).max() > 0.1
        np.testing.assert_allclose(z, expected.numpy(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(z * std + mean, expected_embed.numpy(), atol=1e-4, rtol=1e-4)

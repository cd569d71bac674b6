"""cuDNN's attention without a GPU: which programs lowered for CUDA have it, and how it is split over devices.

The kernel itself cannot run here. Where numbers are wanted its definition stands in for it, below the rules
by which JAX partitions and differentiates it.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as kernels
from jax._src.interpreters import mlir

from configs import decoder64
from dalle2_jax.models import flops, models
from dalle2_jax.models.nets import layers, platforms, unet
from dalle2_jax.models.nets.platforms import Target
from dalle2_jax.runtime import partition

HOPPER = Target("gpu", (9, 0))


@pytest.fixture(autouse=True)
def cudnn_is_installed(monkeypatch):
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91800)


def lowered(function, *arguments, target=HOPPER) -> str:
    """The program for `target`, before a compiler sees it."""
    platform = {"gpu": "cuda"}.get(target.platform, target.platform)
    with platforms.assumed(target):
        traced = jax.jit(lambda *given: function(*given)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def calls(program: str, kernel: str) -> int:
    """How often a lowered program runs a kernel of cuDNN's, each of which lies in a function of its own."""
    functions = re.findall(r"func\.func private @(\w+)\((.*?)\n  }", program, re.DOTALL)
    names = [name for name, body in functions if f"@{kernel}(" in body]
    return sum(program.count(f"call @{name}(") for name in names)


def forward(program: str) -> int:
    return calls(program, "__cudnn$fmhaSoftmax")


def backward(program: str) -> int:
    return calls(program, "__cudnn$fmhaSoftmaxBackward")


def decoder(**changes):
    """(stage, its gradient, parameters and a batch as shapes, attention blocks) of a small decoder."""
    config = models.to_plain(decoder64.get_config("debug"))
    config["model"] |= dict(dtype="bfloat16") | changes
    stage = models.build_stage(config)
    params = models.abstract_params(stage)

    def gradient(params, batch):
        return jax.grad(lambda p: stage.loss(p, jax.random.key(0), batch)[0])(params)

    return stage, gradient, (params, stage.batch_spec(8)), sum("attn" in name for name in params["net"])


def queries(length=8, head_dim=16, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)


def self_attention(q, mask=None):
    return layers.attention(q, q, q, mask, cudnn=True)


@pytest.mark.parametrize(
    ("remat", "runs"), [pytest.param("none", 1, marks=pytest.mark.slow), ("products", 1), ("all", 2)]
)
def test_every_attention_block_of_a_decoder_has_it_and_keeps_its_result(remat, runs):
    _, gradient, shapes, blocks = decoder(remat=remat)
    program = lowered(gradient, *shapes)
    assert blocks > 1
    assert (forward(program), backward(program)) == (runs * blocks, blocks)


@pytest.mark.parametrize("target", [Target("cpu"), Target("tpu"), Target("gpu"), Target("gpu", (7, 5))])
def test_other_devices_keep_their_program(target):
    def by_xla(q):
        return layers.attention(q, q, q)

    assert lowered(self_attention, queries(), target=target) == lowered(by_xla, queries(), target=target)
    assert forward(lowered(self_attention, queries())) == 1 and forward(lowered(by_xla, queries())) == 0


def test_what_the_kernel_does_not_take_is_left_to_xla():
    assert forward(lowered(self_attention, queries(head_dim=128))) == 1
    assert forward(lowered(self_attention, queries(dtype=jnp.float16))) == 1
    for other in (dict(dtype=jnp.float32), dict(head_dim=12), dict(head_dim=136), dict(length=7)):
        assert forward(lowered(self_attention, queries(**other))) == 0
    assert forward(lowered(self_attention, queries(), jnp.ones((1, 1, 8, 8), bool))) == 0


def test_captions_with_a_mask_are_left_to_xla():
    block = unet.AttentionBlock(16, dtype=jnp.bfloat16)
    x, context = np.zeros((2, 4, 4, 32), np.float32), np.zeros((2, 6, 8), np.float32)
    params = jax.eval_shape(lambda key: block.init(key, x, context, None), jax.random.key(0))
    assert forward(lowered(block.apply, params, x, context, None)) == 1
    assert forward(lowered(block.apply, params, x, context, np.ones((2, 6), bool))) == 0


def test_flops_are_those_of_two_products():
    stage, _, (_, batch), _ = decoder()
    by_xla = flops.of_step(stage, batch), flops.count(self_attention, queries())
    with platforms.assumed(HOPPER):
        assert (flops.of_step(stage, batch), flops.count(self_attention, queries())) == by_xla
    assert by_xla[1] == 2 * 2 * (2 * 8 * 4 * 16) * 8


def test_a_mesh_says_what_is_traced_for():
    def described(platform):
        device = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform=platform)
        return jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)

    assert platforms.target() == Target("cpu")
    with jax.sharding.use_abstract_mesh(described("tpu")):
        assert platforms.target() == Target("tpu")
    with jax.sharding.use_abstract_mesh(described("gpu")):  # of what kind is not known
        assert platforms.target() == Target("gpu")


computed_on = []


def defined(q, k, v, *_, scale, is_training, **how):
    logits = scale * jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    out = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v.astype(jnp.float32)).astype(q.dtype)
    return (out, jax.nn.logsumexp(logits, axis=-1)) if is_training else (out,)


def defined_gradient(q, k, v, *others, scale, **how):
    computed_on.append((q.shape, others[-1].shape))

    def out(*given):
        return defined(*given, scale=scale, is_training=False)[0]

    return jax.vjp(out, q, k, v)[1](others[-1])


@pytest.fixture
def kernels_on_cpus(monkeypatch):
    """The definitions stand in for the kernels on CPUs, in this test alone."""
    registered = mlir._platform_specific_lowerings
    monkeypatch.setitem(registered, "cpu", dict(registered["cpu"]))
    for primitive, function in (("fwd", defined), ("bwd", defined_gradient)):
        mlir.register_lowering(
            getattr(kernels, f"_dot_product_attention_{primitive}_p"),
            mlir.lower_fun(function, multiple_results=True),
            platform="cpu",
        )


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 1, 1), marks=pytest.mark.slow),  # (2, 2, 2) splits along all three
        pytest.param((1, 2, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 2), marks=pytest.mark.slow),
        (2, 2, 2),
    ],
)
def test_the_partitioned_program_and_its_gradient_on_several_devices(sizes, kernels_on_cpus):
    """Also where the kernels before it are split by channel, and with that its queries, keys and gradient."""
    block = unet.AttentionBlock(16, dtype=jnp.bfloat16)
    draw = np.random.default_rng(0).normal
    x, context, slope = (draw(size=s).astype(np.float32) for s in ((4, 4, 4, 32), (4, 6, 8), (4, 4, 4, 32)))
    params = jax.jit(lambda key: block.init(key, x, context, None)["params"])(jax.random.key(0, impl="rbg"))
    params["out"]["kernel"] = 0.2 * draw(size=(32, 32)).astype(np.float32)
    mesh = partition.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    params = jax.device_put(params, partition.shardings(params, mesh))
    x, context, slope = jax.device_put((x, context, slope), partition.batch_sharding(mesh))

    def gradients(params, x, context):
        def loss(params, x, context):
            return (slope * block.apply({"params": params}, x, context, None)).mean()

        return jax.value_and_grad(loss, (0, 1, 2))(params, x, context)

    computed_on.clear()
    with partition.use_mesh(mesh):
        expected = jax.jit(gradients)(params, x, context)
        with platforms.assumed(HOPPER):
            program = jax.jit(gradients).trace(params, x, context)
            assert str(program.jaxpr).count("dot_product_attention_bwd_wrapper[") == 1
            found = program.lower().compile()(params, x, context)
    part = (4 // partition.batch_shards(mesh), 16, 2 // mesh.shape["tensor"], 16)
    assert set(computed_on) == {(part, part)}
    for a, b in zip(*map(jax.tree.leaves, jax.device_get((found, expected))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max() + 1e-6)


def test_cpus_have_no_kernel_outside_that_test():
    with platforms.assumed(HOPPER), pytest.raises(NotImplementedError, match="cpu"):
        jax.jit(lambda q: self_attention(q)).trace(queries()).lower()

"""Products with kernels and their gradients on CPUs, and what other platforms have in their place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops
from dalle2_jax.models.nets import cpu, layers, platforms

KEY = jax.random.key(0)
DENSE = (((1,), (0,)), ((), ()))


def arrays(*shape, features, dtype=np.float32):
    """(x, kernel, gradient)."""
    rng = np.random.default_rng(0)
    shapes = (shape, (shape[-1], features), (*shape[:-1], features))
    return [rng.normal(size=s).astype(dtype) for s in shapes]


def uses_it(function, *arguments) -> bool:
    return "custom_vjp_call" in str(jax.make_jaxpr(lambda *a: function(*a))(*arguments))


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 4, 12)])
def test_outputs_and_gradients_are_those_of_a_plain_product(shape):
    x, kernel, gradient = arrays(*shape, features=9)
    wanted, pull = jax.vjp(lambda x, kernel: x @ kernel, x, kernel)
    got, pull_ours = jax.vjp(cpu.product, x, kernel)
    for ours, plain in zip((got, *pull_ours(gradient)), (wanted, *pull(gradient)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def test_the_gradient_by_the_kernel_is_not_transposed():
    x, kernel, gradient = arrays(7, 12, features=9)
    for function, transposed in ((cpu.product, False), (lambda x, k: x @ k, True)):
        program = jax.make_jaxpr(lambda k, f=function: jax.vjp(lambda k: f(x, k), k)[1](gradient))(kernel)
        made = [e for e in program.jaxpr.eqns if e.outvars[0] is program.jaxpr.outvars[0]]
        assert (made[0].primitive.name == "transpose") is transposed


def test_cpus_and_float32_alone_have_it():
    x, kernel, _ = arrays(7, 12, features=9)
    product = lambda x, kernel: cpu.dot_general(x, kernel, DENSE)  # noqa: E731
    assert uses_it(product, x, kernel)
    assert not uses_it(product, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for target in (platforms.Target("tpu"), platforms.Target("gpu", (9, 0))):
        with platforms.assumed(target):
            assert not uses_it(product, x, kernel)


def test_layers_have_it_and_count_as_before():
    x = jnp.ones((2, 4, 4, 8))
    for layer in (layers.Dense(16), layers.conv(16, 1, dtype=jnp.float32, name="skip")):
        params = jax.eval_shape(layer.init, KEY, x)
        assert uses_it(layer.apply, params, x)
        assert flops.count(layer.apply, params, x) == 2 * 2 * 4 * 4 * 8 * 16
    strided = layers.conv(16, 1, stride=2, dtype=jnp.float32, name="skip")
    assert not uses_it(strided.apply, jax.eval_shape(strided.init, KEY, x), x)


@pytest.mark.parametrize("what, products_of_a_step", [("products", 6), ("all", 7)])
def test_recomputation_of_all_but_products_keeps_them(what, products_of_a_step):
    """Two products of a block: forward, and gradients by both arrays. With `all` the first is computed again;
    the second's result is not read."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.Dense(8, name="fc2")(nn.silu(layers.Dense(8, name="fc1")(x)))

    block, x = layers.remat(Block, what)(), jnp.ones((4, 8))
    params = jax.eval_shape(block.init, KEY, x)

    def loss(params, x):
        return jnp.square(block.apply(params, x)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert flops.count(gradient, params, x) == products_of_a_step * 2 * 4 * 8 * 8

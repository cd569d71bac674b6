"""Products and attention in bfloat16 on CPUs: close to float32, traced only where they were asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops
from dalle2_jax.models.nets import cpu, layers, platforms
from dalle2_jax.runtime import partition

ROUNDING = 2.0**-8  # bfloat16 keeps 8 bits
LARGE = (2, 4, cpu.MIN_SIDE)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_ROUNDED_PRODUCTS", 8 * cpu.MIN_SIDE**2)


def arrays(*shape, features):
    """(x, kernel, gradient)."""
    rng = np.random.default_rng(0)
    shapes = (shape, (shape[-1], features), (*shape[:-1], features))
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def rounded(*values):
    """In float64, what bfloat16 keeps of the values."""
    return [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in values]


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, x, kernel, gradient):
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(gradient)


def uses_it(function, *arguments) -> bool:
    return "bf16" in str(jax.make_jaxpr(lambda *a: function(*a))(*arguments))


@pytest.mark.parametrize("shape, features", [((7, 12), 20), ((2, 5, 24), 9)])
def test_outputs_and_gradients_are_exact_sums_of_rounded_operands(shape, features):
    x, kernel, gradient = arrays(*shape, features=features)
    got = with_gradients(cpu.bfloat16_product, x, kernel, gradient)
    a, w, g = rounded(x, kernel, gradient)
    flat = a.reshape(-1, a.shape[-1]), g.reshape(-1, features)
    for ours, exact in zip(got, (a @ w, g @ w.T, flat[0].T @ flat[1]), strict=True):
        assert ours.dtype == jnp.float32 and ours.shape == exact.shape
        np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())
    for ours, plain in zip(got, with_gradients(cpu.product, x, kernel, gradient), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2 * ROUNDING * np.abs(plain).max())


@pytest.mark.parametrize("features", [9, 20])
def test_operands_lie_by_rows_and_a_program_of_one_device_runs(features):
    """XLA's bfloat16 kernels need rows: a transpose that is a mere view takes a slow one, or none at all."""
    x, kernel, gradient = arrays(7, 12, features=features)
    step = lambda *a: with_gradients(cpu.bfloat16_product, *a)  # noqa: E731
    lines = str(jax.make_jaxpr(step)(x, kernel, gradient)).splitlines()
    laid_out = [line for line in lines if "= layout_constraint" in line]
    assert len(laid_out) == 2 and "bf16[12,7]" in str(laid_out) and f"bf16[{features},12]" in str(laid_out)
    assert step(x, kernel, gradient)[2].shape == kernel.shape


def test_large_float32_products_on_cpus_have_it_where_it_is_asked_for():
    x, kernel, _ = arrays(*LARGE, features=cpu.MIN_SIDE)
    product = lambda x, kernel: cpu.dot_general(x, kernel, (((2,), (0,)), ((), ())))  # noqa: E731
    assert not uses_it(product, x, kernel)
    with cpu.bfloat16_products(True):
        assert uses_it(product, x, kernel)
        assert not uses_it(product, x[:1], kernel) and not uses_it(product, x, kernel[:, 1:])
        with platforms.assumed(platforms.Target("tpu")):
            assert not uses_it(product, x, kernel)
    assert uses_it(cpu.with_bfloat16_products(product), x, kernel) and not uses_it(product, x, kernel)


def test_layers_and_their_arithmetic():
    x = jnp.ones((2, 8, 8, 32))
    for layer, uses in (
        (layers.Dense(64), True),
        (layers.conv(64, 1, dtype=jnp.float32, name="skip"), False),
    ):
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        with cpu.bfloat16_products(True):
            assert uses_it(layer.apply, params, x) == uses
            assert flops.count(layer.apply, params, x) == 2 * 128 * 32 * 64


def test_devices_split_it_as_they_split_float32():
    """The same sums on eight devices, each over its own rows, and no array of activations is gathered."""
    x, kernel, gradient = arrays(8, 8, 32, features=48)
    alone = with_gradients(cpu.bfloat16_product, x, kernel, gradient)
    mesh = partition.make_mesh()
    split = partition.batch_sharding(mesh)
    with partition.use_mesh(mesh):
        placed = jax.device_put((x, kernel, gradient), (split, partition.replicated(mesh), split))
        program = with_gradients.lower(cpu.bfloat16_product, *placed).compile()
        found = program(*placed)
    for ours, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    # JAX 0.10 gathers an operand whose layout is set; by themselves runs take these products from 0.12 on.
    assert jax.__version_info__ < (0, 12) or "all-gather" not in program.as_text()


def test_attention_rounds_inside_and_returns_float32():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 4, 16)).astype(np.float32) for n in (8, 9, 9))
    mask = rng.random((2, 1, 1, 9)) < 0.7
    for keys in (None, mask):
        plain = layers.attention(q, k, v, keys)
        with cpu.bfloat16_products(True):
            ours = layers.attention(q, k, v, keys)
            small = layers.attention(q[:, :1], k, v, keys)
        np.testing.assert_allclose(small, plain[:, :1], atol=1e-5)
        assert ours.dtype == jnp.float32 and (ours != plain).any()
        np.testing.assert_allclose(ours, plain, atol=4 * ROUNDING * np.abs(v).max())

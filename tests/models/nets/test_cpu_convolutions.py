"""Convolutions by minimal filtering agree with direct ones, and stand on CPUs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops
from dalle2_jax.models.nets import cpu, layers
from dalle2_jax.runtime import partition


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PIXELS", 0)
    monkeypatch.setattr(cpu, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(cpu, "MIN_PRODUCTS_DRAWING", 0)


def direct(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimensions)


def fast(x, kernel):
    return cpu.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None
    )


def arrays(*shape, features, dtype=np.float32):
    """(x, kernel, gradient), the outputs of variance 1."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=(3, 3, shape[-1], features)) / (3 * shape[-1] ** 0.5)
    return x.astype(dtype), kernel.astype(dtype), rng.normal(size=(*shape[:3], features)).astype(dtype)


def zeros(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def uses_it(function, *arguments) -> bool:
    program = jax.make_jaxpr(lambda *a: function(*a))(*arguments)  # a new function: traced anew
    return cpu.winograd_3x3.__name__ in str(program)


@pytest.mark.parametrize("shape, features", [((2, 5, 8, 64), 80), ((1, 3, 4, 128), 64), ((1, 1, 12, 64), 64)])
def test_outputs_and_gradients_are_those_of_a_direct_convolution(shape, features):
    x, kernel, gradient = arrays(*shape, features=features)
    assert uses_it(fast, x, kernel)

    def with_gradients(function, *arrays):
        def both(x, kernel, gradient):
            out, pull = jax.vjp(function, x, kernel)
            return out, *pull(gradient)

        return jax.device_get(jax.jit(both)(*arrays))

    with jax.enable_x64(True):
        wanted = with_gradients(direct, *(a.astype(np.float64) for a in (x, kernel, gradient)))
    for ours, theirs in zip(with_gradients(fast, x, kernel, gradient), wanted, strict=True):
        assert theirs.dtype == np.float64
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_a_batch_split_over_devices_gives_the_same():
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    x, kernel, _ = arrays(4, 4, 4, 64, features=64)
    mesh = partition.make_mesh(devices=jax.devices()[:2])
    with partition.use_mesh(mesh):
        split = jax.jit(fast)(jax.device_put(x, partition.batch_sharding(mesh)), kernel)
        assert uses_it(fast, x, kernel)
    np.testing.assert_allclose(split, jax.jit(direct)(x, kernel), atol=2e-5)
    assert len(split.sharding.device_set) == 2


@pytest.mark.parametrize(
    "shape, features, dtype",
    [((2, 4, 6, 64), 64, "float32"), ((2, 4, 4, 3), 64, "float32"), ((2, 4, 4, 64), 64, "bfloat16")],
    ids=["width", "channels", "bfloat16"],
)
def test_other_shapes_and_types_are_left_to_xla(shape, features, dtype):
    x, kernel = zeros(*shape, dtype=dtype), zeros(3, 3, shape[-1], features, dtype=dtype)
    assert not uses_it(fast, x, kernel)


def test_little_work_is_left_to_xla(monkeypatch):
    monkeypatch.undo()
    x, kernel = zeros(64, 16, 16, 64), zeros(3, 3, 64, 64)
    assert not uses_it(fast, x, kernel)
    assert uses_it(fast, zeros(1, 32, 32, 64), kernel)
    assert not uses_it(fast, zeros(64, 8, 8, 512), zeros(3, 3, 512, 512))


def test_drawing_needs_more_work_than_training_to_be_worth_its_compiling(monkeypatch):
    monkeypatch.undo()

    def convolutions(function, x):
        kernel = zeros(3, 3, *x.shape[-1:] * 2)
        return str(jax.make_jaxpr(lambda x, kernel: function(x, kernel))(x, kernel)).count(
            "= conv_general_dilated["
        )

    def training(x, kernel):
        return jax.vjp(fast, x, kernel)[0]

    little, much = zeros(8, 32, 32, 64), zeros(1, 64, 64, 64)
    assert (convolutions(training, little), convolutions(fast, little)) == (6, 1)
    assert (convolutions(training, much), convolutions(fast, much)) == (6, 6)


def test_other_platforms_keep_their_program(monkeypatch):
    conv = layers.conv(64, dtype=jnp.float32, name="c")
    x = zeros(1, 4, 4, 64)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    assert uses_it(conv.apply, params, x)
    strided = layers.conv(64, stride=2, dtype=jnp.float32, name="c")
    assert not uses_it(strided.apply, params, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not uses_it(conv.apply, params, x)


def test_flops_are_those_of_a_direct_convolution():
    x, kernel, _ = arrays(2, 4, 4, 64, features=80)
    assert uses_it(fast, x, kernel)
    assert flops.count(fast, x, kernel) == flops.count(direct, x, kernel) == 2 * 2 * 16 * 9 * 64 * 80

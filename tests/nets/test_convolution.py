"""Winograd's convolutions on CPUs agree with XLA's and stand nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import flops
from dalle2_jax.nets import convolution, layers


def direct(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimensions)


def fast(x, kernel):
    return convolution.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None
    )


def arrays(*shape, features, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=(3, 3, shape[-1], features)) / (3 * shape[-1] ** 0.5)
    return x.astype(dtype), kernel.astype(dtype), rng.normal(size=(*shape[:3], features)).astype(dtype)


@pytest.mark.parametrize("shape, features", [((2, 4, 6, 64), 80), ((1, 8, 4, 128), 136)])
@pytest.mark.parametrize("strip_bytes", [convolution.STRIP_BYTES, 1 << 14])
def test_outputs_and_gradients_are_those_of_a_direct_convolution(shape, features, strip_bytes, monkeypatch):
    monkeypatch.setattr(convolution, "STRIP_BYTES", strip_bytes)
    jax.clear_caches()
    x, kernel, gradient = arrays(*shape, features=features)
    assert "winograd_3x3" in str(jax.make_jaxpr(fast)(x, kernel))
    strips = convolution._strips(1, shape, features)
    assert (strips > 1) == (strip_bytes < convolution._padded(x).nbytes)
    with jax.enable_x64(True):
        wanted, pull = jax.vjp(direct, *(jnp.asarray(a, jnp.float64) for a in (x, kernel)))
        wanted = [wanted, *pull(jnp.asarray(gradient, jnp.float64))]
    got, pull = jax.vjp(fast, x, kernel)
    for ours, theirs in zip((got, *pull(gradient)), wanted, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())


def test_a_batch_split_over_devices_gives_the_same():
    from dalle2_jax import partition

    if len(jax.devices()) < 2:
        pytest.skip("one device")
    x, kernel, _ = arrays(4, 4, 4, 64, features=64)
    mesh = partition.make_mesh(devices=jax.devices()[:2])
    with partition.use_mesh(mesh):
        split = jax.jit(fast)(jax.device_put(x, partition.batch_sharding(mesh)), kernel)
    np.testing.assert_allclose(split, direct(x, kernel), atol=1e-5)


@pytest.mark.parametrize(
    "shape, features, dtype",
    [((2, 5, 4, 64), 64, "float32"), ((2, 4, 4, 3), 64, "float32"), ((2, 4, 4, 64), 64, "bfloat16")],
)
def test_other_shapes_and_types_are_left_to_xla(shape, features, dtype):
    x, kernel = jnp.zeros(shape, dtype), jnp.zeros((3, 3, shape[-1], features), dtype)
    assert "winograd" not in str(jax.make_jaxpr(fast)(x, kernel))


def test_other_platforms_keep_their_program(monkeypatch):
    conv = layers.conv(64, dtype=jnp.float32, name="c")
    x = jnp.zeros((1, 4, 4, 64))
    params = conv.init(jax.random.key(0), x)
    assert "winograd" in str(jax.make_jaxpr(conv.apply)(params, x))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()
    assert "winograd" not in str(jax.make_jaxpr(conv.apply)(params, x))


def test_flops_are_those_of_a_direct_convolution():
    x, kernel, _ = arrays(2, 4, 4, 64, features=80)
    assert flops.count(fast, x, kernel) == flops.count(direct, x, kernel) == 2 * 2 * 16 * 9 * 64 * 80

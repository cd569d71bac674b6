"""The normed convolutions of PixelSNAIL."""

import jax
import numpy as np

from dalle2_jax.models.nets.pixelsnail import NormedConv


def test_the_length_of_a_kernel_does_not_matter():
    """w = g v / |v| of each output channel."""
    conv = NormedConv(3, (1, 1))
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 4)).astype(np.float32)
    params = conv.init(jax.random.key(0), x)["params"]
    before = conv.apply({"params": params}, x)
    longer = params | {"kernel": params["kernel"] * np.array([2.0, 5.0, 0.1])}
    np.testing.assert_allclose(conv.apply({"params": longer}, x), before, rtol=1e-5)
    louder = params | {"scale": params["scale"] * 2}
    np.testing.assert_allclose(conv.apply({"params": louder}, x), 2 * np.asarray(before), rtol=1e-5)


def test_weights_that_the_mask_hides_do_not_matter():
    """Neither in the sums nor in the length of their kernel."""
    conv = NormedConv(2, (2, 3), causal=True)
    x = np.random.default_rng(0).standard_normal((1, 3, 3, 2)).astype(np.float32)
    params = conv.init(jax.random.key(0), x)["params"]
    other = params | {"kernel": params["kernel"].at[1, 1:].set(7.0)}
    np.testing.assert_array_equal(conv.apply({"params": other}, x), conv.apply({"params": params}, x))

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

"""The convolutions of VQ-VAE's autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.nets.vqvae import up_conv


def test_a_transposed_convolution_is_torchs_with_its_kernel_turned_around():
    """Kernel 4, stride 2, padding 1: every input adds a patch of 4 x 4, and the border of 1 is cut."""
    x = np.random.default_rng(0).standard_normal((3, 3, 2)).astype(np.float32)
    conv = up_conv(2, jnp.float32, None)
    params = conv.init(jax.random.key(0), x[None])["params"]
    torchs = np.asarray(params["kernel"])[::-1, ::-1]  # [4, 4, in, out]
    whole = np.zeros((8, 8, 2), np.float32)
    for row in range(3):
        for column in range(3):
            whole[2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += x[row, column] @ torchs
    np.testing.assert_allclose(conv.apply({"params": params}, x[None])[0], whole[1:-1, 1:-1], atol=1e-5)

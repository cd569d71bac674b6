"""How well a decoder's maps describe a picture: negative log-likelihoods, and the picture of the maps.

Logit-Laplace (arXiv 2102.12092, appendix A.3), with pixels m = (1 - 2 e) x + e for x in [0, 1]:

    -log f(m) = |logit(m) - mu| / b + log b + log(2 m (1 - m)),      picture = (sigmoid(mu) - e) / (1 - 2 e)

Where pixels can be foreseen exactly, as those of a plain background, b goes to 0 and their density has no
bound: their gradients, 1 / b, then drown those of edges. `min_scale` is added to b, which the paper has not.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets.dvae import MARGIN

KINDS = ("mse", "l1", "logit_laplace")


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihoods of pictures x [B, H, W, 3] in [-1, 1], given the decoder's maps.

    kind: 'mse', squared error over the variance of the data; 'l1', absolute error; 'logit_laplace', maps of
    mu and log b. variance: of the data, in the scale of [-1, 1]. min_scale: the least b of 'logit_laplace',
    in logits; 0 as in the paper.
    """

    kind: str = "mse"
    variance: float = 1.0
    min_scale: float = 0.0

    @property
    def channels(self) -> int:
        """Maps of the decoder."""
        return 6 if self.kind == "logit_laplace" else 3

    def nll(self, maps: jax.Array, x: jax.Array) -> jax.Array:
        """Of each value, [B, H, W, 3]; without the constants where it is an error."""
        if self.kind == "mse":
            return jnp.square(maps - x) / self.variance
        if self.kind == "l1":
            return jnp.abs(maps - x)
        m = (1 - 2 * MARGIN) * (x + 1) / 2 + MARGIN
        mu, log_b = jnp.split(maps, 2, axis=-1)
        if self.min_scale:
            log_b = jnp.logaddexp(log_b, jnp.log(self.min_scale))  # log(b + min_scale)
        return logit_laplace(m, mu, log_b)

    def picture(self, maps: jax.Array) -> jax.Array:
        """The picture of the maps, [B, H, W, 3] in [-1, 1]."""
        if self.kind == "logit_laplace":
            maps = 2 * (jax.nn.sigmoid(maps[..., :3]) - MARGIN) / (1 - 2 * MARGIN) - 1
        return jnp.clip(maps, -1, 1)


def logit_laplace(m: jax.Array, mu: jax.Array, log_b: jax.Array) -> jax.Array:
    """-log of the density of m in (0, 1)."""
    logit = jnp.log(m) - jnp.log1p(-m)
    return jnp.abs(logit - mu) * jnp.exp(-log_b) + log_b + jnp.log(2 * m * (1 - m))


def psnr(images: jax.Array, true: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio [B] in dB of pictures in [-1, 1]."""
    error = jnp.square(images - true).mean(axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))

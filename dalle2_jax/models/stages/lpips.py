"""LPIPS, a distance of pictures by features of VGG-16 (arXiv 1801.03924), for a tokenizer's loss.

    d(x, y) = sum over levels of mean over positions of w . (f(x) / |f(x)| - f(y) / |f(y)|)^2

Its weights are the user's: `convert lpips`. It is frozen; nothing trains it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets.vgg import VGG

# of the pixels in [-1, 1], as torchvision's weights expect them
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """The network; parameters go to every call."""

    net: VGG

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A picture, of any size."""
        return {"image": jax.ShapeDtypeStruct((batch_size, 32, 32, 3), jnp.float32)}

    def init(self, key: jax.Array, batch: dict) -> dict:
        """'net', and 'weights', a vector for each level."""
        weights = {f"level_{level}": jnp.ones(width) for level, width in enumerate(self.net.widths)}
        return {"net": self.net.init(key, batch["image"])["params"], "weights": weights}

    def distance(self, params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        """The mean distance [] of pictures [B, H, W, 3] in [-1, 1]."""
        mean, deviation = jnp.array(MEAN), jnp.array(DEVIATION)
        both = jnp.concatenate([x, y])
        total = jnp.float32(0)
        for level, found in enumerate(self.net.apply({"params": params["net"]}, (both - mean) / deviation)):
            # 1e-20 inside the root: the gradient at an inactive position is finite
            unit = found / (jnp.sqrt(jnp.square(found).sum(axis=-1, keepdims=True) + 1e-20) + 1e-10)
            of_x, of_y = jnp.split(unit, 2)
            total += (jnp.square(of_x - of_y) @ params["weights"][f"level_{level}"]).mean()
        return total


def build(*, widths: tuple[int, ...] = (64, 128, 256, 512, 512)) -> LPIPS:
    """The stage of a config; widths: of the five levels."""
    return LPIPS(VGG(tuple(widths)))

"""The convolutions of VGG-16 (arXiv 1409.1556) up to five activations, as LPIPS reads them."""

import flax.linen as nn
import jax

from dalle2_jax.models.nets import layers

DEPTHS = (2, 2, 3, 3, 3)  # convolutions before each max pooling


class VGG(nn.Module):
    """x [B, H, W, 3] -> the last activation of each of the five levels. widths: channels of each."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """See the class."""
        found = []
        for level, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True)):
            if level:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(depth):
                x = nn.relu(layers.conv(width, dtype=x.dtype, name=f"level_{level}_conv_{i}")(x))
            found.append(x)
        return found

"""The Inception network of 2015-12-05, whose features FID is measured with.

It is the third Inception (arXiv:1512.00567) as it was first released, with 1008 classes. Three things are not
as in later copies: averages at a border are over what lies inside the picture, the last block's pooling takes
the maximum, and pictures are 299 x 299 with (x - 128) / 128. Batch norm is folded into the kernels and biases
of the convolutions when weights are converted. Layers are named as in the released state dictionaries.

Everything is float32 with the highest precision of matrix products: bfloat16 or TF32 passes would move FID.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

IMAGE_SIZE = 299
CLASSES = 1008
EPSILON = 1e-3  # of its batch norm
SPATIAL_CHANNELS = 7  # of the 1x1 branch of Mixed_6d, which sFID reads
PRECISION = jax.lax.Precision.HIGHEST


def conv(x: jax.Array, name: str, features: int, size: tuple[int, int], stride: int = 1, pad: bool = True):
    """Convolution and ReLU; with `pad` and a stride of 1 the side stays."""
    padding = [(k // 2, k // 2) if pad else (0, 0) for k in size]
    return nn.relu(nn.Conv(features, size, stride, padding, precision=PRECISION, name=name)(x))


def max_pool(x: jax.Array, stride: int = 2) -> jax.Array:
    """Maximum of 3 x 3; with a stride of 1 the side stays."""
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


class Mixed(nn.Module):
    """Chains of convolutions side by side, and a pooling; their outputs are joined by channel.

    chains: of (name, features, kernel); the last entry of a chain may be a pair of them that both read what
    comes before. halve: the last convolution of each chain and the pooling have stride 2 and no padding.
    pool: 'mean' or 'max'. pool_features: of the 1x1 convolution behind it; 0 for none.
    """

    chains: tuple
    pool: str
    pool_features: int
    halve: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', C']; the first chain's channels come first."""
        outputs = []
        for chain in self.chains:
            h = x
            for layer in chain[:-1]:
                h = conv(h, *layer)
            ends = chain[-1] if isinstance(chain[-1][0], tuple) else (chain[-1],)
            stride, pad = (2, False) if self.halve else (1, True)
            outputs += [conv(h, name, features, kernel, stride, pad) for name, features, kernel in ends]
        if self.pool == "mean":
            h = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        else:
            h = max_pool(x, 2 if self.halve else 1)
        if self.pool_features:
            h = conv(h, "branch_pool", self.pool_features, (1, 1))
        return jnp.concatenate([*outputs, h], axis=-1)


_ONE, _THREE, _FIVE, _ROW, _COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def mixed_35(pool_features: int, name: str) -> Mixed:
    """At 35 x 35: 1x1, 5x5, twice 3x3."""
    chains = (
        (("branch1x1", 64, _ONE),),
        (("branch5x5_1", 48, _ONE), ("branch5x5_2", 64, _FIVE)),
        (("branch3x3dbl_1", 64, _ONE), ("branch3x3dbl_2", 96, _THREE), ("branch3x3dbl_3", 96, _THREE)),
    )
    return Mixed(chains, "mean", pool_features, name=name)


def mixed_17(inner: int, name: str) -> Mixed:
    """At 17 x 17: 1x1, 7x7 as a row and a column, twice that."""
    double = ((inner, _COLUMN), (inner, _ROW), (inner, _COLUMN), (192, _ROW))
    chains = (
        (("branch1x1", 192, _ONE),),
        (("branch7x7_1", inner, _ONE), ("branch7x7_2", inner, _ROW), ("branch7x7_3", 192, _COLUMN)),
        (
            ("branch7x7dbl_1", inner, _ONE),
            *((f"branch7x7dbl_{i}", *layer) for i, layer in enumerate(double, 2)),
        ),
    )
    return Mixed(chains, "mean", 192, name=name)


def mixed_8(pool: str, name: str) -> Mixed:
    """At 8 x 8: 1x1, 3x3 as a row beside a column, 3x3 and that."""
    chains = (
        (("branch1x1", 320, _ONE),),
        (("branch3x3_1", 384, _ONE), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))),
        (
            ("branch3x3dbl_1", 448, _ONE),
            ("branch3x3dbl_2", 384, _THREE),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ),
    )
    return Mixed(chains, pool, 192, name=name)


class Inception(nn.Module):
    """The whole network. Its parameters are kernels and biases alone, 24 million numbers."""

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        """Features of pictures.

        Args:
          image: [B, 299, 299, 3] float32, (x - 128) / 128 of the levels x in 0 .. 255.

        Returns:
          'pool' [B, 2048], the mean over positions before the classes; 'spatial' [B, 17 * 17 * 7]; 'logits'
          [B, 1008] and 'logits_unbiased', without the last bias, which the inception score reads.
        """
        x = conv(image.astype(jnp.float32), "Conv2d_1a_3x3", 32, _THREE, 2, False)  # [B, 149, 149, 32]
        x = conv(x, "Conv2d_2a_3x3", 32, _THREE, 1, False)  # [B, 147, 147, 32]
        x = max_pool(conv(x, "Conv2d_2b_3x3", 64, _THREE))  # [B, 73, 73, 64]
        x = conv(x, "Conv2d_3b_1x1", 80, _ONE)
        x = max_pool(conv(x, "Conv2d_4a_3x3", 192, _THREE, 1, False))  # [B, 35, 35, 192]
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = mixed_35(pool_features, name)(x)  # [B, 35, 35, 256], then 288 channels
        double = (
            ("branch3x3dbl_1", 64, _ONE),
            ("branch3x3dbl_2", 96, _THREE),
            ("branch3x3dbl_3", 96, _THREE),
        )
        x = Mixed(((("branch3x3", 384, _THREE),), double), "max", 0, True, name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = mixed_17(inner, name)(x)  # [B, 17, 17, 768]
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)  # [B, 17 * 17 * 7]
        single = (("branch3x3_1", 192, _ONE), ("branch3x3_2", 320, _THREE))
        seven = (
            ("branch7x7x3_1", 192, _ONE),
            ("branch7x7x3_2", 192, _ROW),
            ("branch7x7x3_3", 192, _COLUMN),
            ("branch7x7x3_4", 192, _THREE),
        )
        x = Mixed((single, seven), "max", 0, True, name="Mixed_7a")(x)  # [B, 8, 8, 1280]
        x = mixed_8("max", "Mixed_7c")(mixed_8("mean", "Mixed_7b")(x))
        pool = x.mean(axis=(1, 2))  # [B, 8, 8, 2048] -> [B, 2048]
        fc = nn.Dense(CLASSES, precision=PRECISION, name="fc")
        logits = fc(pool)
        bias = fc.variables["params"]["bias"]
        return {"pool": pool, "spatial": spatial, "logits": logits, "logits_unbiased": logits - bias}

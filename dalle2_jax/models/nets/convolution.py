"""3 x 3 convolutions on CPUs with half of the multiplications.

Winograd's minimal filtering F(4, 3) along each row of a picture (Lavin and Gray, arXiv 1509.09308, sections
4.1 and 4.3): four neighbours of a row of the output are A'[(G w) * (B' d)] of six neighbours d of the input
and the three columns w of the kernel; the product in the middle is six convolutions of 3 x 1, one value in
four of each row. Results differ from direct sums by float rounding, some 4e-6 of the largest.

Not along columns too: F(2 x 2, 3 x 3) was no faster and took twelve times as long to compile
(docs/performance.md). On CPUs, in float32, one of 1 x 1 is a product, whose gradient by the kernel takes a
third to a quarter of the time. Of other shapes than `_worth_it` names, in other types and elsewhere, a
convolution is XLA's own.
"""

import itertools
import operator
from functools import reduce

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import products

# F(4, 3) interpolates at 0, 1, -1, 2, -2 and infinity.
_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
TILE = len(_A)
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# With fewer channels the sums around the products cost what these save, with fewer pixels those of the kernel
# do, and with less work in all compiling takes longer than is won: training repeats a step for hours, drawing
# for some seconds. They are of one example, so that a picture does not depend on how many are drawn at once.
MIN_PIXELS = 16 * 16
MIN_CHANNELS, MIN_PRODUCTS = 32, 16 << 20
MIN_CHANNELS_DRAWING, MIN_PRODUCTS_DRAWING = 64, 64 << 20


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides, padding, *, precision=None, **how
) -> jax.Array:
    """`jax.lax.conv_general_dilated` as `flax.linen.Conv` calls it: x [B, H, W, C], kernel [h, w, C, K] ->
    [B, H', W', K]."""
    undilated = all(set(how.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    plain = undilated and set(window_strides) == {1} and how.get("feature_group_count", 1) == 1
    border = set(itertools.chain(*padding))
    if plain and precision is None and products.apply_to(x, kernel):
        if kernel.shape[:2] == (1, 1) and border == {0}:
            return products.product(x, kernel[0, 0])
        if kernel.shape[:2] == (3, 3) and border == {1} and _worth_it(x, kernel):
            return winograd_3x3(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, precision=precision, **how)


def _worth_it(x: jax.Array, kernel: jax.Array) -> bool:
    pixels, fits = x.shape[1] * x.shape[2], x.shape[2] % TILE == 0
    return fits and pixels >= MIN_PIXELS and _large(x, kernel, MIN_CHANNELS, MIN_PRODUCTS)


def _large(x: jax.Array, kernel: jax.Array, min_channels: int, min_products: int) -> bool:
    """By the channels on either side and the products of one example."""
    work = kernel.size * x.shape[1] * x.shape[2]
    return min(kernel.shape[2:]) >= min_channels and work >= min_products


# jitted for its name, by which `dalle2_jax.models.flops` counts it as the convolution that it is
@jax.jit
def winograd_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C] with W a multiple of 4, kernel [3, 3, C, K] -> [B, H, W, K], zeros around x; float32."""
    return _conv(x, kernel)


@jax.custom_vjp
def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What is not differentiated: drawing, and losses that are only measured."""
    if _large(x, kernel, MIN_CHANNELS_DRAWING, MIN_PRODUCTS_DRAWING):
        return _filtered(x, kernel)
    one_around = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), one_around, dimension_numbers=_DIMENSIONS)


def _filtered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    sums = [
        jax.lax.conv_general_dilated(d, w, (1, 1), ((1, 1), (0, 0)), dimension_numbers=_DIMENSIONS)
        for d, w in zip(_tiles(x), _combine(_G, [kernel[:, i : i + 1] for i in range(3)]), strict=True)
    ]
    return jnp.stack(_combine(_A, sums), axis=3).reshape(*x.shape[:3], kernel.shape[-1])


def _forward(x, kernel):
    return _filtered(x, kernel), (x, kernel)


def _backward(saved, gradient):
    """As products of matrices [positions, 3 rows of channels]: for convolutions XLA would turn kernels round,
    which takes longer than the product."""
    x, kernel = saved
    channels, features = kernel.shape[2:]
    turned = jnp.flip(kernel, (0, 1)).transpose(2, 0, 1, 3)  # [C, 3, 3, K]: what is contiguous stays so
    entries = _combine(_G, [turned[:, :, i].reshape(channels, -1) for i in range(3)])
    sums = [_three_rows(g) @ w.T for g, w in zip(_tiles(gradient), entries, strict=True)]
    by_x = jnp.stack(_combine(_A, sums), axis=1).reshape(x.shape)

    padded = _padded(gradient)
    of_products = _combine(zip(*_A, strict=True), [_every_fourth(padded, 1 + i) for i in range(TILE)])
    by_w = [
        d.reshape(-1, channels).T @ _three_rows(g, reverse=True)
        for d, g in zip(_tiles(x), of_products, strict=True)
    ]
    by_columns = [c.reshape(channels, 3, features) for c in _combine(zip(*_G, strict=True), by_w)]
    return by_x, jnp.stack(by_columns, axis=2).transpose(1, 2, 0, 3)


_conv.defvjp(_forward, _backward)


def _tiles(x):
    """B' d along the rows of x [B, H, W, C], zeros around: six of [B, H, W / 4, C]."""
    padded = _padded(x)
    return _combine(_B, [_every_fourth(padded, i) for i in range(len(_B))])


def _padded(x):
    return jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))


def _every_fourth(padded, first):
    """Of the columns of a padded picture, as many as it has tiles."""
    return padded[:, :, first : first + padded.shape[2] - len(_B) + 1 : TILE]


def _three_rows(d, reverse=False):
    """Each position of d [B, H, N, K] with those above and below it: [B * H * N, 3 K], zeros around."""
    padded, height = jnp.pad(d, ((0, 0), (1, 1), (0, 0), (0, 0))), d.shape[1]
    rows = [padded[:, i : i + height] for i in range(3)]
    return jnp.concatenate(rows[::-1] if reverse else rows, axis=-1).reshape(-1, 3 * d.shape[-1])


def _combine(matrix, arrays):
    """matrix @ arrays, with what is times zero left out."""
    rows = ([c if c in (1, -1) else float(c) for c in row] for row in matrix)
    return [
        reduce(operator.add, (_times(c, a) for c, a in zip(row, arrays, strict=True) if c)) for row in rows
    ]


def _times(c, array):
    return array if c == 1 else -array if c == -1 else c * array

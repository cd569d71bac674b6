"""What CPUs compute in another way than XLA does by itself; `chosen` is the one switch.

Products. JAX takes the gradient of x @ kernel by the kernel as (gradient' x)'. XLA transposes that on CPUs
where it is used, in each pass of the optimizer: a fifth of a training step of the prior
(docs/performance.md). Here the gradient is x' gradient, the same sums of the same products. A 1 x 1
convolution is such a product.

Products in bfloat16. Intel's AMX multiplies bfloat16 several times as fast as float32. Inside
`bfloat16_products(True)` large products of tokens, and attention, round their operands to bfloat16. Sums,
results and all work between products stay float32.

3 x 3 convolutions take half of the multiplications by Winograd's minimal filtering F(4, 3) along each row of
a picture (Lavin and Gray, arXiv 1509.09308, sections 4.1 and 4.3):

    outputs = A' [(G w) * (B' d)]      4 neighbours of a row from 6 neighbours d and 3 columns w of the kernel

The product in the middle is six convolutions of 3 x 1, each over one value in four of a row. Results differ
from direct sums by float rounding, some 4e-6 of the largest. Filtering along columns too, F(2 x 2, 3 x 3),
was no faster and took twelve times as long to compile.

Group norm's values are spread over channels by a product with zeros and ones.

On other devices, in other types than float32 and for other shapes, all of these are XLA's own operations.
"""

import itertools
import operator
from collections.abc import Callable
from functools import partial, reduce, wraps

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dalle2_jax.models.nets import platforms

# Inside `with bfloat16_products(True):` programs for CPUs are traced with bfloat16 operands. Part of JAX's
# cache keys.
bfloat16_products = jax.make_user_context(False)


def with_bfloat16_products(function: Callable) -> Callable:
    """The function, traced inside `bfloat16_products(True)`."""

    @wraps(function)
    def traced(*arguments):
        with bfloat16_products(True):
            return function(*arguments)

    return traced


def chosen(*arrays: jax.Array) -> bool:
    """The switch: True if the traced program will run on CPUs and all arrays are float32."""
    return platforms.target().platform == "cpu" and all(array.dtype == jnp.float32 for array in arrays)


def in_bfloat16(*arrays: jax.Array) -> bool:
    """Whether large products of these arrays round their operands."""
    return bfloat16_products.value and chosen(*arrays)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, **how) -> jax.Array:
    """`jax.lax.dot_general` as `flax.linen.Dense` calls it: x [..., C], kernel [C, K] -> [..., K]."""
    dense = kernel.ndim == 2 and dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    if dense and precision is None and not any(how.values()) and chosen(x, kernel):
        return (bfloat16_product if _rounds(x, kernel) else product)(x, kernel)
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision, **how)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., C] @ kernel [C, K] -> [..., K]."""
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, gradient):
    x, kernel = saved
    rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])  # [N, C], [N, K]
    # contract both over N: the result is [C, K] as the kernel lies, without a transpose
    return gradient @ kernel.T, jax.lax.dot_general(rows, slopes, (((0,), (0,)), ((), ())))


product.defvjp(_product_forward, _product_backward)

# Fewer products, of the whole batch, or narrower kernels gain nothing in bfloat16.
MIN_ROUNDED_PRODUCTS, MIN_SIDE = 16 << 20, 32


def _rounds(x: jax.Array, kernel: jax.Array) -> bool:
    large = x.size * kernel.shape[-1] >= MIN_ROUNDED_PRODUCTS and min(kernel.shape) >= MIN_SIDE
    return in_bfloat16(x, kernel) and large


@jax.custom_vjp
def bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., C] @ kernel [C, K] -> [..., K] float32; operands and gradient are rounded to bfloat16."""
    return _bfloat16_forward(x, kernel)[0]


def _bfloat16_forward(x, kernel):
    # XLA's fast kernels take two axes, row by row, alone.
    rows, kernel = x.astype(jnp.bfloat16).reshape(-1, x.shape[-1]), kernel.astype(jnp.bfloat16)
    return _sums(rows, kernel).reshape(*x.shape[:-1], -1), (rows, kernel)


def _bfloat16_backward(saved, gradient):
    rows, kernel = saved  # [N, C], [C, K]
    slopes = gradient.astype(jnp.bfloat16).reshape(-1, kernel.shape[1])  # [N, K]
    by_x = _sums(slopes, _transposed(kernel)).reshape(*gradient.shape[:-1], -1)
    # Not (slopes' rows)' where that is the smaller one to transpose: XLA takes the last transpose into the
    # product, for which there is no kernel, and fails when it runs.
    return by_x, _sums(_transposed(rows), slopes)


bfloat16_product.defvjp(_bfloat16_forward, _bfloat16_backward)


def _sums(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [..., M, N] @ b [..., N, K] -> [..., M, K], of bfloat16 in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _transposed(x: jax.Array) -> jax.Array:
    """x' [..., K, M] of x [..., M, K], laid out row by row; XLA would leave it as it lies."""
    return with_layout_constraint(x.swapaxes(-1, -2), Layout(tuple(range(x.ndim))))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`jax.nn.dot_product_attention` of q [B, N, H, D], k and v [B, M, H, D], mask [B, H, N, M]."""
    dtype = v.dtype
    if in_bfloat16(q, k, v) and q.size * k.shape[1] >= MIN_ROUNDED_PRODUCTS:
        q, k, v = (y.astype(jnp.bfloat16) for y in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def to_channels(x: jax.Array, channels: int) -> jax.Array:
    """The values of groups [N, G] repeated for each of their channels: [N, C].

    On a CPU, where nothing is differentiated, it is a product with zeros and ones, which rounds nothing. XLA
    would look a broadcast group up again for every pixel, in a loop that takes one number at a time.
    """
    if not chosen(x):
        return _repeated(x, channels)
    return groups_to_channels(x, _repeated(jnp.eye(x.shape[-1], dtype=x.dtype), channels))


# jitted for its name: `models.flops` leaves it out, since it computes nothing
@jax.jit
def groups_to_channels(x: jax.Array, members: jax.Array) -> jax.Array:
    """x [N, G], members [G, C] of zeros and ones -> [N, C]."""
    return x @ members


def _repeated(x, channels):
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


def _to_channels_backward(channels, groups, gradient):
    # [N, C] -> [N, G, C / G]: a group's gradient is the sum over its channels
    return (gradient.reshape(-1, groups, channels // groups).sum(axis=-1),)


to_channels.defvjp(lambda x, channels: (_repeated(x, channels), x.shape[-1]), _to_channels_backward)

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

# Filtering pays above these sizes. With fewer channels its sums cost what it saves, with fewer pixels the
# kernel's do. With less work in all, compiling takes longer than it wins; training repeats a step for hours,
# sampling for some seconds. Sizes are of one example, so that a picture does not depend on the batch size.
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
    if plain and precision is None and chosen(x, kernel):
        if kernel.shape[:2] == (1, 1) and border == {0}:
            return product(x, kernel[0, 0])
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


# jitted for its name: `models.flops` counts it as a direct convolution
@jax.jit
def winograd_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C] with W a multiple of 4, kernel [3, 3, C, K] -> [B, H, W, K], zeros around x; float32."""
    return _conv(x, kernel)


@jax.custom_vjp
def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution where nothing is differentiated: sampling, and losses of validation."""
    if _large(x, kernel, MIN_CHANNELS_DRAWING, MIN_PRODUCTS_DRAWING):
        return _filtered(x, kernel)
    one_around = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), one_around, dimension_numbers=_DIMENSIONS)


def _filtered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    columns = [kernel[:, i : i + 1] for i in range(3)]  # each [3, 1, C, K]
    sums = [  # six of [B, H, W / 4, K]
        jax.lax.conv_general_dilated(d, w, (1, 1), ((1, 1), (0, 0)), dimension_numbers=_DIMENSIONS)
        for d, w in zip(_tiles(x), _combine(_G, columns), strict=True)
    ]
    # four of [B, H, W / 4, K], side by side in a tile: [B, H, W / 4, 4, K] -> [B, H, W, K]
    return jnp.stack(_combine(_A, sums), axis=3).reshape(*x.shape[:3], kernel.shape[-1])


def _conv_forward(x, kernel):
    return _filtered(x, kernel), (x, kernel)


def _conv_backward(saved, gradient):
    """Gradients as products of matrices [positions, 3 rows of channels].

    For convolutions XLA would flip the kernels, which takes longer than the product.
    """
    x, kernel = saved
    channels, features = kernel.shape[2:]
    # By x: the same filtering with the kernel flipped and C, K exchanged. [C, 3, 3, K] keeps K contiguous.
    flipped = jnp.flip(kernel, (0, 1)).transpose(2, 0, 1, 3)
    entries = _combine(_G, [flipped[:, :, i].reshape(channels, -1) for i in range(3)])  # six of [C, 3 K]
    sums = [_three_rows(g) @ w.T for g, w in zip(_tiles(gradient), entries, strict=True)]  # [B H W / 4, C]
    by_x = jnp.stack(_combine(_A, sums), axis=1).reshape(x.shape)

    # By the kernel: the transpose of each map above, in turn A, the six products, G.
    padded = _padded(gradient)
    of_products = _combine(zip(*_A, strict=True), [_every_fourth(padded, 1 + i) for i in range(TILE)])
    by_w = [  # six of [C, 3 K]
        d.reshape(-1, channels).T @ _three_rows(g, reverse=True)
        for d, g in zip(_tiles(x), of_products, strict=True)
    ]
    by_columns = [c.reshape(channels, 3, features) for c in _combine(zip(*_G, strict=True), by_w)]
    return by_x, jnp.stack(by_columns, axis=2).transpose(1, 2, 0, 3)  # [C, 3, 3, K] -> [3, 3, C, K]


_conv.defvjp(_conv_forward, _conv_backward)


def _tiles(x):
    """B' d along the rows of x [B, H, W, C], zeros around: six of [B, H, W / 4, C]."""
    padded = _padded(x)
    return _combine(_B, [_every_fourth(padded, i) for i in range(len(_B))])


def _padded(x):
    return jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))


def _every_fourth(padded, first):
    """Columns first, first + 4, ... of a padded picture [B, H, W + 2, C], one a tile: [B, H, W / 4, C]."""
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

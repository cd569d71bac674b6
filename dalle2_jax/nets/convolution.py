"""3 x 3 convolutions by Winograd's minimal filtering on CPUs, with 4/9 of the multiplications.

The one place in `nets` that asks which platform it computes on. Elsewhere than on CPUs, in another type than
float32 and for other shapes than `_worth_it` names, a convolution is XLA's own.

Y = A'[(G w G') * (B' d B)]A for each 2 x 2 outputs of a 4 x 4 patch d, F(2x2, 3x3) of Lavin and Gray (arXiv
1509.09308): the sixteen entries of the product in the middle are sixteen products of matrices. The matrices
hold 0, 1 and 1/2, so results differ from direct sums by float rounding alone (about 1e-6 of the largest).
"""

import functools

import jax
import jax.numpy as jnp

from dalle2_jax.partition import batch_shards

# Patches of so many bytes a device are in work at a time: more leave the cache.
STRIP_BYTES = 4 << 20
# With fewer channels the patches cost more than the products save; the gradient by the kernel needs more.
MIN_CHANNELS, MIN_CHANNELS_OF_GRADIENT = 64, 128


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides,
    padding,
    *,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    precision=None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for `flax.linen.Conv`: x [B, H, W, C], kernel [h, w, C, K] ->
    [B, H', W', K]."""
    usual = all(d is None or set(d) == {1} for d in (lhs_dilation, rhs_dilation)) and feature_group_count == 1
    same = tuple(window_strides) == (1, 1) and [tuple(p) for p in padding] == [(1, 1), (1, 1)]
    if usual and same and precision is None and _on_cpu() and _worth_it(x, kernel):
        return winograd_3x3(x, kernel, shards=batch_shards())
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )


def _on_cpu() -> bool:
    """Whether what is traced will run on CPUs: on the mesh's devices, or else on the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def _worth_it(x: jax.Array, kernel: jax.Array) -> bool:
    even = x.ndim == 4 and x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    wide = kernel.shape[:2] == (3, 3) and min(kernel.shape[2:]) >= MIN_CHANNELS
    return even and wide and x.dtype == kernel.dtype == jnp.float32


# jitted for its name, by which `dalle2_jax.flops` counts it as the convolution that it is
@functools.partial(jax.jit, static_argnames="shards")
def winograd_3x3(x: jax.Array, kernel: jax.Array, *, shards: int = 1) -> jax.Array:
    """x [B, H, W, C] with even sides, kernel [3, 3, C, K] -> [B, H, W, K], zeros around x; float32.

    shards: into how many parts the batch is split over devices.
    """
    return _conv(shards, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(shards: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, _ = x.shape
    strips, entries = _strips(shards, x.shape, kernel.shape[-1]), _of_kernel(kernel)
    rows, padded, outputs = height // strips, _padded(x), []
    for i in range(strips):
        patches = _patches(padded[:, i * rows : (i + 1) * rows + 2])
        products = jnp.einsum("ptc,pck->ptk", patches, entries)
        outputs.append(_outputs(products, (batch, rows, width)))
    return jnp.concatenate(outputs, axis=1)


def _forward(shards, x, kernel):
    return _conv(shards, x, kernel), (x, kernel)


def _backward(shards, saved, gradient):
    x, kernel = saved
    by_x = _conv(shards, gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    if _strips(shards, x.shape, kernel.shape[-1]) > 1 or min(kernel.shape[2:]) < MIN_CHANNELS_OF_GRADIENT:
        return by_x, jax.linear_transpose(functools.partial(_direct, x), kernel)(gradient)[0]
    patches, size = _patches(_padded(x)), gradient.shape[:3]
    products = jax.ShapeDtypeStruct((*patches.shape[:2], kernel.shape[-1]), gradient.dtype)
    (of_products,) = jax.linear_transpose(lambda m: _outputs(m, size), products)(gradient)
    (by_kernel,) = jax.linear_transpose(_of_kernel, kernel)(jnp.einsum("ptc,ptk->pck", patches, of_products))
    return by_x, by_kernel


_conv.defvjp(_forward, _backward)


def _direct(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimensions)


def _strips(shards: int, shape: tuple[int, ...], features: int) -> int:
    """In how many strips of rows pictures of this shape are worked through."""
    batch, height, width, channels = shape
    size = 16 * 4 * max(1, batch // shards) * (height // 2) * (width // 2) * max(channels, features)
    strips = 1
    while size > strips * STRIP_BYTES and height % (4 * strips) == 0:
        strips *= 2
    return strips


def _padded(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _b(d):
    """B' along a list of four."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _g(w):
    """G along a list of three."""
    ends, middle = 0.5 * (w[0] + w[2]), 0.5 * w[1]
    return [w[0], ends + middle, ends - middle, w[2]]


def _a(m):
    """A' along a list of four."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _both(transform, entries):
    """`transform` along both axes of a list of lists."""
    half = [transform(row) for row in entries]
    columns = [transform(list(column)) for column in zip(*half, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _patches(padded):
    """B' d B of padded pictures [B, H + 2, W + 2, C]: [16, B * H/2 * W/2, C]."""
    height, width, channels = padded.shape[1] - 2, padded.shape[2] - 2, padded.shape[3]
    d = [[padded[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for j in range(4)] for i in range(4)]
    return jnp.stack([entry.reshape(-1, channels) for row in _both(_b, d) for entry in row])


def _of_kernel(kernel):
    """G w G' of [3, 3, C, K]: [16, C, K]."""
    rows = _both(_g, [[kernel[i, j] for j in range(3)] for i in range(3)])
    return jnp.stack([entry for row in rows for entry in row])


def _outputs(products, size):
    """A' m A of [16, B * H/2 * W/2, K]: [B, H, W, K], where size is (B, H, W)."""
    batch, height, width = size
    m = products.reshape(4, 4, batch, height // 2, width // 2, -1)
    rows = _both(_a, [[m[i, j] for j in range(4)] for i in range(4)])
    y = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
    return y.reshape(batch, height, width, -1)

"""Products with kernels on CPUs, whose gradients by the kernel come as the kernel lies.

JAX takes the gradient of x @ kernel by the kernel as (gradient' x)', and XLA transposes that on CPUs where
it is used, in each of the passes of the optimizer: a fifth of a training step of the prior
(docs/performance.md). Here it is x' gradient, the same sums of the same products. On other platforms, and in
other types than float32, a product is XLA's own.
"""

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import platforms


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, **how) -> jax.Array:
    """`jax.lax.dot_general` as `flax.linen.Dense` calls it: x [..., C], kernel [C, K] -> [..., K]."""
    dense = kernel.ndim == 2 and dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    if dense and precision is None and not any(how.values()) and apply_to(x, kernel):
        return product(x, kernel)
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision, **how)


def apply_to(*arrays: jax.Array) -> bool:
    """Whether what is traced will run on CPUs, and the arrays are float32."""
    return platforms.target().platform == "cpu" and all(array.dtype == jnp.float32 for array in arrays)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., C] @ kernel [C, K] -> [..., K]."""
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, jax.lax.dot_general(rows, slopes, (((0,), (0,)), ((), ())))


product.defvjp(_forward, _backward)

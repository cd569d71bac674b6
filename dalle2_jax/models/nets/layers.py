"""Layers that every network shares, with the numerics of the published weights fixed in one place.

Parameters are float32; `dtype` is the compute type. Norms, softmax and timestep embeddings are float32
whatever `dtype` is. Layer and group norm use epsilon 1e-5, RMS norm 1e-6. GELU is exact unless a network asks
for QuickGELU.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import cpu, platforms
from dalle2_jax.runtime.partition import constrain

NORM_EPSILON = 1e-5

# Inside `with shapes_only(True):` initialisers give zeros. For tracing shapes, or a network whose parameters
# are there: normal draws for every leaf would take a third of the time. Part of JAX's cache keys.
shapes_only = jax.make_user_context(False)


def normal(stddev: float) -> Callable:
    """`nn.initializers.normal`, quick inside `shapes_only`."""
    return _unless_shapes_only(nn.initializers.normal(stddev))


def lecun_normal() -> Callable:
    """`nn.initializers.lecun_normal`, quick inside `shapes_only`."""
    return _unless_shapes_only(nn.initializers.lecun_normal())


def _unless_shapes_only(draw: Callable) -> Callable:
    def init(key, shape, dtype=jnp.float32, **how):
        return jnp.zeros(shape, dtype) if shapes_only.value else draw(key, shape, dtype, **how)

    return init


Dense = partial(nn.Dense, param_dtype=jnp.float32, kernel_init=lecun_normal(), dot_general=cpu.dot_general)
LayerNorm = partial(nn.LayerNorm, epsilon=NORM_EPSILON, dtype=jnp.float32, param_dtype=jnp.float32)
RMSNorm = partial(nn.RMSNorm, epsilon=1e-6, dtype=jnp.float32, param_dtype=jnp.float32)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x): the approximation that OpenAI's CLIP weights were trained with."""
    return x * nn.sigmoid(1.702 * x)


REMAT = ("none", "products", "all")


def remat(block: type[nn.Module], what: bool | str, **options) -> type[nn.Module]:
    """A module whose activations are computed again in the backward pass, to save memory; names unchanged.

    what: 'none', 'all' or 'products'. 'products' keeps the results of convolutions, of products with a kernel
    and of sums (the statistics of norms): little work again for most of the memory. True is 'all', False
    'none'. options: of `nn.remat`; in a `lax.scan`, which merges nothing across its turns, `prevent_cse` only
    costs time. Raises ValueError for another `what`.
    """
    what = ("all" if what else "none") if isinstance(what, bool) else what
    if what not in REMAT:
        raise ValueError(f"remat {what!r} is unknown; choose one of {REMAT}")
    if what == "none":
        return block
    return nn.remat(block, policy=_worth_keeping if what == "products" else None, **options)


def _worth_keeping(primitive, *_, **how) -> bool:
    """Whether 'products' keeps the result of a primitive; the custom gradients are those of `nets.cpu`."""
    if primitive is jax.lax.dot_general_p:
        # A product of two activations (attention's) has two batch dimensions, example and head, and a large
        # result. One with a kernel has at most one, SAM's replicas, each with a kernel of its own.
        return len(how["dimension_numbers"][1][0]) < 2
    if primitive.name == _CUDNN_FORWARD:
        return True  # the weights of attention, [N, M], are not among its results
    return primitive in (
        jax.lax.conv_general_dilated_p,
        jax.lax.reduce_sum_p,
        jax.custom_derivatives.custom_vjp_call_p,
    )


_ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
    "silu": nn.silu,
}


def activation(name: str) -> Callable:
    """The activation called `name`: 'gelu' (exact), 'quick_gelu' or 'silu'. Raises ValueError for another
    name."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def timestep_embedding(
    t: jax.Array, dim: int, max_period: float = 10_000.0, *, sin_first: bool = False, freq_shift: int = 0
) -> jax.Array:
    """Sinusoids of t [B] as [B, dim] float32, zero-padded when dim is odd.

    ADM's order is cosines before sines, its frequencies are max_period^(-k / half), k = 0 .. half - 1;
    DDPM's order is `sin_first`, and it divides by half - freq_shift = half - 1.
    """
    half = dim // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    args = t.astype(jnp.float32)[:, None] * freqs[None]  # [B, half]
    waves = [jnp.sin(args), jnp.cos(args)] if sin_first else [jnp.cos(args), jnp.sin(args)]
    embedding = jnp.concatenate(waves, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


def num_groups(channels: int) -> int:
    """ADM's 32 groups; narrower layers keep at least four channels a group, so that a group norm is no
    instance norm."""
    return math.gcd(channels, min(32, max(1, channels // 4)))


class GroupNorm(nn.Module):
    """Group norm over [B, H, W, C] or [B, N, C], computed in float32 and returned in float32.

    groups: 0 for `num_groups` of the channels.
    """

    groups: int = 0
    epsilon: float = NORM_EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> the same shape, float32."""
        channels = x.shape[-1]
        groups = self.groups or num_groups(channels)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        axes = tuple(range(1, x.ndim - 1))
        # Statistics of channels first, then of groups. On a CPU reductions that keep the channels minor are
        # several times faster than those over [positions, channels of a group]. The merge is exact:
        # var of a group = mean over its channels of (var + (mean - group_mean)^2).
        mean = x.mean(axis=axes)  # [B, C]
        var = jnp.square(x - jnp.expand_dims(mean, axes)).mean(axis=axes)
        mean, var = (s.reshape(-1, groups, channels // groups) for s in (mean, var))  # [B, G, C / G]
        group_mean = mean.mean(axis=-1)  # [B, G]
        group_var = (var + jnp.square(mean - group_mean[..., None])).mean(axis=-1)
        # (x - mean) / std * scale + bias as x * gain + shift, both [B, C]
        gain = cpu.to_channels(jax.lax.rsqrt(group_var + self.epsilon), channels) * scale
        shift = bias - cpu.to_channels(group_mean, channels) * gain
        return x * jnp.expand_dims(gain, axes) + jnp.expand_dims(shift, axes)


def conv(
    features: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
    dtype,
    name: str,
    zero: bool = False,
    bias: bool = True,
):
    """A square convolution; padding: None pads alike on all sides (torch's convention, also for stride 2)."""
    pad = kernel_size // 2
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=padding or ((pad, pad), (pad, pad)),
        use_bias=bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nn.initializers.zeros if zero else lecun_normal(),
        conv_general_dilated=cpu.conv_general_dilated,
        name=name,
    )


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, N, H * D] -> [B, N, H, D]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, *, cudnn: bool = False
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    q [B, N, H, D], k and v [B, M, H, D], mask broadcastable to [B, H, N, M] (True = attend). Returns [B, N,
    H * D] in the type of v. A row whose keys are all masked gets finite values, not NaN.

    cudnn: whether cuDNN's kernel may compute it, where there is one. Not under a `vmap`: JAX cannot take that
    gradient through it (jax-ml/jax issues 38495, 39451).
    """
    if cudnn and mask is None and _cudnn_takes(q, k):
        # the kernel wants all arrays split alike over devices, its result's gradient too
        q, k, v = (constrain(y, tensor_axis=2) for y in (q, k, v))
        out = constrain(cudnn_attention(q, k, v), tensor_axis=2)
    else:
        if mask is not None:
            mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        out = cpu.attention(q, k, v, mask)
    return out.reshape(*out.shape[:2], -1)  # [B, N, H, D] -> [B, N, H D]


def _cudnn_takes(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN has a kernel for these shapes on the device that the program is traced for."""
    capability, head_dim = platforms.target().capability, q.shape[-1]
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    # JAX refuses odd lengths when it takes the gradient.
    even = q.shape[1] % 2 == k.shape[1] % 2 == 0
    return fits and even and capability is not None and capability >= (8, 0)


# The name of the primitive of JAX's whose results are the output and the sums of the softmax.
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


# jitted for its name: `models.flops` counts it as two products
@jax.jit
def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B, N, H, D], k and v [B, M, H, D] in 16 bits, split alike over devices -> [B, N, H, D]."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def downsample(x: jax.Array) -> jax.Array:
    """2x2 average pooling, [B, H, W, C] -> [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbour doubling, [B, H, W, C] -> [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)

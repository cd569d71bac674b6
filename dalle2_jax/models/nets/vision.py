"""CLIP's image towers: the vision transformer, and the modified ResNet with attention pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import cpu, layers
from dalle2_jax.models.nets.transformer import Embedding, TransformerStack
from dalle2_jax.runtime.partition import constrain


class Patches(nn.Module):
    """A linear map of each patch: a convolution whose stride is its size, as one product.

    XLA cannot split the convolutions that SAM makes of one, with a kernel for each replica, over `tensor`.
    """

    size: int
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """image [B, H, W, 3], H and W multiples of the size -> [B, patches, width]."""
        n, (height, width, channels) = self.size, image.shape[1:]
        shape = (n, n, channels, self.width)
        kernel = self.param("kernel", layers.lecun_normal(), shape, jnp.float32).astype(self.dtype)
        # [B, H, W, 3] -> [B, H / n, n, W / n, n, 3] -> [B, H / n, W / n, n, n, 3]
        x = image.astype(self.dtype).reshape(-1, height // n, n, width // n, n, channels).swapaxes(2, 3)
        # [B, patches, n n 3], [n n 3, width]
        x, kernel = x.reshape(len(x), -1, n * n * channels), kernel.reshape(-1, self.width)
        return cpu.dot_general(x, kernel, (((2,), (0,)), ((), ())))


class ViT(nn.Module):
    """CLIP's vision transformer: patches and a class token, a layer norm before the blocks and one after.

    mlp_width: of the MLPs' inner layer, 0 for four times the width.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    embed_dim: int
    activation: str = "gelu"
    mlp_width: int = 0
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32
    scan: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """image [B, H, W, 3], normalised by CLIP's mean and std -> embedding [B, E] float32, of any norm.

        t [B]: the time up to which the image is noised, for a tower conditioned on it.
        """
        std = self.width**-0.5
        x = Patches(self.patch_size, self.width, self.dtype, name="patch_embedding")(image)
        token = Embedding((self.width,), stddev=std, name="class_token")().astype(self.dtype)
        # the class token comes first: [B, 1 + patches, width]
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + Embedding((x.shape[1], self.width), stddev=std, name="position")().astype(self.dtype)
        if t is not None:
            x = x + _time(t, self.width, self.dtype)[:, None]
        x = layers.LayerNorm(name="norm_pre")(x)
        common = (self.depth, self.num_heads, self.activation, self.remat, self.dtype, self.mlp_width)
        x = TransformerStack(*common, scan=self.scan, name="transformer")(x)
        x = layers.LayerNorm(name="norm_post")(x[:, 0]).astype(self.dtype)
        init = layers.normal(std)
        proj = layers.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=init, name="proj")
        return proj(x).astype(jnp.float32)


def _time(t: jax.Array, width: int, dtype) -> jax.Array:
    """Times [B] as [B, width]: sinusoids, Dense-SiLU-Dense. To be called in a compact method."""
    h = layers.timestep_embedding(t, width).astype(dtype)
    h = nn.silu(layers.Dense(width, dtype=dtype, name="time_fc1")(h))
    return layers.Dense(width, dtype=dtype, name="time_fc2")(h)


class FrozenBatchNorm(nn.Module):
    """Batch norm with given statistics, for released weights: (x - mean) / sqrt(var + 1e-5) * scale + bias.

    `mean` and `var` are parameters that receive no gradient, so that a checkpoint carries them and training
    keeps them.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> the same shape, float32."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = jax.lax.stop_gradient(self.param("mean", nn.initializers.zeros, shape, jnp.float32))
        var = jax.lax.stop_gradient(self.param("var", nn.initializers.ones, shape, jnp.float32))
        gain = scale * jax.lax.rsqrt(var + layers.NORM_EPSILON)
        # (x - mean) gain + bias, with the constants added first
        return x.astype(jnp.float32) * gain + (bias - mean * gain)


def _norm(kind: str, name: str) -> nn.Module:
    """The norm layer of a ResNet: 'group' (to train) or 'frozen_batch' (released weights)."""
    if kind == "group":
        return layers.GroupNorm(name=name)
    if kind == "frozen_batch":
        return FrozenBatchNorm(name=name)
    raise ValueError(
        f"norm {kind!r} is unknown; choose 'group' (to train) or 'frozen_batch' (released weights)"
    )


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to 4 x features; a stride is a pooling before the last convolution and the skip."""

    features: int
    stride: int
    norm: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H / stride, W / stride, 4 * features]."""

        def conv(h, features, size, name):
            h = layers.conv(features, size, dtype=self.dtype, name=f"conv{name}", bias=False)(h)
            return _norm(self.norm, f"norm{name}")(h).astype(self.dtype)

        out = 4 * self.features
        h = nn.relu(conv(x, self.features, 1, "1"))
        h = nn.relu(conv(h, self.features, 3, "2"))
        if self.stride == 2:
            h, x = layers.downsample(h), layers.downsample(x)
        h = conv(h, out, 1, "3")
        if self.stride == 2 or x.shape[-1] != out:
            x = conv(x, out, 1, "_skip")
        return constrain(nn.relu(x + h))


class AttentionPool(nn.Module):
    """One attention layer whose only query is the mean of the positions (plus its position embedding)."""

    num_heads: int
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, E]."""
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"the pooled width {width} is not a multiple of num_heads {self.num_heads}: change either"
            )
        init = layers.normal(width**-0.5)
        x = x.reshape(x.shape[0], -1, width)  # [B, H W, C]
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)  # [B, 1 + H W, C], the mean first
        x = x + Embedding((x.shape[1], width), stddev=width**-0.5, name="position")().astype(self.dtype)
        q = layers.Dense(width, dtype=self.dtype, kernel_init=init, name="q")(x[:, :1])
        kv = layers.Dense(2 * width, dtype=self.dtype, kernel_init=init, name="kv")(x)
        q, k, v = (layers.split_heads(y, width // self.num_heads) for y in (q, *jnp.split(kv, 2, axis=-1)))
        h = layers.attention(q, k, v)[:, 0]
        return layers.Dense(self.embed_dim, dtype=self.dtype, kernel_init=init, name="out")(h)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, strides by average pooling, attention pooling at the end.

    The stem divides the side by four, every stage but the first by two, and stage i has 4 * width * 2^i
    channels out. Released weights have batch norm (`norm='frozen_batch'`); what is trained here has group
    norm, which needs neither running statistics nor a reduction over devices.
    """

    width: int
    depths: tuple[int, ...]
    num_heads: int
    embed_dim: int
    norm: str = "group"
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """image [B, H, W, 3], normalised by CLIP's mean and std -> embedding [B, E] float32, of any norm.

        t [B]: the time up to which the image is noised, for a tower conditioned on it.
        """
        x = image.astype(self.dtype)
        for i, (features, stride) in enumerate(
            [(self.width // 2, 2), (self.width // 2, 1), (self.width, 1)], 1
        ):
            x = layers.conv(features, stride=stride, dtype=self.dtype, name=f"conv{i}", bias=False)(x)
            x = nn.relu(_norm(self.norm, f"norm{i}")(x).astype(self.dtype))
        x = layers.downsample(x)
        if t is not None:
            x = x + _time(t, x.shape[-1], self.dtype)[:, None, None]
        block = layers.remat(Bottleneck, self.remat)
        for stage, depth in enumerate(self.depths):
            for j in range(depth):
                stride = 2 if stage and j == 0 else 1
                x = block(
                    self.width * 2**stage, stride, self.norm, self.dtype, name=f"stage_{stage}_block_{j}"
                )(x)
        return AttentionPool(self.num_heads, self.embed_dim, self.dtype, name="pool")(x).astype(jnp.float32)

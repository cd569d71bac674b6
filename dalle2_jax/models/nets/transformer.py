"""Pre-LN transformer blocks, and the diffusion prior's network, which is little more than a stack of them.

    h = x + attn(norm1(x)),    x' = h + fc2(act(fc1(norm2(h))))

The initialisation is CLIP's: with width w and depth n, qkv and queries of attention have std w^-1/2, the
projections that write into the residual stream w^-1/2 (2n)^-1/2, and fc1 (2w)^-1/2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.models.nets import layers
from dalle2_jax.runtime.partition import constrain


def causal_mask(length: int) -> jax.Array:
    """[1, 1, N, N] bool: position i sees positions j <= i."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


class Embedding(nn.Module):
    """A learned array of the given shape, in float32 (positions, class tokens, queries, null vectors)."""

    shape: tuple[int, ...]
    stddev: float = 0.02

    @nn.compact
    def __call__(self) -> jax.Array:
        """The table, in the shape of `shape`, float32."""
        return self.param("embedding", layers.normal(self.stddev), self.shape, jnp.float32)


class TokenEmbedding(nn.Module):
    """A lookup table [vocab_size, width] in float32; tokens [B, L] int32 -> [B, L, width] in `dtype`."""

    vocab_size: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, N] -> [B, N, width]."""
        shape = (self.vocab_size, self.width)
        table = self.param("embedding", layers.normal(0.02), shape, jnp.float32)
        return jnp.take(table.astype(self.dtype), tokens, axis=0)


class Attention(nn.Module):
    """Self-attention; the kernel `qkv` holds the blocks q | k | v, heads contiguous inside each.

    Applied with `mutable="cache"`, it leaves its keys and values in that collection; applied with a cache,
    its positions follow those of the cache, which they see too.
    """

    num_heads: int
    out_std: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [B, N, C], mask broadcastable to [B, H, N, M] (True = attend), M = N and what the cache holds ->
        [B, N, C]."""
        width = x.shape[-1]
        init = layers.normal(width**-0.5)
        qkv = layers.Dense(3 * width, dtype=self.dtype, kernel_init=init, name="qkv")(x)
        q, k, v = (layers.split_heads(y, width // self.num_heads) for y in jnp.split(qkv, 3, axis=-1))
        if self.has_variable("cache", "keys"):
            before = (self.get_variable("cache", name) for name in ("keys", "values"))
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        elif self.is_mutable_collection("cache") and not self.is_initializing():
            self.put_variable("cache", "keys", k)
            self.put_variable("cache", "values", v)
        h = layers.attention(q, k, v, mask)
        return layers.Dense(width, dtype=self.dtype, kernel_init=layers.normal(self.out_std), name="out")(h)


class Mlp(nn.Module):
    """Dense to four times the width, or to `hidden`, activation, Dense back."""

    activation: str
    out_std: float
    dtype: jnp.dtype = jnp.float32
    hidden: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, N, width] -> the same shape."""
        width = x.shape[-1]
        init = layers.normal((2 * width) ** -0.5)
        hidden = self.hidden or 4 * width
        h = layers.Dense(hidden, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        h = layers.activation(self.activation)(h)
        return layers.Dense(width, dtype=self.dtype, kernel_init=layers.normal(self.out_std), name="fc2")(h)


class Block(nn.Module):
    """One pre-LN block: norm1, attn, norm2, mlp."""

    num_heads: int
    activation: str
    out_std: float
    dtype: jnp.dtype = jnp.float32
    mlp_width: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [B, N, width], mask broadcast to [B, heads, N, N], True where seen -> x's shape."""
        h = layers.LayerNorm(name="norm1")(x).astype(self.dtype)
        x = x + Attention(self.num_heads, self.out_std, self.dtype, name="attn")(h, mask)
        h = layers.LayerNorm(name="norm2")(x).astype(self.dtype)
        mlp = Mlp(self.activation, self.out_std, self.dtype, self.mlp_width, name="mlp")
        return constrain(x + mlp(h))


class TransformerStack(nn.Module):
    """Blocks called block_0, block_1, ...; `remat`: see `layers.remat`.

    mlp_width: of the MLPs' inner layer, 0 for four times the width. scan: whether the blocks are one loop,
    whose body is compiled once; their parameters, which keep their names, are stacked for it at every call.
    With a cache there is no loop.
    """

    depth: int
    num_heads: int
    activation: str = "gelu"
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    mlp_width: int = 0
    scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [B, N, C] -> [B, N, C] in `dtype`, mask as for Attention; ValueError if heads do not divide C."""
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}: change either")
        out_std = width**-0.5 * (2 * self.depth) ** -0.5
        block = layers.remat(Block, self.remat)
        x = x.astype(self.dtype)
        common = (self.num_heads, self.activation, out_std, self.dtype, self.mlp_width)
        names = [f"block_{i}" for i in range(self.depth)]
        cached = "cache" in self.variables or self.is_mutable_collection("cache")
        if not self.scan or cached or self.is_initializing():
            for name in names:
                x = block(*common, name=name)(x, mask)
            return x
        params, one = self.variables["params"], block(*common, parent=None)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
        return jax.lax.scan(lambda x, p: (one.apply({"params": p}, x, mask), None), x, stacked)[0]


def kept(null: jax.Array, null_tokens: int) -> jax.Array:
    """What stands for the null caption; without a gradient where that is "" and has `null_tokens` tokens."""
    return jax.lax.stop_gradient(null) if null_tokens else null


class NullStates(nn.Module):
    """States that stand at the first `count` positions of a caption that is dropped.

    Weights that were trained with the caption "" as the null caption have what the frozen CLIP says of it
    here, and training keeps it as it is. With a count of 0 nothing of a dropped caption can be attended to.
    """

    count: int
    width: int

    @nn.compact
    def __call__(
        self, states: jax.Array, token_mask: jax.Array, drop: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """states [B, L, D], token_mask [B, L], drop [B] bool -> (states, which may be attended to)."""
        drop, token_mask = drop[:, None], token_mask & ~drop[:, None]
        if not self.count:
            return states, token_mask
        shape = (self.count, self.width)
        null = kept(self.param("embedding", layers.normal(0.02), shape, jnp.float32), self.count)
        null = jnp.pad(null, ((0, states.shape[1] - self.count), (0, 0)))
        states = jnp.where(drop[..., None], null, states)
        return states, token_mask | (drop & (jnp.arange(states.shape[1]) < self.count))


class PriorTransformer(nn.Module):
    """The diffusion prior's network: a causal transformer that predicts the noiseless image embedding.

    The sequence, in order (paper, section 2.2): the encoded caption (context_length positions), the CLIP text
    embedding, the timestep, the noised image embedding, and a learned query, whose output is the prediction.
    The caption is encoded either by token embeddings that are learned here (`vocab_size`; the paper's
    parameter count leaves room for no other encoder), or by projecting the states of a frozen CLIP text
    transformer (`states_width`; Karlo, Kandinsky). Padded caption positions are never attended to.

    Dropping the text replaces the text embedding by a learned vector and the caption by nothing: all its
    positions are masked, but for the first `null_tokens` of a prior on states (see NullStates). The noised
    embedding is never dropped.

    The caption and its embedding, which come first, see neither timestep nor noised embedding. `read` puts
    what the others need of them into a cache, with which the network runs these three positions alone.
    """

    embed_dim: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    vocab_size: int = 0
    states_width: int = 0
    null_tokens: int = 0
    activation: str = "gelu"
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    scan: bool = False

    def read(self, params: dict, *text: jax.Array) -> dict:
        """What `apply` takes beside `params` in the place of `text` (text_embed, text, token_mask,
        drop_text): a cache."""
        return self.apply({"params": params}, None, None, *text, mutable="cache")[1]

    @nn.compact
    def __call__(
        self,
        x_t: jax.Array | None,
        t: jax.Array | None,
        text_embed: jax.Array | None = None,
        text: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        drop_text: jax.Array | None = None,
    ) -> jax.Array | None:
        """x_t [B, E] (scaled), t [B], text_embed [B, E], token_mask [B, L], drop_text [B] -> x0 [B, E].

        x0 is scaled as x_t is, and float32. `text` is tokens [B, L] int32, or states [B, L, states_width]
        where the prior is built on states. With a cache the text is left out; without x_t and t, as `read`
        calls it, nothing is returned.
        """

        def dense(features, name):
            return layers.Dense(features, dtype=self.dtype, name=name)

        parts = []
        if self.has_variable("cache", "visible"):
            visible = self.get_variable("cache", "visible")
        else:
            drop = drop_text[:, None]
            null_embed = kept(Embedding((self.embed_dim,), name="null_text_embed")(), self.null_tokens)
            text_embed = jnp.where(drop, null_embed, text_embed)
            if self.states_width:
                null_states = NullStates(self.null_tokens, self.states_width, name="null_text_states")
                text, token_mask = null_states(text, token_mask, drop_text)
                text = dense(self.width, "text_states_proj")(text)
            else:
                token_mask = token_mask & ~drop
                text = TokenEmbedding(self.vocab_size, self.width, self.dtype, name="token_embedding")(text)
            parts += [text, dense(self.width, "text_embed_proj")(text_embed)[:, None]]
            visible = jnp.pad(token_mask, ((0, 0), (0, 1)), constant_values=True)
            if self.is_mutable_collection("cache") and not self.is_initializing():
                self.put_variable("cache", "visible", visible)
        if x_t is not None:
            time = layers.timestep_embedding(t, self.width).astype(self.dtype)
            time = dense(self.width, "time_fc2")(nn.silu(dense(self.width, "time_fc1")(time)))
            noised = dense(self.width, "image_embed_proj")(x_t)
            query = jnp.broadcast_to(Embedding((self.width,), name="query")().astype(self.dtype), time.shape)
            parts.append(jnp.stack([time, noised, query], axis=1))
            visible = jnp.pad(visible, ((0, 0), (0, 3)), constant_values=True)

        x, length = jnp.concatenate(parts, axis=1), visible.shape[1]
        first = length - x.shape[1]
        position = Embedding((self.context_length + 4, self.width), stddev=0.01, name="position")()
        x = x + position[first:length].astype(self.dtype)
        mask = causal_mask(length)[:, :, first:] & visible[:, None, None, :]
        common = (self.depth, self.num_heads, self.activation, self.remat, self.dtype)
        stack = TransformerStack(*common, scan=self.scan, name="transformer")
        x = stack(x, mask)
        if x_t is None:
            return None
        x = layers.LayerNorm(name="norm_out")(x[:, -1]).astype(self.dtype)
        return dense(self.embed_dim, "out_proj")(x).astype(jnp.float32)

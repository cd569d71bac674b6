"""Stacks of transformer blocks, and the diffusion prior's network, which is little more than one of them."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import Block, Cache, causal_mask, empty_cache, out_std


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
    dtype: DTypeLike = jnp.float32
    stddev: float = 0.02

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, N] -> [B, N, width]."""
        shape = (self.vocab_size, self.width)
        table = self.param("embedding", layers.normal(self.stddev), shape, jnp.float32)
        return jnp.take(table.astype(self.dtype), tokens, axis=0)


def scan_blocks(apply: Callable, blocks: Sequence[dict], x: jax.Array, each: Any = None) -> jax.Array:
    """x behind all blocks, as one loop whose body is compiled once.

    apply(params, x, part of each) -> x; blocks: the parameters of every block, in trees of the same shapes;
    each: further arrays [depth, ...] of the blocks.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)  # leaves [depth, ...]
    return jax.lax.scan(lambda x, own: (apply(own[0], x, own[1]), None), x, (stacked, each))[0]


class TransformerStack(nn.Module):
    """Blocks called block_0, block_1, ...; `remat`: see `layers.remat`.

    mlp_width: of the MLPs' inner layer, 0 for four times the width. kinds: which of the masks [K, 1, 1, n, M]
    each block takes; (): all take one mask [.., n, M]. scan: the blocks are one loop, whose body is compiled
    once. The parameters keep their names and are stacked for the loop at every call. With caches there is no
    loop.
    """

    depth: int
    num_heads: int
    activation: str = "gelu"
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32
    mlp_width: int = 0
    scan: bool = False
    kinds: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Any = None,
        caches: tuple[Cache, ...] | None = None,
        start: int | jax.Array = 0,
    ) -> Any:
        """x [B, n, C] -> [B, n, C] in `dtype`, with caches (it, the caches with x); see `causal.Block`.

        Raises ValueError if the heads do not divide C.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {self.num_heads}: change either")
        scanned = self.scan and caches is None and not self.is_initializing()
        block = layers.remat(Block, self.remat, prevent_cse=not scanned)
        x = x.astype(self.dtype)
        std = out_std(width, self.depth)
        common = (width, self.num_heads, self.activation, std, self.dtype, self.mlp_width)
        names = [f"block_{i}" for i in range(self.depth)]
        if scanned:
            one, blocks = block(*common, parent=None), [self.variables["params"][name] for name in names]

            def apply(params, x, kind):
                return one.apply({"params": params}, x, mask if kind is None else mask[kind])[0]

            return scan_blocks(apply, blocks, x, jnp.array(self.kinds) if self.kinds else None)
        masks = [mask[kind] for kind in self.kinds] or [mask] * self.depth
        after = []
        for name, own, cache in zip(names, masks, caches or [None] * self.depth, strict=True):
            x, cache = block(*common, name=name)(x, own, cache, start)
            after.append(cache)
        return x if caches is None else (x, tuple(after))


def kept(null: jax.Array, null_tokens: int) -> jax.Array:
    """The null vector; without a gradient where the null caption is "" with `null_tokens` tokens."""
    return jax.lax.stop_gradient(null) if null_tokens else null


class NullStates(nn.Module):
    """States at the first `count` positions of a dropped caption.

    Released weights whose null caption is "" hold the frozen CLIP's states of "" here, and training keeps
    them. With a count of 0 all positions of a dropped caption are masked.
    """

    count: int
    width: int

    @nn.compact
    def __call__(
        self, states: jax.Array, token_mask: jax.Array, drop: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """states [B, L, D], token_mask [B, L], drop [B] bool -> (states [B, L, D], their mask [B, L])."""
        drop, token_mask = drop[:, None], token_mask & ~drop[:, None]  # [B, 1], [B, L]
        if not self.count:
            return states, token_mask
        shape = (self.count, self.width)
        null = kept(self.param("embedding", layers.normal(0.02), shape, jnp.float32), self.count)
        null = jnp.pad(null, ((0, states.shape[1] - self.count), (0, 0)))  # [L, D]
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

    Caption and text embedding come first, so they see neither timestep nor noised embedding. `read` computes
    their keys and values once. With this cache the network runs the other three positions alone.
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
    dtype: DTypeLike = jnp.float32
    scan: bool = False

    def read(self, params: dict, *text: jax.Array) -> dict:
        """text (text_embed, text, token_mask, drop_text) -> {'cache': ...}: variables that `apply` takes
        beside `params` instead of the text."""
        _, variables = self.apply({"params": params}, None, None, *text, mutable="cache")
        return dict(variables)

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

        x0 is scaled as x_t is, and float32. text: tokens [B, L] int32, or states [B, L, states_width] of a
        prior on states. With a cache the text is left out. Without x_t and t, as `read` calls it, the caches
        are filled and None is returned.
        """

        def dense(features, name):
            return layers.Dense(features, dtype=self.dtype, name=name)

        # the sequence: caption [L], text embedding, time, noised embedding, query
        parts, length = [], self.context_length + 4
        visible: Any
        caches: Any = None
        if self.has_variable("cache", "blocks"):
            visible, caches = (self.get_variable("cache", name) for name in ("visible", "blocks"))
        else:
            assert text_embed is not None and text is not None
            assert token_mask is not None and drop_text is not None
            drop = drop_text[:, None]  # [B, 1]
            null_embed = kept(Embedding((self.embed_dim,), name="null_text_embed")(), self.null_tokens)
            text_embed = jnp.where(drop, null_embed, text_embed)
            if self.states_width:
                null_states = NullStates(self.null_tokens, self.states_width, name="null_text_states")
                text, token_mask = null_states(text, token_mask, drop_text)
                text = dense(self.width, "text_states_proj")(text)
            else:
                token_mask = token_mask & ~drop
                text = TokenEmbedding(self.vocab_size, self.width, self.dtype, name="token_embedding")(text)
            # [B, L, width] and [B, 1, width]
            parts += [text, dense(self.width, "text_embed_proj")(text_embed)[:, None]]
            visible = jnp.pad(token_mask, ((0, 0), (0, 1)), constant_values=True)  # [B, L + 1]
        if x_t is None:
            cache = empty_cache(len(visible), length, self.width, self.num_heads, self.dtype)
            caches = (cache,) * self.depth
        else:
            assert t is not None
            time = layers.timestep_embedding(t, self.width).astype(self.dtype)
            time = dense(self.width, "time_fc2")(nn.silu(dense(self.width, "time_fc1")(time)))
            noised = dense(self.width, "image_embed_proj")(x_t)
            query = jnp.broadcast_to(Embedding((self.width,), name="query")().astype(self.dtype), time.shape)
            parts.append(jnp.stack([time, noised, query], axis=1))  # [B, 3, width]
            visible = jnp.pad(visible, ((0, 0), (0, 3)), constant_values=True)

        x, end = jnp.concatenate(parts, axis=1), visible.shape[1]
        start = end - x.shape[1]
        position = Embedding((length, self.width), stddev=0.01, name="position")()
        x = x + position[start:end].astype(self.dtype)
        mask = causal_mask(end)[:, :, start:] & visible[:, None, None, :]  # [B, 1, end - start, end]
        common = (self.depth, self.num_heads, self.activation, self.remat, self.dtype)
        stack = TransformerStack(*common, scan=self.scan, name="transformer")
        x, caches = stack(x, mask, caches, start) if caches else (stack(x, mask), None)
        if x_t is None:
            self.put_variable("cache", "visible", visible)
            self.put_variable("cache", "blocks", caches)
            return None
        x = layers.LayerNorm(name="norm_out")(x[:, -1]).astype(self.dtype)  # the query's output, [B, width]
        return dense(self.embed_dim, "out_proj")(x).astype(jnp.float32)

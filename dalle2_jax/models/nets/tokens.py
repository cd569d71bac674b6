"""A token model's network (DALL-E 1, CogView): ids of tokens -> logits of the next ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import Cache, empty_cache
from dalle2_jax.models.nets.transformer import Embedding, TokenEmbedding, TransformerStack


class Unembedding(nn.Module):
    """Logits of a range of ids, each the product of a state and the vector of the id; float32."""

    vocab_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0, count: int | None = None) -> jax.Array:
        """x [..., C] -> logits [..., count] of the ids first .. first + count - 1; None: of all."""
        init, width = layers.normal(x.shape[-1] ** -0.5), x.shape[-1]
        table = self.param("embedding", init, (self.vocab_size, width), jnp.float32)
        table = table[first : None if count is None else first + count].astype(self.dtype)
        return jnp.einsum("...c,vc->...v", x.astype(self.dtype), table, preferred_element_type=jnp.float32)


class TokenTransformer(nn.Module):
    """Embedded ids and positions, a stack of blocks, and logits, untied from the embeddings.

    num_ids: ids that are read; the first vocab_size of them are predicted. num_rows: of the table of
    positions, see `tokens.layout`. kinds, scan: see `TransformerStack`.
    """

    num_ids: int
    vocab_size: int
    num_rows: int
    width: int
    depth: int
    num_heads: int
    activation: str = "gelu"
    kinds: tuple[int, ...] = ()
    scan: bool = False
    remat: bool | str = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declare the layers (Flax)."""
        self.token_embedding = TokenEmbedding(self.num_ids, self.width, self.dtype)
        self.position = Embedding((self.num_rows, self.width), stddev=0.01)
        self.transformer = TransformerStack(
            *(self.depth, self.num_heads, self.activation, self.remat, self.dtype),
            scan=self.scan,
            kinds=self.kinds,
        )
        self.norm_out = layers.LayerNorm()
        self.logits = Unembedding(self.vocab_size, self.dtype)

    def __call__(self, ids: jax.Array, rows: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits [B, n, vocab_size] float32 of the ids after each of ids [B, n]; see `states`."""
        return self.logits(self.states(ids, rows, mask)[0])

    def states(
        self,
        ids: jax.Array,
        rows: jax.Array,
        mask: jax.Array,
        caches: tuple[Cache, ...] | None = None,
        start: int | jax.Array = 0,
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """(states [B, n, C] in `dtype`, the caches) of ids [B, n] from position `start` on.

        rows: [n, K], the rows of the table of positions that are added; num_rows: none. mask: see
        `TransformerStack`. caches, start: see `causal.Block`.
        """
        added = jnp.take(self.position(), rows, axis=0, mode="fill", fill_value=0).sum(axis=1)  # [n, C]
        x = self.token_embedding(ids) + added.astype(self.dtype)
        x, after = self.transformer(x, mask, caches, start) if caches else (self.transformer(x, mask), None)
        return self.norm_out(x).astype(self.dtype), after

    def head(self, states: jax.Array, first: int, count: int) -> jax.Array:
        """Logits [..., count] float32 of the ids first .. first + count - 1, of states [..., C]."""
        return self.logits(states, first, count)

    def empty_caches(self, size: int, length: int) -> tuple[Cache, ...]:
        """The caches of the blocks, of `size` sequences of `length` positions."""
        return (empty_cache(size, length, self.width, self.num_heads, self.dtype),) * self.depth

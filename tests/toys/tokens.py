"""A stage from outside of the package: codes of a frozen tokenizer, drawn from a caption (DALL-E 1's plan).

It reads `tokens` and `tokenizer.codes`. Its loss also calls the tokenizer: a wrong code costs more where its
entry in the code book is far from the right one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets.causal import causal_mask
from dalle2_jax.models.nets.tokens import TokenTransformer
from dalle2_jax.models.stages import Loss, Op
from dalle2_jax.models.tokens.decode import Options, decode
from dalle2_jax.models.tokens.layout import Layout, Part

CODES = "tokenizer.codes"


@dataclasses.dataclass(frozen=True)
class TokenModel:
    """p(codes | tokens), code by code, over one sequence of both."""

    net: TokenTransformer
    layout: Layout
    uses = ("tokenizer",)
    ops = {"sample": Op((CODES,)), "infill": Op((CODES,), ("tokens", CODES))}

    @property
    def context_length(self):
        return self.layout.parts[0].length

    def batch_spec(self, batch_size):
        return {
            part.name: jax.ShapeDtypeStruct((batch_size, *part.shape), jnp.int32)
            for part in self.layout.parts
        }

    def init(self, key, batch):
        ids = self.layout.join(batch)
        return {"net": self.net.init(key, ids, self.layout.rows(), causal_mask(ids.shape[1]))["params"]}

    def loss(self, params, key, batch, *, step=0, train=True, frozen):
        ids, words = self.layout.join(batch), self.context_length
        rows, mask = self.layout.rows()[:-1], causal_mask(ids.shape[1] - 1)
        logits = self.net.apply({"params": params["net"]}, ids[:, :-1], rows, mask)
        logits = logits[:, words - 1 :, self.layout.parts[0].vocab_size :]  # of the codes
        log_p = jax.nn.log_softmax(logits)
        cross_entropy = -jnp.take_along_axis(log_p, batch[CODES][..., None], axis=-1).mean()
        book = frozen["tokenizer"].params["stats"]["codes"]
        distance = jnp.square(jnp.exp(log_p) @ book - book[batch[CODES]]).mean()
        return Loss(cross_entropy + 0.1 * distance, {"loss": cross_entropy, "distance": distance})

    def sample(self, params, keys, batch, options=Options()):  # noqa: B008 (immutable)
        """Codes [B, n] of captions: the caption is read at once, but for its last token."""
        words, rows, length = batch["tokens"], self.layout.rows(), self.context_length
        if options.guidance_scale is not None:
            words = jnp.stack([words, jnp.zeros_like(words)], axis=1).reshape(-1, length)
        net = functools.partial(self.net.apply, {"params": params["net"]})
        caches = net(len(words), self.layout.length, method="empty_caches")
        read = words[:, :-1], rows[: length - 1], causal_mask(length - 1), caches
        _, caches = net(*read, method="states")

        def step(ids, k, caches):
            at = length - 1 + k
            mask = jax.lax.dynamic_slice_in_dim(causal_mask(self.layout.length), at, 1, axis=2)
            read = ids[:, None], jax.lax.dynamic_slice_in_dim(rows, at, 1), mask, caches, at
            states, caches = net(*read, method="states")
            return net(states[:, 0], 0, self.layout.vocab_size, method="head"), caches

        options = options._replace(allowed=self.layout.allowed()[length:])
        drawn = self.layout.length - length
        ids = decode(step, lambda ids: ids, words[:, -1], caches, keys, drawn, options)
        return self.layout.split(jnp.concatenate([batch["tokens"], ids], axis=1))[CODES]

    def infill(self, params, keys, tokens, codes):
        """Codes [B, n] whose first half is that of `codes`."""
        drawn = jnp.arange(codes.shape[1]) >= codes.shape[1] // 2
        forced = jnp.where(drawn, -1, codes + self.layout.parts[0].vocab_size)
        return self.sample(params, keys, {"tokens": tokens}, Options(top_k=1, forced=forced))


def build(*, text: dict, num_codes: int, length: int = 4) -> TokenModel:
    """Of a config; text: vocab_size and context_length."""
    words = Part("tokens", (text["context_length"],), text["vocab_size"])
    layout = Layout((words, Part(CODES, (length,), num_codes)))
    net = TokenTransformer(layout.num_ids, layout.vocab_size, layout.num_rows, width=32, depth=2, num_heads=2)
    return TokenModel(net, layout)

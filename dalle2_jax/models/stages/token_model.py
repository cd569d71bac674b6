"""Token models: caption or class -> the codes of a frozen tokenizer, code by code (DALL-E 1, 2102.12092).

One decoder-only transformer models the sequence of caption, or class, and codes:

    p(caption, codes) = prod_k p(id_k | id_<k)
    loss = text_weight CE(caption) + (1 - text_weight) CE(codes)

Each cross entropy, CE, is a mean over its own positions, in nats.

A position of the caption without a token has an embedding of its own, which later positions read like any
other; it is never predicted. The softmax at a position is over the ids of its part alone. A tokenizer with
several levels (VQ-VAE-2) has a part for each, the top first. Sampling guides the logits: u + s (c - u), where
u has no caption: pads alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion.guidance import interleave
from dalle2_jax.models.nets.tokens import TokenTransformer
from dalle2_jax.models.stages import Loss, check_settings, code_sampling, narrow_in_loop
from dalle2_jax.models.stages.code_sampling import CodeModel
from dalle2_jax.models.tokens import masks
from dalle2_jax.models.tokens.decode import Options, decode
from dalle2_jax.models.tokens.layout import Layout, Part

SETTINGS = code_sampling.SETTINGS
TEXT = ("tokens", "token_mask")


@dataclasses.dataclass(frozen=True)
class TokenModel(CodeModel):
    """The network and sampling defaults; parameters {'net': ...} go to every call.

    layout: the condition (tokens, label, or a part of one zero), then the levels of codes, level0, level1 and
    so on; the field `codes` has all of them in one row. mask_kinds: of `tokens.masks`, those that the `kinds`
    of the blocks count.
    """

    net: TokenTransformer
    layout: Layout
    mask_kinds: tuple[str, ...]
    text_weight: float = 1 / 8
    text_drop: float = 0.0
    label_drop: float = 0.0

    # The condition

    @property
    def condition(self) -> Part:
        """The first part of the sequence."""
        return self.layout.parts[0]

    @property
    def levels(self) -> tuple[Part, ...]:
        """The parts of the codes, the top first."""
        return self.layout.parts[1:]

    @property
    def context_length(self) -> int | None:
        """Tokens of a caption; None: it reads none."""
        return self.condition.length if self.condition.name == "tokens" else None

    @property
    def num_classes(self) -> int:
        """Classes that it draws, 0 for none."""
        return self.condition.vocab_size if self.condition.name == "label" else 0

    # As stages are used

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without codes."""
        spec, part = {}, self.condition
        if part.name == "tokens":
            spec["tokens"] = jax.ShapeDtypeStruct((batch_size, part.length), jnp.int32)
            spec["token_mask"] = jax.ShapeDtypeStruct((batch_size, part.length), jnp.bool_)
        elif part.name:
            spec["label"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        count = sum(part.length for part in self.levels)
        return spec | {"codes": jax.ShapeDtypeStruct((batch_size, count), jnp.int32)}

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        ids = self.layout.join(self._condition(batch) | self._split(batch["codes"]))
        rows, mask = self.layout.rows(), self._masks(0, self.layout.length)
        return {"net": self.net.init(key, ids, rows, mask)["params"]}

    def _condition(self, batch: dict, drop: jax.Array | None = None, prefix: str = "") -> dict:
        """{field of the condition: its values, -1 at pads}; drop [B]: the examples without."""
        name = self.condition.name
        if not name:
            return {}
        values = batch[prefix + name]
        if name == "tokens":
            values = jnp.where(batch[f"{prefix}token_mask"], values, -1)
        else:
            values = values[:, None]
        return {name: values if drop is None else jnp.where(drop[:, None], -1, values)}

    def _split(self, codes: jax.Array) -> dict[str, jax.Array]:
        """codes [B, N] -> those of each level, [B, h, w]."""
        maps = code_sampling.maps(codes, self.grids)
        return {part.name: x for part, x in zip(self.levels, maps, strict=True)}

    def _condition_ids(
        self, batch: dict, size: int, drop: jax.Array | None = None, prefix: str = ""
    ) -> jax.Array:
        """Ids [B, T] of the condition, see `_condition`; size: B."""
        return self.layout.join(self._condition(batch, drop, prefix) or {"": jnp.zeros(size)}, 1)

    def _masks(self, start, count: int, length: int | None = None) -> jax.Array:
        """Rows of the masks from a position on, [kinds, 1, 1, count, length or all]."""
        *before, last = self.layout.places()
        width = last.part.shape[-1]
        length = length or self.layout.length
        return masks.rows(self.mask_kinds, start, count, length, last.position, width)

    def _net(self, params: dict, method: str, *arguments) -> Any:
        return self.net.apply({"params": params["net"]}, *arguments, method=method)

    # Training

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Weighted cross entropies in nats, and scalars; `train=False` drops no condition."""
        codes, size = self._split(batch["codes"]), len(batch["codes"])
        codes = {name: x.reshape(size, -1) for name, x in codes.items()}
        rate = self.text_drop if self.context_length else self.label_drop
        condition = self._condition(batch, jax.random.bernoulli(key, rate, (size,)) & train)
        logits = self.logits(params, self.layout.join(condition | codes))
        found = {name: code_sampling.cross_entropy(logits[name], x) for name, x in codes.items()}
        right = [logits[name].argmax(axis=-1) == x for name, x in codes.items()]
        code_loss = jnp.concatenate([*found.values()], axis=1).mean()
        scalars = {"code_loss": code_loss, "accuracy": jnp.concatenate(right, axis=1).mean()}
        if len(found) > 1:
            scalars |= {f"{name}_loss": value.mean() for name, value in found.items()}
        value = code_loss
        if "tokens" in logits:
            tokens = condition["tokens"][:, 1:]  # the first one, the start of text, is given
            real = tokens >= 0
            text = code_sampling.cross_entropy(logits["tokens"], jnp.maximum(tokens, 0)) * real
            scalars["text_loss"] = text.sum() / jnp.maximum(real.sum(), 1)
            value = self.text_weight * scalars["text_loss"] + (1 - self.text_weight) * code_loss
        return Loss(value, {"loss": value} | scalars)

    def logits(self, params: dict, ids: jax.Array) -> dict[str, jax.Array]:
        """ids [B, length] -> the logits [B, n, vocab_size] float32 of each predicted part, by its name.

        Each follows from the ids before it, so that a caption's first token is not predicted.
        """
        count = self.layout.length - 1  # the last id predicts nothing
        rows, mask = self.layout.rows()[:count], self._masks(0, count, count)
        states, _ = self._net(params, "states", ids[:, :count], rows, mask)
        found = {}
        for part, position, first, _ in self.layout.places():
            start, end = max(position - 1, 0), position + part.length - 1
            if part.name in ("", "label") or start == end:
                continue
            found[part.name] = self._net(params, "head", states[:, start:end], first, part.vocab_size)
        return found

    # Sampling

    def _decode(self, params: dict, keys: jax.Array, batch: dict, options: Options) -> jax.Array:
        size = len(keys)
        given = self._condition_ids(batch, size)  # [B, T]
        if options.guidance_scale is not None:
            negative = "negative_" if f"negative_{self.condition.name}" in batch else ""
            drop = None if negative else jnp.ones(size, bool)
            given = interleave(given, self._condition_ids(batch, size, drop, negative))
        text, length, rows = self.condition.length, self.layout.length, self.layout.rows()
        caches = self._net(params, "empty_caches", len(given), length)
        if text > 1:  # the condition at once, but for its last id
            mask = self._masks(0, text - 1, text - 1)
            _, caches = self._net(params, "states", given[:, :-1], rows[: text - 1], mask, caches)
        first = self.layout.places()[1].id
        count = self.layout.vocab_size - first  # ids of codes
        # of each position the first id of its level: [N]
        offsets = jnp.concatenate([jnp.full(p.part.length, p.id - first) for p in self.layout.places()[1:]])

        def step(ids, k, caches):
            net, ids = narrow_in_loop(params["net"], ids)
            own, at = {"net": net}, text - 1 + k
            row = jax.lax.dynamic_slice_in_dim(rows, at, 1)
            states, caches = self._net(own, "states", ids[:, None], row, self._masks(at, 1), caches, at)
            return self._net(own, "head", states[:, 0], first, count), caches

        if len(self.levels) > 1:
            options = options._replace(allowed=self.layout.allowed()[text:, first:])
        if options.forced is not None:
            options = options._replace(forced=jnp.where(options.forced < 0, -1, options.forced + offsets))
        drawn = decode(step, lambda ids: ids + first, given[:, -1], caches, keys, length - text, options)
        return drawn - offsets


def build(
    *,
    grids: tuple[tuple[int, int], ...],
    num_codes: tuple[int, ...],
    net: dict,
    text: dict | None = None,
    num_classes: int = 0,
    text_weight: float = 1 / 8,
    text_drop: float = 0.0,
    label_drop: float = 0.0,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> TokenModel:
    """The token model of a config.

    Args:
      grids: (h, w) of each level of the tokenizer's codes, the top first.
      num_codes: entries of each level's code book.
      net: width, depth, num_heads of the transformer; kinds: a kind of attention a block (`tokens.masks`), by
        default all 'full'; scan_blocks: the blocks are one loop in training, compiled once.
      text: vocab_size, context_length of captions; None: it reads none.
      num_classes: of labels; 0: it reads none.
      text_weight: of the caption's cross entropy in the loss.
      text_drop, label_drop: how often the condition is dropped in training, so that it can be guided.
      guidance_scale, temperature, top_k, top_p: defaults of sampling; top_k 0 and top_p 1 leave all codes.
      remat: what of a block is computed again in the backward pass, 'none', 'products' (all else) or 'all'.
      dtype: compute type of the network.

    Raises:
      ValueError: for settings that are unknown, missing or do not go together.
    """
    common = code_sampling.common(grids, num_codes, guidance_scale, temperature, top_k, top_p)
    if text is not None and num_classes:
        raise ValueError("a token model reads text or classes: leave text out, or num_classes")
    if not 0 <= text_weight < 1 or not 0 <= text_drop < 1 or not 0 <= label_drop < 1:
        raise ValueError(f"{text_weight=}, {text_drop=} and {label_drop=} must be in [0, 1)")
    if text is not None:
        check_settings(text, ("vocab_size", "context_length"), (), "text")
        condition = Part("tokens", (text["context_length"],), text["vocab_size"], pads=True)
    elif num_classes:
        condition = Part("label", (1,), num_classes, pads=True)
    else:
        condition = Part("", (1,), 1)
    levels = enumerate(zip(grids, num_codes, strict=True))
    layout = Layout((condition, *(Part(f"level{i}", tuple(grid), size) for i, (grid, size) in levels)))
    network, kinds = _transformer(net, layout, remat, dtype)
    return TokenModel(network, layout, kinds, text_weight, text_drop, label_drop, **common)


def _transformer(
    net: dict, layout: Layout, remat: bool | str, dtype: str
) -> tuple[TokenTransformer, tuple[str, ...]]:
    """(the network, the kinds of masks that its blocks' `kinds` count) of `net` of a config."""
    check_settings(net, ("width", "depth", "num_heads"), ("kinds", "scan_blocks"), "net")
    settings = dict(net)
    kinds = settings.pop("kinds", ("full",) * net["depth"])
    for kind in kinds:
        masks.check_kind(kind)
    if len(kinds) != net["depth"]:
        raise ValueError(f"net.kinds has {len(kinds)} kinds of attention, net.depth is {net['depth']}")
    if net["width"] % net["num_heads"]:
        raise ValueError(f"net.width {net['width']} is not a multiple of net.num_heads {net['num_heads']}")
    distinct = tuple(dict.fromkeys(kinds))
    network = TokenTransformer(
        num_ids=layout.num_ids,
        vocab_size=layout.vocab_size,
        num_rows=layout.num_rows,
        scan=settings.pop("scan_blocks", False),
        **settings,
        kinds=tuple(map(distinct.index, kinds)),
        remat=remat,
        dtype=jnp.dtype(dtype),
    )
    return network, distinct

"""dalle-mini and dalle-mega: caption -> 16 x 16 codes of a VQGAN, by an encoder and a decoder (BART).

    loss = -mean_k log p(code_k | code_<k, caption)         guidance: u + s (c - u), "super conditioning"

where u has the caption "", start and end of text alone. The decoder begins with an id that is no code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion.guidance import is_guided
from dalle2_jax.models.nets.dalle_mini import DalleMiniNet
from dalle2_jax.models.stages import Loss, Op, check_settings, code_sampling
from dalle2_jax.models.stages.settings import SCALE, TOKENS
from dalle2_jax.models.tokens.decode import decode

SETTINGS = (SCALE, *TOKENS)


@dataclasses.dataclass(frozen=True)
class DalleMini:
    """The network and sampling defaults; parameters {'net': ...} go to every call.

    start_code: the id before the first code. num_codes: ids that are drawn.
    """

    net: DalleMiniNet
    grids: tuple[tuple[int, int], ...]
    num_codes: tuple[int, ...]
    start_code: int
    text_drop: float = 0.0
    guidance_scale: float = 10.0
    temperature: float = 1.0
    top_k: int = 256
    top_p: float = 1.0

    ops = {
        "sample": Op(("codes",)),
        "complete": Op(("codes",), ("tokens", "token_mask", "codes")),
    }

    @property
    def context_length(self) -> int:
        """Tokens of a caption."""
        return self.net.context_length

    @property
    def sampling(self) -> dict:
        """Defaults of `sample`."""
        return {name: getattr(self, name) for name in code_sampling.NAMES}

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without codes."""
        text = (batch_size, self.net.context_length)
        return {
            "tokens": jax.ShapeDtypeStruct(text, jnp.int32),
            "token_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
            "codes": jax.ShapeDtypeStruct((batch_size, self.net.num_positions), jnp.int32),
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        return {"net": self.net.init(key, batch["tokens"], batch["token_mask"], batch["codes"])["params"]}

    def _net(self, params: dict, *arguments, **how) -> Any:
        return self.net.apply({"params": params["net"]}, *arguments, **how)

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean cross entropy of a code in nats, and scalars; `train=False` drops no caption."""
        codes, caption = batch["codes"], (batch["tokens"], batch["token_mask"])
        drop = jax.random.bernoulli(key, self.text_drop, (len(codes), 1)) & train
        text = (jnp.where(drop, null, x) for null, x in zip(_null(*caption), caption, strict=True))
        before = jnp.concatenate([jnp.full((len(codes), 1), self.start_code), codes[:, :-1]], axis=1)
        logits = self._net(params, *text, before)[..., : self.num_codes[0]]
        value = code_sampling.cross_entropy(logits, codes).mean()
        return Loss(value, {"loss": value, "accuracy": (logits.argmax(axis=-1) == codes).mean()})

    def sample(self, params: dict, keys: jax.Array, batch: dict, **settings) -> jax.Array:
        """Codes [B, N] int32 of captions, one key an example; see `TokenModel.sample`."""
        return self._draw(params, keys, batch, None, **settings)

    def complete(
        self, params: dict, keys: jax.Array, *fields: jax.Array, keep: float = 0.5, **settings
    ) -> jax.Array:
        """Codes as `sample` draws them, but the first rows are those given; see `TokenModel.complete`."""
        batch = dict(zip(("tokens", "token_mask", "codes"), fields, strict=True))
        forced = code_sampling.kept(batch["codes"], self.grids, keep)
        return self._draw(params, keys, batch, forced, **settings)

    def _draw(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        forced: jax.Array | None,
        guidance_scale: float | jax.Array | None = None,
        **settings,
    ) -> jax.Array:
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        guided, size = is_guided(scale), len(keys)
        text, mask = batch["tokens"], batch["token_mask"]
        if guided:  # rows with the caption and without in turn
            null = _null(text, mask)
            if "negative_tokens" in batch:
                null = batch["negative_tokens"], batch["negative_token_mask"]
            pairs = zip((text, mask), null, strict=True)
            text, mask = (jnp.stack(pair, axis=1).reshape(2 * size, -1) for pair in pairs)
        read = self._net(params, self._net(params, text, mask, method="encode"), method="read")

        def step(ids, k, caches):
            logits, caches = self._net(params, ids[:, None], read, mask, caches, k, method="decode")
            return logits[:, 0, : self.num_codes[0]], caches

        options = code_sampling.options(self, self.num_codes[0], settings, scale if guided else None)
        first = jnp.full(len(text), self.start_code)
        caches = self._net(params, len(text), method="empty_caches")
        count = self.net.num_positions
        return decode(step, lambda ids: ids, first, caches, keys, count, options._replace(forced=forced))


def _null(tokens: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens, their mask) of the caption "": the start of text, and the end, a caption's last real token."""
    last = jnp.take_along_axis(tokens, token_mask.sum(axis=1, keepdims=True) - 1, axis=1)
    place = jnp.arange(tokens.shape[1])
    null = jnp.where(place == 0, tokens, jnp.where(place == 1, last, 0))
    return null, jnp.broadcast_to(place < 2, tokens.shape)


def build(
    *,
    text: dict,
    net: dict,
    grids: tuple[tuple[int, int], ...] = ((16, 16),),
    num_codes: tuple[int, ...] = (16_384,),
    num_ids: int = 16_385,
    start_code: int = 16_384,
    text_drop: float = 0.0,
    guidance_scale: float = 10.0,
    temperature: float = 1.0,
    top_k: int = 256,
    top_p: float = 1.0,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> DalleMini:
    """The model of a config; defaults are dalle-mini's.

    Args:
      text: vocab_size, context_length of captions.
      net: width, depth (of encoder and decoder each), num_heads, hidden (of the gated layers).
      grids, num_codes: (h, w) of the codes, entries of their book: one level.
      num_ids: rows of the table of codes. start_code: the one of them before the first code.
      text_drop: how often the caption is dropped in training.
      guidance_scale, temperature, top_k, top_p: defaults of sampling; top_k 0 and top_p 1 leave all codes.
      remat: what of a block is computed again in the backward pass, 'none', 'products' (all else) or 'all'.
      dtype: compute type of the network.

    Raises:
      ValueError: for settings that are unknown, missing or do not go together.
    """
    check_settings(text, ("vocab_size", "context_length"), (), "text")
    check_settings(net, ("width", "depth", "num_heads", "hidden"), (), "net")
    if len(grids) != 1 or len(num_codes) != 1:
        raise ValueError(f"{grids=} and {num_codes=} must have one level of codes")
    if max(num_codes[0] - 1, start_code) >= num_ids:
        raise ValueError(f"{num_ids=} has no room for {num_codes[0]} codes and the start {start_code}")
    if not 0 <= text_drop < 1:
        raise ValueError(f"{text_drop=} must be in [0, 1)")
    if net["width"] % net["num_heads"]:
        raise ValueError(f"net.width {net['width']} is not a multiple of net.num_heads {net['num_heads']}")
    code_sampling.check(temperature, top_k, top_p)
    (height, width), kind = grids[0], jnp.dtype(dtype)
    network = DalleMiniNet(
        **text, **net, num_ids=num_ids, num_positions=height * width, remat=remat, dtype=kind
    )
    defaults: dict[str, Any] = dict(
        guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return DalleMini(
        network, tuple((h, w) for h, w in grids), tuple(num_codes), start_code, text_drop, **defaults
    )

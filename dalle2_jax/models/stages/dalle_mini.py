"""dalle-mini and dalle-mega: caption -> 16 x 16 codes of a VQGAN, by an encoder and a decoder (BART).

    loss = -mean_k log p(code_k | code_<k, caption)         guidance: u + s (c - u), "super conditioning"

where u has the caption "", start and end of text alone. The decoder begins with an id that is no code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion.guidance import interleave
from dalle2_jax.models.nets.dalle_mini import DalleMiniNet
from dalle2_jax.models.stages import Loss, check_settings, code_sampling, narrow_in_loop
from dalle2_jax.models.stages.code_sampling import CodeModel
from dalle2_jax.models.tokens.decode import Options, decode

SETTINGS = code_sampling.SETTINGS


@dataclasses.dataclass(frozen=True)
class DalleMini(CodeModel):
    """The network and sampling defaults; parameters {'net': ...} go to every call.

    start_code: the id before the first code.
    """

    net: DalleMiniNet
    start_code: int
    text_drop: float = 0.0

    @property
    def context_length(self) -> int:
        """Tokens of a caption."""
        return self.net.context_length

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

    def _decode(self, params: dict, keys: jax.Array, batch: dict, options: Options) -> jax.Array:
        text, mask = batch["tokens"], batch["token_mask"]
        if options.guidance_scale is not None:
            null = _null(text, mask)
            if "negative_tokens" in batch:
                null = batch["negative_tokens"], batch["negative_token_mask"]
            text, mask = interleave((text, mask), null)
        read = self._net(params, self._net(params, text, mask, method="encode"), method="read")

        def step(ids, k, caches):
            net, ids = narrow_in_loop(params["net"], ids)
            logits, caches = self._net({"net": net}, ids[:, None], read, mask, caches, k, method="decode")
            return logits[:, 0, : self.num_codes[0]], caches

        first = jnp.full(len(text), self.start_code)
        caches = self._net(params, len(text), method="empty_caches")
        return decode(step, lambda ids: ids, first, caches, keys, self.net.num_positions, options)


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
    common = code_sampling.common(grids, num_codes, guidance_scale, temperature, top_k, top_p)
    (height, width), kind = grids[0], jnp.dtype(dtype)
    network = DalleMiniNet(
        **text, **net, num_ids=num_ids, num_positions=height * width, remat=remat, dtype=kind
    )
    return DalleMini(network, start_code, text_drop, **common)

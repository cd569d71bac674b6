"""What stages that draw codes share: options of the decode loop, maps of codes, their cross entropy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.stages.settings import TOKENS
from dalle2_jax.models.tokens.decode import Options

NAMES = ("guidance_scale", "temperature", "top_k", "top_p")


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for defaults of sampling that are not possible."""
    for setting, value in zip(TOKENS, (temperature, top_k, top_p), strict=True):
        setting.check(value)


def options(stage: Any, num_codes: int, settings: Mapping, scale: float | jax.Array | None) -> Options:
    """The options of drawing one of `num_codes` codes; settings: of `TOKENS`, None: the stage's own.

    scale: of guidance, a number or [B]; None: no guidance.
    """
    chosen = {name: getattr(stage, name) for name in NAMES[1:]}
    chosen |= {name: value for name, value in settings.items() if value is not None}
    if unknown := chosen.keys() - NAMES:
        raise TypeError(f"unknown settings of sampling: {', '.join(unknown)}")
    return Options(
        chosen["temperature"],
        min(chosen["top_k"], num_codes) or None,
        chosen["top_p"] if chosen["top_p"] < 1 else None,
        jnp.reshape(scale, (-1, 1)) if scale is not None and jnp.ndim(scale) else scale,
    )


def maps(codes: jax.Array, grids: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """codes [B, N] of all levels in one row -> [B, h, w] of each level."""
    found, start = [], 0
    for h, w in grids:
        found.append(codes[:, start : start + h * w].reshape(-1, h, w))
        start += h * w
    return found


def kept(codes: jax.Array, grids: Sequence[tuple[int, ...]], share: float) -> jax.Array:
    """codes [B, N], -1 in the place of those below the first rows, the share `share` of each level's."""
    seen = [jnp.arange(h * w) < round(share * h) * w for h, w in grids]
    return jnp.where(jnp.concatenate(seen), codes, -1)


def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """logits [..., V], ids [...] -> -log p of each, [...]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), ids[..., None], axis=-1)[..., 0]

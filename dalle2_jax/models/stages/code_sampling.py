"""CodeModel: what stages that draw codes share; maps of codes, the cross entropy of a code."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion.guidance import is_guided
from dalle2_jax.models.stages import Op
from dalle2_jax.models.stages.settings import SCALE, TOKENS
from dalle2_jax.models.tokens.decode import Options

SETTINGS = (SCALE, *TOKENS)
NAMES = tuple(setting.name for setting in SETTINGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeModel:
    """A stage that draws codes: its operations and the defaults of sampling.

    A stage has `batch_spec`, whose last field is `codes`, and `_decode`. `common` makes the fields.

    Attributes:
      grids: (h, w) of each level of codes, the top first.
      num_codes: entries of each level's code book.
      guidance_scale, temperature, top_k, top_p: defaults of sampling; top_k 0 and top_p 1 leave all codes.
    """

    grids: tuple[tuple[int, int], ...]
    num_codes: tuple[int, ...]
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def ops(self) -> dict[str, Op]:
        """`sample` draws codes, `complete` those behind the first ones of given codes."""
        return {"sample": Op(("codes",)), "complete": Op(("codes",), tuple(self.batch_spec(1)))}

    @property
    def sampling(self) -> dict:
        """Defaults of `sample`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def conditional(self) -> bool:
        """Whether it reads a caption or a class."""
        return len(self.batch_spec(1)) > 1

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without codes."""
        raise NotImplementedError

    def sample(self, params: dict, keys: jax.Array, batch: dict, **settings) -> jax.Array:
        """Codes [B, N] int32 of conditions, one key an example.

        settings: of `sampling`; None: the model's. A guidance scale given as the Python number 1 saves the
        unconditional half of the work; an array is traced. With `negative_tokens` and their mask the guidance
        of a model of captions leads away from these.
        """
        return self._draw(params, keys, batch, None, **settings)

    def complete(
        self, params: dict, keys: jax.Array, *fields: jax.Array, keep: float = 0.5, **settings
    ) -> jax.Array:
        """Codes as `sample` draws them, but the first rows are those given, the share `keep` of each level.

        fields: those of `batch_spec`. keep: in [0, 1].
        """
        batch = dict(zip(self.batch_spec(1), fields, strict=True))
        return self._draw(params, keys, batch, kept(batch["codes"], self.grids, keep), **settings)

    def _draw(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        forced: jax.Array | None,
        guidance_scale: float | jax.Array | None = None,
        **settings,
    ) -> jax.Array:
        chosen = {name: getattr(self, name) for name in NAMES[1:]}
        chosen |= {name: value for name, value in settings.items() if value is not None}
        if unknown := chosen.keys() - NAMES:
            raise TypeError(f"unknown settings of sampling: {', '.join(unknown)}")
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        guided = self.conditional and is_guided(scale)
        how = Options(
            chosen["temperature"],
            chosen["top_k"] or None,
            chosen["top_p"] if chosen["top_p"] < 1 else None,
            (jnp.reshape(scale, (-1, 1)) if jnp.ndim(scale) else scale) if guided else None,
            forced=forced,
        )
        return self._decode(params, keys, batch, how)

    def _decode(self, params: dict, keys: jax.Array, batch: dict, options: Options) -> jax.Array:
        """Codes [B, N] int32. options.forced [B, N]: of all levels in one row."""
        raise NotImplementedError


def common(
    grids: Sequence[Sequence[int]],
    num_codes: Sequence[int],
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> dict[str, Any]:
    """The fields of `CodeModel`; ValueError for those that are not possible."""
    if len(grids) != len(num_codes) or not grids:
        raise ValueError(f"grids {grids} and num_codes {num_codes} must have a value for each level of codes")
    for setting, value in zip(TOKENS, (temperature, top_k, top_p), strict=True):
        setting.check(value)
    return dict(
        grids=tuple((h, w) for h, w in grids),
        num_codes=tuple(num_codes),
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


def check_codes(stage: Any, what: str, grids: Any, num_codes: Any) -> None:
    """Raise ValueError unless `grids` and `num_codes` of `what` are those of a stage that draws its codes.

    None: unknown.
    """
    for name, theirs in (("grids", grids), ("num_codes", num_codes)):
        own = getattr(stage, name, None)
        if None not in (own, theirs) and _plain(own) != _plain(theirs):
            theirs = _plain(theirs)
            raise ValueError(
                f"the token model draws codes of {name} {own}, {what} has {theirs}: they must be the same"
            )


def _plain(x: Any) -> Any:
    """Tuples in the place of lists, at any depth."""
    return tuple(map(_plain, x)) if isinstance(x, list | tuple) else x


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

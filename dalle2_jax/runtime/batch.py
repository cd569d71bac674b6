"""The fields of a batch in one table, `FIELDS`; pictures and text states on the host and as floats.

A batch is a dict of arrays whose axis 0 is the example. Its names are those of `FIELDS`, with or without an
owner before a dot: `clip.image` (an image cut for CLIP), `t5.text_states`, `top.codes`. The part behind the
last dot decides what a field is. Code that treats fields differently asks for the kind, never for a shape or
a type:

    image      [B, H, W, 3]     uint8 on the host, float32 in [-1, 1] on the devices
    video      [B, T, H, W, 3]  the same, T frames
    tokens     [B, L]           the ids of a text's tokens; `mask` says which are real
    codes      [B, ...]         indices into a code book, of any integer type
    embedding  [B, E]           a vector of an example
    states     [B, L, D]        a vector of each token; `mask` says which are real; on the host uint16, the
                                bits of bfloat16
    mask       [B, L]           bool
    label      [B]              a class, -1 for none
    number     [B, ...]         other numbers of an example
    index      [B]              its record's number in the dataset; it stays on the host
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.runtime.names import nearest


class Field(NamedTuple):
    """dtype: of the host's array. kind: one of those above. mask: the field with the mask of this one."""

    dtype: str
    kind: str
    mask: str | None = None


FIELDS = {
    "image": Field("uint8", "image"),
    "low_res": Field("uint8", "image"),  # float32 in [-1, 1] where a dataset degrades it
    "video": Field("uint8", "video"),
    "crop_yx": Field("int32", "number"),
    "tokens": Field("int32", "tokens", mask="token_mask"),
    "token_mask": Field("bool", "mask"),
    "codes": Field("int32", "codes"),
    "image_embed": Field("float32", "embedding"),
    "text_embed": Field("float32", "embedding"),
    "text_states": Field("uint16", "states", mask="token_mask"),
    "label": Field("int32", "label"),
    "index": Field("int64", "index"),
}
STORED = ("embedding", "states", "codes")  # kinds that frozen stages compute, or a dataset stores
PICTURES = ("image", "video")  # kinds whose values are levels 0 ... 255 or floats in [-1, 1]


def field(name: str) -> Field:
    """The entry of `FIELDS` for a name with or without an owner. Raises ValueError for an unknown name."""
    last = name.rpartition(".")[2]
    if last not in FIELDS:
        near = nearest(last, FIELDS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(FIELDS)}"
        raise ValueError(f"a batch has no field {name!r}; {hint} (runtime/batch.py)")
    return FIELDS[last]


def to_uint8(images: jax.Array | np.ndarray) -> jax.Array:
    """[-1, 1] floats to the nearest of 256 levels."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]; `to_uint8` undoes it."""
    return (images.astype(jnp.float32) - 127.5) / 127.5


@jax.jit
def as_floats(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with its uint8 images and videos, and states in uint16, as floats; other fields stay."""

    def one(name: str, x: jax.Array) -> jax.Array:
        kind = field(name).kind
        if kind in PICTURES and x.dtype == jnp.uint8:
            return to_float(x)
        if kind == "states" and x.dtype == jnp.uint16:
            return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)
        return x

    return {name: one(name, x) for name, x in batch.items()}


def stills(name: str, values: np.ndarray) -> np.ndarray | None:
    """Floats [-1, 1] of a field as pictures uint8 [B, H, W', 3]: of a video its frames, side by side.

    None for a kind that has no picture.
    """
    kind = field(name).kind
    if kind not in PICTURES:
        return None
    pictures = np.asarray(to_uint8(values))
    if kind == "video":
        count, frames, height, width, channels = pictures.shape
        pictures = pictures.swapaxes(1, 2).reshape(count, height, frames * width, channels)
    return pictures

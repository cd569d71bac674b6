"""Result: drawn pictures with what they were drawn from."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from dalle2_jax.data.shards import encodable
from dalle2_jax.generate import output
from dalle2_jax.generate.engine import Timing
from dalle2_jax.runtime import grid


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """Drawn pictures, n of each caption side by side. A notebook shows them as a grid.

    Attributes:
      captions: N captions, one a picture; "" for a model that reads none.
      numbers: N picture numbers, by default 0 .. n-1 within a caption; with seed and settings they fix the
        picture.
      seed: the seed of all of them.
      image_embeds: [N, E] float32 of the prior, in CLIP's scale; [N, 0] where no step reads them.
      base: uint8 [N, h, w, 3], the first step's pictures.
      images: uint8 [N, H, W, 3], after the last upsampler (`base` without upsamplers).
      settings: step -> its settings, JSON values.
      timings: step -> Timing, in the order in which they ran; 'text' is CLIP reading the captions.
      model: the model's name.
      origin: returns what the pictures depend on besides (see `output.origin`); None: unknown.
    """

    captions: tuple[str, ...]
    numbers: tuple[int, ...]
    seed: int
    image_embeds: np.ndarray
    base: np.ndarray
    images: np.ndarray
    settings: dict
    timings: dict[str, Timing]
    model: str = ""
    origin: Callable[[], dict] | None = None

    def __post_init__(self):
        object.__setattr__(self, "captions", tuple(map(encodable, self.captions)))  # to be written into files

    def __repr__(self) -> str:
        count, height, width, _ = self.images.shape
        return f"<Result: {count} picture{'s' * (count != 1)} of {width} x {height}, seed {self.seed}>"

    def _repr_png_(self) -> bytes:
        """The grid as a PNG file, which notebooks show."""
        return grid.png_bytes(self.grid())

    @property
    def pil(self) -> list[Any]:
        """N PIL pictures."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]

    def grid(self) -> np.ndarray:
        """The pictures with their captions below, uint8 [H, W, 3]; a row a caption if n is above 1."""
        return output.result_grid(self)

    def save(self, out: str | os.PathLike) -> list[epath.Path]:
        """Write pictures, grid.png and generate.json as `generate --out` does; return the pictures' paths.

        `generate --again=PICTURE` draws a picture of `Pipeline.text_to_image` again.
        """
        return output.write_pictures(out, self, self.model)

"""DALL·E 2 (unCLIP) in JAX: CLIP, diffusion prior, decoder and upsamplers, all trained by one loop.

    pipe = dalle2_jax.load()  # or a model directory: dalle2_jax.load("DIR")
    result = pipe("a red star above a blue ring", n=4)
    result.images, result.pil, result.save("pictures")

Importing the package starts nothing: no device, no TensorFlow, no network. The commands are
`python -m dalle2_jax.train`, `python -m dalle2_jax.generate` and their siblings: `python -m dalle2_jax` lists
them. `docs/design.md` is the map of the files.
"""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle2_jax.pipeline import UnCLIP

__version__ = "0.1.0"


def load(
    model: str | None = None, *, dtype: str | None = None, mesh=None, low_memory: bool = False
) -> "UnCLIP":
    """Opens a model directory, to draw with it: `load()("a red star", n=4, seed=0).images`.

    The first call sets JAX up for this machine as the commands do (`runtime.partition.initialise`): devices
    of the CPU and the cache of compiled programs. Call it before anything is computed. Settings that the
    user has changed stay.

    Args:
      model: the directory, or hf://OWNER/NAME@COMMIT; None: the small model that comes with the package.
      dtype, mesh, low_memory: see `UnCLIP.load`.

    Raises:
      FileNotFoundError: no such directory, or a part of it is missing.
      ValueError: a part is damaged, or the stages do not fit together.
    """
    from dalle2_jax.pipeline import UnCLIP

    _initialise()
    return UnCLIP.load(model, dtype, mesh, low_memory)


@functools.cache
def _initialise() -> None:
    """Set JAX up, once a process."""
    from dalle2_jax.runtime import partition

    partition.initialise()

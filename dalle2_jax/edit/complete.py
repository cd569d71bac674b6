"""Pictures whose lower part a token model draws (DALL-E 1)."""

import numpy as np

from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.generate.pipeline import Pipeline, Result, Running
from dalle2_jax.generate.settings import of_step


def complete(
    pipe: Pipeline,
    picture,
    caption: str,
    *,
    n: int = 4,
    scale: float = 0.5,
    guidance_scale: float | None = None,
    fit: str = "crop",
    **running,
) -> Result:
    """`n` pictures of `caption` whose upper part, the share `scale` of the rows of codes, is `picture`'s.

    The upper part comes back as the tokenizer reconstructs it. running: fields of `Running`.
    """
    if not 0 < scale < 1:
        raise ValueError(f"scale {scale} must lie between 0 and 1: the share of the picture that is kept")
    steps = pipe.steps("complete")
    codes = next(step for step in steps if step.role)
    settings = of_step(pipe.engine, codes, guidance_scale=guidance_scale) | {"keep": scale}
    square, how = square_picture(picture, pipe.image_size, fit), Running(**running)
    batch = {"caption": [caption] * n, "number": range(n), f"{steps[0].name}.image": np.stack([square] * n)}
    made, timings = pipe.run(steps, batch, {codes.name: settings}, how)
    images, no_embeds = made[f"{steps[-1].name}.image"], np.zeros((n, 0), np.float32)
    drawn = images, images, {codes.name: settings}, timings, pipe.name
    return Result((caption,) * n, tuple(range(n)), how.seed, no_embeds, *drawn)

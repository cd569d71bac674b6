"""Edits of pictures by their codes: through the tokenizer and back.

Functions of a `Pipeline`, as `actions` describes them.
"""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.generate.pipeline import RUNNING, Pipeline, Result, Running
from dalle2_jax.generate.settings import check_keywords


def reconstruct(pipe: Pipeline, images: Sequence, *, fit: str = "crop", **running) -> Result:
    """Pictures as the tokenizer gives them back from their codes. running: fields of `Running`."""
    check_keywords(running, RUNNING, "option of an edit")
    steps, how = pipe.steps("reconstruct"), Running(**running)
    squares = np.stack([square_picture(image, pipe.image_size, fit) for image in images])
    made, timings = pipe.run(steps, {f"{steps[0].name}.image": squares}, {}, how)
    drawn = made[f"{steps[-1].name}.image"]
    labels, numbers = ("reconstruction",) * len(drawn), tuple(range(len(drawn)))
    no_embeds = np.zeros((len(drawn), 0), np.float32)
    return Result(labels, numbers, how.seed, no_embeds, drawn, drawn, {}, timings, pipe.name)

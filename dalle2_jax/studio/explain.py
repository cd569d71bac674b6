"""The way from a caption to its picture, step by step, for people who look on."""

import numpy as np

from dalle2_jax.edit.latents import unit
from dalle2_jax.generate import unclip
from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.engine import Progress
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.generate.settings import by_role


def explain(
    pipe: Pipeline, caption: str, *, seed: int = 0, progress: Progress | None = None, **asked
) -> dict:
    """What happens on the way from a caption to picture 0 of `text_to_image` with the same arguments.

    Returns a dict of
      tokens: the texts of the tokens that CLIP reads, as many as it reads of the caption.
      text_embed: [E] float32, CLIP's embedding of the caption.
      candidates: [k, E] float32, the embeddings that the prior drew; cosines: [k], theirs with the text
        embedding; kept: which is the largest.
      path: uint8 [n, h, w, 3], the base picture after each of the decoder's steps.
      stages: name -> uint8 [h, w, 3], the pictures of the decoder and each upsampler.

    Raises ValueError for a model without a CLIP and a prior.
    """
    check_captions([caption])
    pipe.steps("explain")
    settings, own = pipe.settings(**asked), by_role(asked)
    tokenizer = pipe.engine.tokenizer("clip")
    tokens, mask = tokenizer([caption])
    pieces = [tokenizer.decode(tokens[0][i : i + 1]) for i in np.flatnonzero(mask[0])]
    common = dict(seed=seed, progress=progress)
    prior = own.get("prior", {})
    embed, _ = unclip.sample_prior(pipe, [caption], **common, **prior)
    drawn = embed
    if "num_steps" in settings["prior"] and settings["prior"]["num_candidates"] > 1:
        drawn, _ = unclip.sample_prior(pipe, [caption], **common, **prior, return_candidates=True)
        drawn = drawn[0]
    (text_embed, _), _ = pipe.encode_text([caption])
    cosines = unit(drawn) @ unit(text_embed[0])
    path, _ = unclip.decode(pipe, embed, [caption], return_path=True, **common, **own.get("decoder", {}))
    stages = {"decoder": path[:, -1]}
    more = own.get("upsampler", {})
    unclip.upsample(pipe, path[:, -1], [caption], seen=stages.__setitem__, **common, **more)
    return dict(
        tokens=[piece for piece in pieces if piece],
        text_embed=text_embed[0],
        candidates=drawn,
        cosines=cosines,
        kept=int(cosines.argmax()),
        path=path[0],
        stages={name: images[0] for name, images in stages.items()},
    )

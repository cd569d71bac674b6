"""The way from a caption to its picture, step by step, to be shown."""

import numpy as np

from dalle2_jax.edit.latents import unit
from dalle2_jax.generate import unclip
from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.engine import Progress
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.generate.settings import by_role


def explain(
    pipe: Pipeline, caption: str, *, seed: int = 0, progress: Progress | None = None, **settings
) -> dict:
    """The intermediate results of picture 0 of `text_to_image` with the same arguments.

    Returns a dict of
      tokens: the texts of the caption's tokens, as many as CLIP reads.
      text_embed: [E] float32, CLIP's embedding of the caption.
      candidates: [k, E] float32, the prior's embeddings; cosines: [k], theirs with text_embed; kept: the
        index of the largest.
      path: uint8 [n, h, w, 3], the base picture after each of the decoder's steps.
      stages: name -> uint8 [h, w, 3], the pictures of the decoder and each upsampler.

    Raises ValueError for a model without a CLIP and a prior.
    """
    check_captions([caption])
    pipe.steps("explain")
    prior, roles = pipe.settings(**settings)["prior"], by_role(settings)
    tokenizer = pipe.engine.tokenizer("clip")
    tokens, mask = tokenizer([caption])
    pieces = [tokenizer.decode(tokens[0][i : i + 1]) for i in np.flatnonzero(mask[0])]
    common = dict(seed=seed, progress=progress)
    of_prior, of_decoder, of_upsampler = (
        roles.get(role, {}) | common for role in ("prior", "decoder", "upsampler")
    )
    embed, _ = unclip.sample_prior(pipe, [caption], **of_prior)
    candidates = embed
    if "num_steps" in prior and prior["num_candidates"] > 1:  # a diffusion prior
        candidates = unclip.sample_prior(pipe, [caption], **of_prior, return_candidates=True)[0][0]
    (text_embed, _), _ = pipe.encode_text([caption])
    cosines = unit(candidates) @ unit(text_embed[0])
    path, _ = unclip.decode(pipe, embed, [caption], return_path=True, **of_decoder)
    stages = {"decoder": path[:, -1]}
    unclip.upsample(pipe, path[:, -1], [caption], on_images=stages.__setitem__, **of_upsampler)
    return dict(
        tokens=[piece for piece in pieces if piece],
        text_embed=text_embed[0],
        candidates=candidates,
        cosines=cosines,
        kept=int(cosines.argmax()),
        path=path[0],
        stages={name: images[0] for name, images in stages.items()},
    )

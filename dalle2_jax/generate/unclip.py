"""The stages of unCLIP one by one: embeddings of captions, base pictures of embeddings, larger pictures.

Functions of a `Pipeline`; `dalle2_jax.pipeline.UnCLIP` has them as methods.
"""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.engine import Progress, Seen, Timing
from dalle2_jax.generate.pipeline import Pipeline, Running, check_counts, repeated
from dalle2_jax.generate.settings import of_role, of_step


def sample_prior(
    pipe: Pipeline,
    captions: Sequence[str],
    *,
    seed: int = 0,
    n: int = 1,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings,
) -> tuple[np.ndarray, dict[str, Timing]]:
    """(n image embeddings of each caption, [N, E] float32 in CLIP's own scale; step -> Timing).

    [N, 0] for a decoder that reads none. numbers: instead of n, one a caption, that of the embedding to draw
    for it. settings: the prior's own, by its names of them: num_steps, guidance_scale, ...;
    return_candidates=True: all that a diffusion prior drew for each, [N, num_candidates, E], none chosen.

    Raises ValueError for captions that are not allowed, and for numbers that are not one a caption.
    """
    check_counts("captions", len(captions), numbers=numbers)
    steps = [step for step in pipe.steps("draw") if "image" not in step.writes]
    if not steps:
        return np.zeros((len(captions) * (n if numbers is None else 1), 0), np.float32), {}
    check_captions(captions)
    if numbers is None:
        captions, numbers = repeated(captions, n)
    every = settings.pop("return_candidates", False)
    own = of_step(pipe.engine, steps[-1], **settings) | ({"return_candidates": True} if every else {})
    made, timings = pipe.run(
        steps,
        {"caption": captions, "number": numbers},
        {steps[-1].name: own},
        Running(seed, batch_size, progress),
    )
    return made[f"{steps[-1].name}.image_embed"], timings


def decode(
    pipe: Pipeline,
    image_embeds: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **how,
) -> tuple[np.ndarray, Timing]:
    """(base pictures uint8 [N, h, w, 3] of image embeddings, Timing).

    Args:
      pipe: the model.
      image_embeds: [N, E] in CLIP's own scale; [N, 0] for a decoder that reads none.
      captions: N of them, or None for the null caption.
      seed, numbers: picture i has the key of (seed, numbers[i]); by default 0 .. N-1.
      batch_size, progress: see `Running`.
      how: the decoder's own settings, by its names of them (num_steps, guidance_scale, ...); scales of guides
        that steer to the captions; and
          negative: a caption that guidance leads away from;
          x_T: noise [N, h, w, 3] to start from, such as `invert` finds;
          init, strength: base pictures uint8 [N, h, w, 3], and the share of the steps taken from there;
          known: a picture uint8 [H, W, 3] and where to repaint it, bool [H, W]; the rest comes back;
          resample: how often each step is taken, see `diffusion.sampling`;
          return_path: the pictures after every step instead, uint8 [N, steps, h, w, 3].
    """
    step = pipe.steps("redraw")[0]
    width = pipe.engine.stage(step.stage).embed_dim
    image_embeds = np.asarray(image_embeds, np.float32)
    if image_embeds.ndim != 2 or image_embeds.shape[1] != width:
        raise ValueError(f"image_embeds must be [N, {width}], not {list(image_embeds.shape)}")
    check_counts("image embeddings", len(image_embeds), captions=captions, numbers=numbers)
    given = {"caption": captions, "number": np.arange(len(image_embeds)) if numbers is None else numbers}
    given |= {f"{step.name}.image_embed": image_embeds} if width else {}
    given |= {name: how.pop(name, None) for name in ("known", "negative")}
    for name in ("x_T", "init"):
        value = how.pop(name, None)
        given |= {} if value is None else {f"{step.name}.{name}": value}
    usual = dict(strength=1.0, resample=1, return_path=False)
    changed = {name: value for name in usual if (value := how.pop(name, usual[name])) != usual[name]}
    own = of_step(pipe.engine, step, **how) | changed
    made, timings = pipe.run([step], given, {step.name: own}, Running(seed, batch_size, progress))
    return made[f"{step.name}.image"], timings[step.name]


def upsample(
    pipe: Pipeline,
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    seen: Seen | None = None,
    **how,
) -> tuple[np.ndarray, dict[str, Timing]]:
    """(pictures of the decoder's size, uint8 [N, h, w, 3], through all upsamplers; step -> Timing).

    captions: N of them for upsamplers that read them, None for the null caption. seen: called with the
      pictures of
    every upsampler as it finishes. how: as for `decode`, for every upsampler, but `num_steps` has one number
    for each; of the rest it takes `known`.

    Raises ValueError for other pictures than those, and for captions or numbers that are not as many.
    """
    steps = [step for step in pipe.steps("redraw") if step.role == "upsampler"]
    known = how.pop("known", None)
    own = of_role(pipe.engine, steps, "upsampler", **how)
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [N, h, w, 3], not {images.dtype} {list(images.shape)}")
    check_counts("pictures", len(images), captions=captions, numbers=numbers)
    if not steps:
        return images, {}
    given = {"caption": captions, "number": np.arange(len(images)) if numbers is None else numbers}
    given |= {"known": known, steps[0].bind["low_res"]: images}
    made, timings = pipe.run(steps, given, own, Running(seed, batch_size, progress, seen))
    return made[f"{steps[-1].name}.image"], timings

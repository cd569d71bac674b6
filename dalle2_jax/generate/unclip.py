"""The stages of unCLIP one by one: image embeddings of captions, base pictures of these, larger pictures.

Functions of a `Pipeline`; `dalle2_jax.pipeline.UnCLIP` has them as methods. `**options` are the fields of
`Running` and settings of the stage by their names in its `sample` (num_steps, guidance_scale, ...).
"""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.engine import Timing
from dalle2_jax.generate.pipeline import Pipeline, Running, check_counts, repeated
from dalle2_jax.generate.settings import of_role, of_step


def sample_prior(
    pipe: Pipeline, captions: Sequence[str], *, n: int = 1, numbers: Sequence[int] | None = None, **options
) -> tuple[np.ndarray, dict[str, Timing]]:
    """(n image embeddings of each caption, [N, E] float32 in CLIP's scale; step -> Timing).

    [N, 0] where the decoder reads no embedding. numbers: instead of n, one a caption, the number of its
    embedding. return_candidates=True: all candidates of a diffusion prior, [N, num_candidates, E].

    Raises ValueError for invalid captions, and for another number of numbers than of captions.
    """
    check_counts("captions", len(captions), numbers=numbers)
    steps = [step for step in pipe.steps("draw") if "image" not in step.writes]
    if not steps:
        return np.zeros((len(captions) * (n if numbers is None else 1), 0), np.float32), {}
    check_captions(captions)
    if numbers is None:
        captions, numbers = repeated(captions, n)
    how, prior = Running.take(options), steps[-1]
    candidates = {"return_candidates": True} if options.pop("return_candidates", False) else {}
    settings = {prior.name: of_step(pipe.engine, prior, **options) | candidates}
    made, timings = pipe.run(steps, {"caption": captions, "number": numbers}, settings, how)
    return made[f"{prior.name}.image_embed"], timings


def decode(
    pipe: Pipeline,
    image_embeds: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    numbers: Sequence[int] | None = None,
    **options,
) -> tuple[np.ndarray, Timing]:
    """(base pictures uint8 [N, h, w, 3] of image embeddings, Timing).

    Args:
      pipe: the model.
      image_embeds: [N, E] in CLIP's scale; [N, 0] for a decoder that reads none.
      captions: N; None: the null caption.
      numbers: picture i has the key of (seed, numbers[i]); by default 0 .. N-1.
      options: see the module; scales of guides, which steer to the captions; and
        negative: a caption that guidance leads away from;
        x_T: noise [N, h, w, 3] to start from, such as `invert` finds;
        init, strength: base pictures uint8 [N, h, w, 3], and the share of the steps taken from there;
        inpaint: a picture uint8 [H, W, 3] and a mask bool [H, W]; only True pixels change;
        resample: how often each step is taken, see `diffusion.sampling`;
        return_path: return the pictures after every step, uint8 [N, steps, h, w, 3].
    """
    step = pipe.steps("redraw")[0]
    width = pipe.engine.stage(step.stage).embed_dim
    image_embeds, how = np.asarray(image_embeds, np.float32), Running.take(options)
    if image_embeds.ndim != 2 or image_embeds.shape[1] != width:
        raise ValueError(f"image_embeds must be [N, {width}], not {list(image_embeds.shape)}")
    check_counts("image embeddings", len(image_embeds), captions=captions, numbers=numbers)
    batch = {"caption": captions, "number": np.arange(len(image_embeds)) if numbers is None else numbers}
    batch |= {f"{step.name}.image_embed": image_embeds} if width else {}
    batch |= {name: options.pop(name, None) for name in ("inpaint", "negative")}
    for name in ("x_T", "init"):
        if (value := options.pop(name, None)) is not None:
            batch[f"{step.name}.{name}"] = value
    # Keywords of `sample` that are no settings; at their defaults they are left out of the program's key.
    usual = dict(strength=1.0, resample=1, return_path=False)
    changed = {name: value for name in usual if (value := options.pop(name, usual[name])) != usual[name]}
    settings = of_step(pipe.engine, step, **options) | changed
    made, timings = pipe.run([step], batch, {step.name: settings}, how)
    return made[f"{step.name}.image"], timings[step.name]


def upsample(
    pipe: Pipeline,
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    numbers: Sequence[int] | None = None,
    **options,
) -> tuple[np.ndarray, dict[str, Timing]]:
    """(pictures uint8 [N, h, w, 3] of the decoder's size through all upsamplers; step -> Timing).

    captions: N, for upsamplers that read them; None: the null caption. options: see the module, for every
    upsampler, but `num_steps` has one number for each; and `inpaint`, see `decode`.

    Raises ValueError for other arrays, and for another number of captions or numbers than of pictures.
    """
    steps = [step for step in pipe.steps("redraw") if step.role == "upsampler"]
    how, inpaint = Running.take(options), options.pop("inpaint", None)
    settings = of_role(pipe.engine, steps, "upsampler", **options)
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [N, h, w, 3], not {images.dtype} {list(images.shape)}")
    check_counts("pictures", len(images), captions=captions, numbers=numbers)
    if not steps:
        return images, {}
    batch = {"caption": captions, "number": np.arange(len(images)) if numbers is None else numbers}
    batch |= {"inpaint": inpaint, steps[0].bind["low_res"]: images}
    made, timings = pipe.run(steps, batch, settings, how)
    return made[f"{steps[-1].name}.image"], timings

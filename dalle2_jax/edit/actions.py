"""Edits of pictures: variations, blends, edits by text, inpainting (section 3 of the paper).

A picture has two latents: z, its CLIP image embedding, and x_T, the noise from which deterministic DDIM,
conditioned on z, draws it. Inversion finds x_T: DDIM upwards, without guidance, which has no inverse.

    variations     draw z again with other noise (DDIM with eta > 0 from x_T)
    interpolate    between two pictures or captions: slerp(z_1, z_2, theta), slerp(x_T1, x_T2, theta)
    textdiff       slerp(z, norm(y_to - y_from), theta) with y the text embeddings, from the picture's x_T
    inpaint        draw a caption where a mask is white, and keep the rest
    reconstruct    z from its first principal components alone; of a tokenizer, from the picture's codes
    upscale        the last upsampler alone, on a picture of any size

Functions of a `Pipeline`. Pictures are PIL pictures or uint8 [H, W, 3] of any size. `**drawing` are the
fields of `Drawing`. Each action but `invert` and `upscale` returns a `Result`; its captions label the
pictures. An action raises ValueError for a model whose stages cannot do it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle2_jax.edit import codes
from dalle2_jax.edit.latents import Latents, slerp, unit
from dalle2_jax.generate import rerank, unclip
from dalle2_jax.generate.pictures import square_mask, square_picture, whole_picture
from dalle2_jax.generate.pipeline import RUNNING, Pipeline, Result, Running
from dalle2_jax.generate.settings import check_keywords, of_step
from dalle2_jax.models.diffusion.sampling import MULTISTEP

INVERSION_STEPS = 50
RESAMPLE = 4
# action -> its inputs on command lines
INPUTS = {
    "variations": ("picture",),
    "interpolate": ("first", "second"),
    "textdiff": ("picture", "target"),
    "image_to_image": ("picture", "caption"),
    "inpaint": ("picture", "mask", "caption"),
    "outpaint": ("picture", "caption"),
    "complete": ("picture", "caption"),
    "invert": ("picture", "..."),
    "redraw": ("latents",),
    "reconstruct": ("picture",),
    "upscale": ("picture",),
}
PATHS = ("interpolate", "textdiff")  # actions whose pictures go from one to another


@dataclasses.dataclass(frozen=True)
class Drawing(Running):
    """How an edit is drawn: the options of all edits, with those of `Running`.

    Attributes:
      num_steps: of the decoder; None: the model's, or INVERSION_STEPS after an inversion.
      guidance_scale: of the decoder; None: the model's, or 1 where a picture is to come back.
      fit: 'crop' or 'pad', how a picture becomes square.
      upsample: False: base pictures alone.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    fit: str = "crop"
    upsample: bool = True

    @staticmethod
    def of(options: dict) -> "Drawing":
        """The fields from keywords; ValueError names the nearest field for an unknown one."""
        check_keywords(options, [x.name for x in dataclasses.fields(Drawing)], "option of an edit")
        return Drawing(**options)

    @property
    def running(self) -> dict[str, Any]:
        """The fields of `Running` as keywords."""
        return {name: getattr(self, name) for name in RUNNING}

    @property
    def inverting(self) -> dict[str, Any]:
        """Keywords of `invert`."""
        return dict(num_steps=self.num_steps or INVERSION_STEPS, fit=self.fit, **self.running)

    @property
    def faithful(self) -> dict[str, Any]:
        """Keywords of `decode` that draw inverted pictures as they were."""
        steps, scale = self.num_steps or INVERSION_STEPS, self.guidance_scale
        return dict(num_steps=steps, method="ddim", eta=0.0, guidance_scale=1.0 if scale is None else scale)


def base_pictures(pipe: Pipeline, images, fit: str = "crop") -> np.ndarray:
    """Pictures as the decoder would draw them: uint8 [N, h, w, 3]."""
    size = _decoder(pipe).image_size
    squares = (square_picture(image, pipe.image_size, fit) for image in images)
    return np.stack([square_picture(image, size) for image in squares])


def _decoder(pipe: Pipeline):
    """The stage that draws the base pictures."""
    return pipe.engine.stage(pipe.steps("redraw")[0].stage)


def invert(
    pipe: Pipeline,
    images,
    *,
    captions: Sequence[str] | None = None,
    num_steps: int = INVERSION_STEPS,
    fit: str = "crop",
    **running,
) -> Latents:
    """The latents of pictures; more steps draw closer pictures from them. running: fields of `Running`."""
    *encode, step = pipe.steps("invert")
    how = Running(**running)
    squares = [square_picture(image, pipe.image_size, fit) for image in images]
    batch: dict[str, Any] = {"caption": captions, f"{step.name}.image": base_pictures(pipe, squares)}
    embeds = pipe.encode_image(squares, how.batch_size) if encode else np.zeros((len(squares), 0), np.float32)
    batch |= {"image.image_embed": embeds} if encode else {}
    made, _ = pipe.run([step], batch, {step.name: {"num_steps": num_steps}}, how)
    return Latents(embeds, made[f"{step.name}.x_T"], num_steps, None if captions is None else tuple(captions))


def variations(
    pipe: Pipeline,
    picture,
    *,
    n: int = 4,
    caption: str | None = None,
    strength: float = 1.0,
    eta: float = 1.0,
    **drawing,
) -> Result:
    """`n` pictures with the CLIP embedding of `picture`.

    eta in [0, 1] is DDIM's noise on the way from the picture's x_T: 0, with guidance_scale 1, draws the
    picture again. strength < 1 takes that share of the steps, from the noised picture, and keeps its layout.
    """
    how, captions = Drawing.of(drawing), None if caption is None else [caption]
    pipe.steps("variations")
    _check_strength(strength)
    square = square_picture(picture, pipe.image_size, how.fit)
    options = how.faithful | dict(eta=eta, guidance_scale=how.guidance_scale)
    if strength < 1:
        embeds = pipe.encode_image([square], how.batch_size)
        options |= dict(init=np.repeat(base_pictures(pipe, [square]), n, axis=0), strength=strength)
    else:
        latents = invert(pipe, [square], captions=captions, **how.inverting)
        embeds = latents.image_embeds
        options["x_T"] = np.repeat(latents.x_T, n, axis=0)
    options["captions"] = captions and captions * n
    return _draw(pipe, np.repeat(embeds, n, axis=0), ["variation"] * n, how, options)


def from_latents(pipe: Pipeline, latents: Latents, *, eta: float = 0.0, **drawing) -> Result:
    """The pictures of latents, by as many steps as their inversion took."""
    how = Drawing.of(drawing)
    pipe.steps("redraw")
    if how.num_steps not in (None, latents.num_steps):
        raise ValueError(f"these latents are drawn in the {latents.num_steps} steps of their inversion")
    options = how.faithful | dict(num_steps=latents.num_steps, eta=eta, x_T=latents.x_T)
    labels = latents.captions or ["reconstruction"] * len(latents.x_T)
    return _draw(pipe, latents.image_embeds, labels, how, options | dict(captions=latents.captions))


def interpolate(
    pipe: Pipeline, first, second, *, frames: int = 9, same_noise: bool = False, **drawing
) -> Result:
    """`frames` pictures on the way from `first` to `second`, each a picture or a caption.

    The ends draw the two pictures again; `same_noise` draws all frames from the first picture's noise. The
    latents of a caption are the prior's embedding and noise of the seed. Guidance, which leads away from the
    ends, is 1 by default.
    """
    _check_frames(frames)
    pipe.steps("interpolate")
    how = Drawing.of(drawing)
    (z_1, x_1), (z_2, x_2) = (_end(pipe, thing, i, how) for i, thing in enumerate((first, second)))
    return _path(pipe, np.linspace(0, 1, frames), (z_1, z_2), (x_1, x_1 if same_noise else x_2), how)


def _end(pipe: Pipeline, thing, i: int, how: Drawing) -> tuple[np.ndarray, np.ndarray]:
    """(z of unit norm, x_T) of a picture, or of a caption, with noise of (seed, i)."""
    if isinstance(thing, str):
        embed, _ = unclip.sample_prior(pipe, [thing], **how.running)
        size = _decoder(pipe).image_size
        noise = np.random.default_rng((how.seed, i)).standard_normal((size, size, 3), np.float32)
        return unit(embed[0]), noise
    latents = invert(pipe, [thing], **how.inverting)
    return latents.image_embeds[0], latents.x_T[0]


def textdiff(
    pipe: Pipeline,
    picture,
    source: str | None = None,
    target: str = "",
    *,
    theta: float = 0.5,
    frames: int = 6,
    **drawing,
) -> Result:
    """`frames` pictures on the way from `picture` towards `target` and away from `source`, two captions.

    z goes to slerp(z, norm(y_target - y_source), t) for t from 0 to `theta` (the paper has 0.25 .. 0.5), all
    from the picture's x_T. source: a caption of the picture; None: norm(y_target) alone.
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta {theta} must lie in 0 .. 1; 0.25 to 0.5 are usual")
    _check_frames(frames)
    pipe.steps("textdiff")
    how, texts = Drawing.of(drawing), [target] if source is None else [target, source]
    (embeds, _), _ = pipe.encode_text(texts, how.batch_size, how.progress)
    if source is not None and np.allclose(embeds[0], embeds[1]):
        raise ValueError(f"{source!r} and {target!r} are the same to this model's CLIP: say what differs")
    direction = unit(embeds[0] if source is None else embeds[0] - embeds[1])
    latents = invert(pipe, [picture], **how.inverting)
    direction = direction * np.linalg.norm(latents.image_embeds[0])  # 1, unless CLIP's are of any norm
    ends, x_T = (latents.image_embeds[0], direction), latents.x_T[0]
    return _path(pipe, np.linspace(0, theta, frames), ends, (x_T, x_T), how)


def image_to_image(
    pipe: Pipeline,
    picture,
    caption: str,
    *,
    strength: float = 0.7,
    n: int = 1,
    negative: str | None = None,
    **drawing,
) -> Result:
    """`n` pictures of `caption` that begin as `picture`, noised by the share `strength` of the steps."""
    _check_strength(strength)
    pipe.steps("image_to_image")
    how = Drawing.of(drawing)
    init = np.repeat(base_pictures(pipe, [picture], how.fit), n, axis=0)
    return _draw_caption(pipe, caption, n, how, dict(init=init, strength=strength, negative=negative))


def inpaint(
    pipe: Pipeline,
    picture,
    mask,
    caption: str,
    *,
    n: int = 1,
    resample: int | None = None,
    negative: str | None = None,
    **drawing,
) -> Result:
    """`n` pictures of `caption`, equal to `picture` at full size where `mask` is not opaque white.

    mask: a picture, or bool or uint8 [H, W], of the picture's size; see `pictures.repaint_mask`. caption:
    of the finished picture. resample: how often each step is taken, so that the new part fits the old; None:
    1 for a decoder trained with `inpaint` or with a sampler of MULTISTEP, else RESAMPLE.
    """
    how = Drawing.of(drawing)
    pipe.steps("inpaint")
    picture = whole_picture(picture)
    repaint = square_mask(mask, pipe.image_size, picture.shape[1::-1], how.fit)
    if repaint.all():  # nothing is kept
        return _draw_caption(pipe, caption, n, how, dict(negative=negative))
    if resample is None:
        decoder = _decoder(pipe)
        resample = 1 if decoder.inpaint or decoder.sampling["method"] in MULTISTEP else RESAMPLE
    inpaint = square_picture(picture, pipe.image_size, how.fit), repaint
    return _draw_caption(pipe, caption, n, how, dict(resample=resample, negative=negative), inpaint)


def outpaint(
    pipe: Pipeline, picture, caption: str, *, scale: float = 0.5, fit: str = "crop", **options
) -> Result:
    """Draw around `picture`, which takes the middle `scale` of the side. options: those of `inpaint`."""
    from PIL import Image

    if not 0 < scale < 1:
        raise ValueError(f"scale {scale} must lie between 0 and 1: the share of the side that is kept")
    side = pipe.image_size
    inner = max(1, round(scale * side))
    canvas, mask = Image.new("RGB", (side, side), "grey"), np.ones((side, side), bool)
    corner = (side - inner) // 2
    canvas.paste(Image.fromarray(square_picture(picture, inner, fit)), (corner, corner))
    mask[corner : corner + inner, corner : corner + inner] = False
    return inpaint(pipe, canvas, mask, caption, **options)


def reconstruct(pipe: Pipeline, picture, components: Sequence[int] | None = None, **drawing) -> Result:
    """For each k of `components`, `picture` drawn from the first k principal components of its embedding.

    All pictures have one noise (section 4 of the paper). The components are those of an autoregressive prior;
    None: 4, 8, 16. A model with a tokenizer gives `picture` back from its codes instead, and takes no
    `components`, num_steps or guidance_scale.
    """
    pipe.steps("reconstruct")
    if "tokenizer" in pipe.engine.stages:
        how = Drawing.of(drawing)
        if any(x is not None for x in (components, how.num_steps, how.guidance_scale)):
            raise ValueError(
                "a tokenizer gives a picture back from its codes, without drawing: leave components, steps "
                "and guidance_scale out"
            )
        return codes.reconstruct(pipe, [picture], fit=how.fit, **how.running)
    stats = {name: np.asarray(x, np.float64) for name, x in pipe.engine.params("prior")["stats"].items()}
    most, components = len(stats["components"]), (4, 8, 16) if components is None else components
    for k in components:
        if not 1 <= k <= most:
            raise ValueError(f"{k} components are not possible: give 1 .. {most}")
    how = Drawing.of(drawing)
    square = square_picture(picture, pipe.image_size, how.fit)
    z = pipe.encode_image([square], how.batch_size)[0] - stats["mean"]
    bases = [stats["components"][:k] for k in components]
    embeds = np.stack([stats["mean"] + base.T @ (base @ z) for base in bases]).astype(np.float32)
    labels = [f"{k} components" for k in components]
    options = how.faithful | dict(num_steps=how.num_steps, guidance_scale=how.guidance_scale)
    return _draw(pipe, embeds, labels, how, options | dict(numbers=[0] * len(embeds)))


def upscale(
    pipe: Pipeline,
    picture,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    tile: int | None = None,
    caption: str | None = None,
    progress=None,
) -> np.ndarray:
    """A picture of any size, enlarged by the last upsampler: uint8 [s H, s W, 3].

    tile: side of the windows that are drawn at a time, in finished pixels; None: the model's, or that of its
    training for a picture larger than in training. caption: of the picture, for an upsampler that reads one;
    None: the null caption.
    """
    (step,) = pipe.steps("upscale")
    low_res, stage = whole_picture(picture), pipe.engine.stage(step.stage)
    settings = of_step(pipe.engine, step, num_steps=num_steps, tile=tile)
    if max(low_res.shape) > stage.low_res_size:
        settings["tile"] = settings["tile"] or stage.crop_size
    captions = None if caption is None else [caption]
    batch = {"caption": captions, "number": [0], f"{step.name}.low_res": low_res[None]}
    made, _ = pipe.run([step], batch, {step.name: settings}, Running(seed, 1, progress))
    return made[f"{step.name}.image"][0]


def rank(pipe: Pipeline, images, caption: str, batch_size: int | None = None) -> np.ndarray:
    """The order [N] of pictures by how close CLIP finds them to `caption`, the closest first."""
    return np.argsort(-rerank.scores(pipe, images, [caption] * len(images), batch_size), kind="stable")


def _draw_caption(pipe: Pipeline, caption: str, n: int, how: Drawing, options: dict, inpaint=None) -> Result:
    """The `Result` of drawing a caption `n` times with these keywords of `decode`."""
    embeds, timings = unclip.sample_prior(pipe, [caption], n=n, **how.running)
    options = dict(num_steps=how.num_steps, guidance_scale=how.guidance_scale) | options
    made = _draw(pipe, embeds, [caption] * n, how, options | dict(captions=[caption] * n), inpaint)
    return dataclasses.replace(made, timings=timings | made.timings)


def _draw(
    pipe: Pipeline, embeds: np.ndarray, labels: Sequence[str], how: Drawing, options: dict, inpaint=None
) -> Result:
    """The `Result` of decoding `embeds` with these keywords of `decode`, and enlarging."""
    options = {"numbers": range(len(embeds)), "captions": None} | options
    numbers, captions = tuple(options.pop("numbers")), options.pop("captions")
    common = dict(how.running, numbers=numbers, inpaint=inpaint)
    base, timing = unclip.decode(pipe, embeds, captions, **options, **common)
    images, timings = base, {"decoder": timing}
    if how.upsample:
        images, more = unclip.upsample(pipe, base, captions, **common)
        timings |= more
    used = {name: value for name, value in options.items() if isinstance(value, int | float | str)}
    drawn = embeds, base, images, {"decoder": used}, timings, pipe.name
    return Result(tuple(labels), numbers, how.seed, *drawn)


Ends = tuple[np.ndarray, np.ndarray]


def _path(pipe: Pipeline, thetas: np.ndarray, z: Ends, x_T: Ends, how: Drawing) -> Result:
    """The `Result` of points on the great circles between two z and between two x_T."""
    embeds = np.stack([slerp(*z, theta) for theta in thetas])
    noise = np.stack([x_T[0] if x_T[0] is x_T[1] else slerp(*x_T, theta) for theta in thetas])
    labels = [f"theta {theta:.2f}" for theta in thetas]
    return _draw(pipe, embeds, labels, how, how.faithful | dict(x_T=noise))


def _check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} must lie in 0 .. 1: the share of the steps that is taken")


def _check_frames(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"frames {frames} must be 2 or more")

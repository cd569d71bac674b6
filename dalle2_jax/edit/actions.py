"""What a model does with pictures: variations, blends, edits by text, repainting (section 3 of the paper).

A picture has two latents: z, its CLIP image embedding, which holds what CLIP recognises, and x_T, the noise
from which deterministic DDIM, conditioned on z, draws it: all the rest. x_T is found by running DDIM upwards
without guidance, which could not be undone.

    variations     draw z again with other noise (DDIM with eta > 0 from x_T)
    interpolate    between two pictures or captions: slerp(z_1, z_2, theta), slerp(x_T1, x_T2, theta)
    textdiff       slerp(z, norm(y_to - y_from), theta) with y the text embeddings, from the picture's own x_T
    inpaint        draw a caption where a mask says so, and keep the rest
    reconstruct    z from its first principal components alone
    upscale        the last upsampler alone, on a picture of any size

Functions of a `Pipeline`. Pictures are PIL pictures or uint8 [H, W, 3] of any size. `**drawing` are the
fields of `Drawing`. Each action returns a `Result`, whose captions say what a picture is.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.edit.latents import Latents, slerp, unit
from dalle2_jax.generate import unclip
from dalle2_jax.generate.pictures import square_mask, square_picture, whole_picture
from dalle2_jax.generate.pipeline import Pipeline, Result, Running
from dalle2_jax.generate.settings import of_step

INVERSION_STEPS = 50
RESAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How an edit is drawn, whatever it does: the keywords that every edit takes besides its own.

    Attributes:
      seed: the same seed gives the same pictures.
      num_steps: of the decoder; None is the model's own, or INVERSION_STEPS after an inversion.
      guidance_scale: of the decoder; None is the model's own, or 1 where a picture is to come back.
      fit: 'crop' or 'pad', how a picture becomes square.
      upsample: False for base pictures alone.
      batch_size, progress, seen: see `Running`.
    """

    seed: int = 0
    num_steps: int | None = None
    guidance_scale: float | None = None
    fit: str = "crop"
    upsample: bool = True
    batch_size: int | None = None
    progress: Callable | None = None
    seen: Callable | None = None

    @property
    def running(self) -> dict:
        """Batch size and progress, as keywords."""
        return dict(batch_size=self.batch_size, progress=self.progress)

    @property
    def inversion_steps(self) -> int:
        """DDIM steps of an inversion."""
        return self.num_steps or INVERSION_STEPS

    @property
    def faithful(self) -> dict:
        """Keywords of `decode` that draw inverted pictures as they were."""
        scale = 1.0 if self.guidance_scale is None else self.guidance_scale
        return dict(num_steps=self.inversion_steps, method="ddim", eta=0.0, guidance_scale=scale)


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
    batch_size: int | None = None,
    progress=None,
) -> Latents:
    """The latents of pictures; the more steps, the closer what is drawn from them."""
    *encode, step = pipe.steps("invert")
    squares = [square_picture(image, pipe.image_size, fit) for image in images]
    given = {"caption": captions, f"{step.name}.image": base_pictures(pipe, squares)}
    embeds = np.zeros((len(squares), 0), np.float32)
    if encode:
        embeds = given["image.image_embed"] = pipe.encode_image(squares, batch_size)
    how = Running(0, batch_size, progress)
    made, _ = pipe.run([step], given, {step.name: {"num_steps": num_steps}}, how)
    return Latents(embeds, made[f"{step.name}.x_T"], num_steps, None if captions is None else tuple(captions))


def variations(
    pipe: Pipeline,
    image,
    *,
    n: int = 4,
    caption: str | None = None,
    strength: float = 1.0,
    eta: float = 1.0,
    **drawing,
) -> Result:
    """`n` pictures of what CLIP sees in `image`.

    eta in [0, 1] is DDIM's noise on the way from the picture's own x_T: 0, with guidance_scale 1, draws the
    picture again. With strength < 1, only that share of the steps is taken, from the picture itself noised,
    so that its layout stays.
    """
    how, captions = Drawing(**drawing), None if caption is None else [caption]
    pipe.steps("variations")
    _check_strength(strength)
    square = square_picture(image, pipe.image_size, how.fit)
    own = how.faithful | dict(eta=eta, guidance_scale=how.guidance_scale)
    if strength < 1:
        embeds = pipe.encode_image([square], how.batch_size)
        own |= dict(init=np.repeat(base_pictures(pipe, [square]), n, axis=0), strength=strength)
    else:
        latents = invert(pipe, [square], captions=captions, num_steps=how.inversion_steps, **how.running)
        embeds = latents.image_embeds
        own["x_T"] = np.repeat(latents.x_T, n, axis=0)
    own["captions"] = captions and captions * n
    return _drawn(pipe, np.repeat(embeds, n, axis=0), ["variation"] * n, how, own)


def from_latents(pipe: Pipeline, latents: Latents, *, eta: float = 0.0, **drawing) -> Result:
    """The pictures of latents, by as many steps as their inversion took."""
    how = Drawing(**drawing)
    pipe.steps("redraw")
    if how.num_steps not in (None, latents.num_steps):
        raise ValueError(f"these latents are drawn in the {latents.num_steps} steps of their inversion")
    own = how.faithful | dict(num_steps=latents.num_steps, eta=eta, x_T=latents.x_T)
    labels = latents.captions or ["reconstruction"] * len(latents.x_T)
    return _drawn(pipe, latents.image_embeds, labels, how, own | dict(captions=latents.captions))


def interpolate(
    pipe: Pipeline, first, second, *, frames: int = 9, same_noise: bool = False, **drawing
) -> Result:
    """`frames` pictures on the way from `first` to `second`, each a picture or a caption.

    The ends draw the given pictures again, unless `same_noise` draws all from one noise, the first picture's.
    A caption's latents are its prior's embedding and noise of the seed. Guidance, which leads away from the
    ends, is 1 unless given.
    """
    if frames < 2:
        raise ValueError(f"frames {frames} must be 2 or more")
    pipe.steps("interpolate")
    how = Drawing(**drawing)
    (z_1, x_1), (z_2, x_2) = (_end(pipe, thing, i, how) for i, thing in enumerate((first, second)))
    thetas = np.linspace(0, 1, frames)
    x_T = [x_1 if same_noise else slerp(x_1, x_2, theta) for theta in thetas]
    embeds = np.stack([slerp(z_1, z_2, theta) for theta in thetas])
    labels = [f"theta {theta:.2f}" for theta in thetas]
    return _drawn(pipe, embeds, labels, how, how.faithful | dict(x_T=np.stack(x_T)))


def _end(pipe: Pipeline, thing, i: int, how: Drawing) -> tuple[np.ndarray, np.ndarray]:
    """(z of unit norm, x_T) of a picture, or of a caption, with noise of (seed, i)."""
    if isinstance(thing, str):
        embed, _ = unclip.sample_prior(pipe, [thing], seed=how.seed, **how.running)
        size = _decoder(pipe).image_size
        noise = np.random.default_rng((how.seed, i)).standard_normal((size, size, 3), np.float32)
        return unit(embed[0]), noise
    latents = invert(pipe, [thing], num_steps=how.inversion_steps, fit=how.fit, **how.running)
    return latents.image_embeds[0], latents.x_T[0]


def textdiff(
    pipe: Pipeline,
    image,
    source: str | None,
    target: str,
    *,
    theta: float = 0.5,
    frames: int = 6,
    **drawing,
) -> Result:
    """`frames` pictures on the way from `image` towards what `target` has and `source` has not.

    z goes to slerp(z, norm(y_target - y_source), theta), theta from 0 to the given one (the paper's ends lie
    in 0.25 .. 0.5), all from the picture's own x_T. source: a caption of the picture, or None for
    norm(y_target) alone.
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta {theta} must lie in 0 .. 1; 0.25 to 0.5 are usual")
    if frames < 2:
        raise ValueError(f"frames {frames} must be 2 or more")
    pipe.steps("textdiff")
    how, texts = Drawing(**drawing), [target] if source is None else [target, source]
    (embeds, _), _ = pipe.encode_text(texts, **how.running)
    if source is not None and np.allclose(embeds[0], embeds[1]):
        raise ValueError(f"{source!r} and {target!r} are the same to this model's CLIP: say what differs")
    direction = unit(embeds[0] if source is None else embeds[0] - embeds[1])
    latents = invert(pipe, [image], num_steps=how.inversion_steps, fit=how.fit, **how.running)
    direction = direction * np.linalg.norm(latents.image_embeds[0])  # 1, unless CLIP's are of any norm
    thetas = np.linspace(0, theta, frames)
    embeds = np.stack([slerp(latents.image_embeds[0], direction, at) for at in thetas])
    own = how.faithful | dict(x_T=np.repeat(latents.x_T, frames, axis=0))
    return _drawn(pipe, embeds, [f"theta {at:.2f}" for at in thetas], how, own)


def image_to_image(
    pipe: Pipeline,
    image,
    caption: str,
    *,
    strength: float = 0.7,
    n: int = 1,
    negative: str | None = None,
    **drawing,
) -> Result:
    """`n` pictures of `caption` that begin as `image`, noised as far as `strength` of the steps go."""
    _check_strength(strength)
    pipe.steps("image_to_image")
    how = Drawing(**drawing)
    square = square_picture(image, pipe.image_size, how.fit)
    own = dict(init=np.repeat(base_pictures(pipe, [square]), n, axis=0), strength=strength)
    return _of_caption(pipe, caption, n, how, own | dict(negative=negative))


def inpaint(
    pipe: Pipeline,
    image,
    mask,
    caption: str,
    *,
    n: int = 1,
    resample: int | None = None,
    negative: str | None = None,
    **drawing,
) -> Result:
    """`n` pictures that show `caption`, equal to `image` where `mask` is not white and opaque.

    mask: what `pictures.repaint_mask` takes, of the picture's size: a picture, or bool or uint8 [H, W].
      caption
    says what the whole picture shows. Every step is taken `resample` times, so that the new fits the old:
    once by a decoder that was trained to see the old, else RESAMPLE times, unless given. The kept part is
    unchanged in the finished picture, at its full size.
    """
    how = Drawing(**drawing)
    pipe.steps("inpaint")
    image = whole_picture(image)
    repaint = square_mask(mask, pipe.image_size, image.shape[1::-1], how.fit)
    square = square_picture(image, pipe.image_size, how.fit)
    if resample is None:
        resample = 1 if _decoder(pipe).inpaint else RESAMPLE
    # With nothing to fit to, this is drawing a caption.
    own = dict(resample=1 if repaint.all() else resample, negative=negative)
    return _of_caption(pipe, caption, n, how, own, known=None if repaint.all() else (square, repaint))


def outpaint(
    pipe: Pipeline, image, caption: str, *, scale: float = 0.5, fit: str = "crop", **settings
) -> Result:
    """Draw around `image`, which takes the middle `scale` of the side; the rest is as for `inpaint`."""
    from PIL import Image

    if not 0 < scale < 1:
        raise ValueError(f"scale {scale} must lie between 0 and 1: the share of the side that is kept")
    side = pipe.image_size
    inner = max(1, round(scale * side))
    canvas, mask = Image.new("RGB", (side, side), "grey"), np.ones((side, side), bool)
    corner = (side - inner) // 2
    canvas.paste(Image.fromarray(square_picture(image, inner, fit)), (corner, corner))
    mask[corner : corner + inner, corner : corner + inner] = False
    return inpaint(pipe, canvas, mask, caption, **settings)


def reconstruct(pipe: Pipeline, image, components: Sequence[int], **drawing) -> Result:
    """What CLIP sees in `image`, drawn from the first k principal components of its embedding, each k.

    All from one noise (section 4 of the paper). The components are those of an autoregressive prior; raises
    ValueError for a model without one.
    """
    pipe.steps("reconstruct")
    stats = {name: np.asarray(x, np.float64) for name, x in pipe.engine.params("prior")["stats"].items()}
    most = len(stats["components"])
    for k in components:
        if not 1 <= k <= most:
            raise ValueError(f"{k} components are not possible: give 1 .. {most}")
    how = Drawing(**drawing)
    square = square_picture(image, pipe.image_size, how.fit)
    z = pipe.encode_image([square], how.batch_size)[0] - stats["mean"]
    bases = [stats["components"][:k] for k in components]
    embeds = np.stack([stats["mean"] + base.T @ (base @ z) for base in bases]).astype(np.float32)
    own = dict(num_steps=how.num_steps, method="ddim", eta=0.0, guidance_scale=how.guidance_scale)
    labels = [f"{k} components" for k in components]
    return _drawn(pipe, embeds, labels, how, own | dict(numbers=[0] * len(embeds)))


def upscale(
    pipe: Pipeline,
    image,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    tile: int | None = None,
    caption: str | None = None,
    progress=None,
) -> np.ndarray:
    """A picture of any size, enlarged by the last upsampler: uint8 [s H, s W, 3].

    tile: side of the windows that are drawn at a time, in finished pixels; by default the whole picture where
      it
    is no larger than in training. caption: what the picture shows, for an upsampler that reads it; None for
    the null caption.
    """
    (step,) = pipe.steps("upscale")
    low_res, stage = whole_picture(image), pipe.engine.stage(step.stage)
    own = of_step(pipe.engine, step, num_steps=num_steps, tile=tile)
    if max(low_res.shape) > stage.low_res_size:
        own["tile"] = own["tile"] or stage.crop_size
    given = {"caption": None if caption is None else [caption], "number": [0]}
    given[f"{step.name}.low_res"] = low_res[None]
    made, _ = pipe.run([step], given, {step.name: own}, Running(seed, 1, progress))
    return made[f"{step.name}.image"][0]


def rank(pipe: Pipeline, images, caption: str, batch_size: int | None = None) -> np.ndarray:
    """The order [N] of pictures by how close CLIP finds them to `caption`, the closest first."""
    (text, _), _ = pipe.encode_text([caption], batch_size)
    return np.argsort(-(unit(pipe.encode_image(images, batch_size)) @ text[0]), kind="stable")


def _of_caption(pipe: Pipeline, caption: str, n: int, how: Drawing, own: dict, known=None) -> Result:
    """The `Result` of drawing a caption `n` times with the keywords `own` of `decode`."""
    embeds, timings = unclip.sample_prior(pipe, [caption], seed=how.seed, n=n, **how.running)
    own = dict(num_steps=how.num_steps, guidance_scale=how.guidance_scale, captions=[caption] * n) | own
    return _drawn(pipe, embeds, [caption] * n, how, own, known, timings)


def _drawn(
    pipe: Pipeline,
    embeds: np.ndarray,
    labels: Sequence[str],
    how: Drawing,
    own: dict,
    known: tuple[np.ndarray, np.ndarray] | None = None,
    timings: dict | None = None,
) -> Result:
    """The `Result` of decoding `embeds` with the keywords `own` of `decode`, and enlarging."""
    own, timings = dict(own), dict(timings or {})
    numbers, captions = tuple(own.pop("numbers", range(len(embeds)))), own.pop("captions", None)
    common = dict(seed=how.seed, numbers=numbers, known=known, **how.running)
    base, timings["decoder"] = unclip.decode(pipe, embeds, captions, **own, **common)
    if how.seen is not None:
        how.seen("decoder", base)
    images = base
    if how.upsample:
        images, more = unclip.upsample(pipe, base, captions, seen=how.seen, **common)
        timings |= more
    used = {name: value for name, value in own.items() if isinstance(value, int | float | str)}
    return Result(tuple(labels), numbers, how.seed, embeds, base, images, {"decoder": used}, timings)


def _check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} must lie in 0 .. 1: the share of the steps that is taken")

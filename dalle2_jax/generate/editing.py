"""What UnCLIP does with pictures: variations, blends, edits by text, repainting (section 3 of the paper).

A picture is looked at as two latents: z, its CLIP image embedding, which holds what CLIP recognises, and
x_T, the noise from which deterministic DDIM, conditioned on z, draws it: all the rest. x_T is found by
running DDIM upwards without guidance, which could not be undone.

    variations     draw z again with other noise (DDIM with eta > 0 from x_T)
    interpolate    between two pictures or captions: slerp(z_1, z_2, theta), slerp(x_T1, x_T2, theta)
    textdiff       slerp(z, norm(y_to - y_from), theta) with y the text embeddings, from the picture's own x_T
    inpaint        draw a caption where a mask says so, and keep the rest
    reconstruct    z from its first principal components alone
    upscale        the last upsampler alone, on a picture of any size
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from dalle2_jax.generate import settings, tasks
from dalle2_jax.generate.pictures import shrink_mask, square_mask, square_picture, whole_picture
from dalle2_jax.runtime import files

INVERSION_STEPS = 50
RESAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Latents:
    """Pictures as latents.

    Attributes:
      image_embeds: [N, E] float32 of unit norm.
      x_T: [N, h, w, 3] float32, of the decoder's size.
      num_steps: of the inversion; drawing takes as many. captions: what it was conditioned on, or None.
    """

    image_embeds: np.ndarray
    x_T: np.ndarray
    num_steps: int
    captions: tuple[str, ...] | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write one .npz file, without pickle."""
        said = np.array(self.captions or (), dtype=str)
        with epath.Path(files.expand(path)).open("wb") as file:
            np.savez(
                file, image_embeds=self.image_embeds, x_T=self.x_T, num_steps=self.num_steps, captions=said
            )

    @staticmethod
    def load(path: str | os.PathLike) -> "Latents":
        """Read what `save` wrote; ValueError for another file."""
        try:
            place = epath.Path(files.expand(path))
            with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return Latents(
                    stored["image_embeds"],
                    stored["x_T"],
                    int(stored["num_steps"]),
                    tuple(stored["captions"].tolist()) or None,
                )
        except (ValueError, KeyError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} holds no latents, such as `edit invert` writes: {error}") from error


def slerp(a: np.ndarray, b: np.ndarray, theta: float) -> np.ndarray:
    """From `a` (theta 0) to `b` (theta 1) along the great circle, both of any one shape; float32.

    sin((1 - theta) w) / sin(w) a + sin(theta w) / sin(w) b, with w the angle between them (Shoemake 1985);
    a straight line where they point the same way. Raises ValueError where they point in opposite ways.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"cannot go from shape {a.shape} to {b.shape}")
    cosine = np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.pi - angle < 1e-4:
        raise ValueError("opposite vectors have no one way between them")
    if angle < 1e-4:
        return ((1 - theta) * a + theta * b).astype(np.float32)
    return ((np.sin((1 - theta) * angle) * a + np.sin(theta * angle) * b) / np.sin(angle)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., E] scaled to norm 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How an edit is drawn, whatever it does: the keywords that every edit takes besides its own.

    Attributes:
      seed: the same seed gives the same pictures.
      num_steps: of the decoder; None is the model's own, or INVERSION_STEPS after an inversion.
      guidance_scale: of the decoder; None is the model's own, or 1 where a picture is to come back.
      fit: 'crop' or 'pad', how a picture becomes square.
      upsample: False for base pictures alone.
      batch_size, progress, seen: as for `text_to_image`.
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
        """Keywords of the cascade: batch size and progress."""
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


class Editing:
    """The part of `pipeline.UnCLIP` that starts from pictures.

    Pictures are PIL pictures or uint8 [H, W, 3] of any size. `**drawing` are the fields of `Drawing`. Each
    method returns a `Result`, whose captions say what a picture is.
    """

    def base_pictures(self, images, fit: str = "crop") -> np.ndarray:
        """Pictures as the decoder would draw them: uint8 [N, h, w, 3]."""
        size = self.cascade.stage("decoder").image_size
        squares = (square_picture(image, self.image_size, fit) for image in images)
        return np.stack([square_picture(image, size) for image in squares])

    def invert(
        self,
        images,
        *,
        captions: Sequence[str] | None = None,
        num_steps: int = INVERSION_STEPS,
        fit: str = "crop",
        batch_size: int | None = None,
        progress=None,
    ) -> Latents:
        """The latents of pictures; the more steps, the closer what is drawn from them."""
        squares = [square_picture(image, self.image_size, fit) for image in images]
        embeds = np.zeros((len(squares), 0), np.float32)
        rows = {"image": self.base_pictures(squares)}
        rows |= self._told("decoder", captions, len(squares), batch_size)
        if self.cascade.reads_embeds:
            embeds = rows["image_embed"] = self.encode_image(squares, batch_size)
        task = tasks.invert_task(self.cascade, num_steps)
        x_T, _ = self.cascade.run(task, rows, batch_size=batch_size, progress=progress)
        return Latents(embeds, x_T, num_steps, None if captions is None else tuple(captions))

    def variations(
        self,
        image,
        *,
        n: int = 4,
        caption: str | None = None,
        strength: float = 1.0,
        eta: float = 1.0,
        **drawing,
    ):
        """`n` pictures of what CLIP sees in `image`.

        eta in [0, 1] is DDIM's noise on the way from the picture's own x_T: 0, with guidance_scale 1, draws
        the picture again. With strength < 1, only that share of the steps is taken, from the picture itself
        noised, whose layout stays, then.
        """
        how, captions = Drawing(**drawing), None if caption is None else [caption]
        self._check_reads_embeds("variations")
        _check_strength(strength)
        square = square_picture(image, self.image_size, how.fit)
        own = how.faithful | dict(eta=eta, guidance_scale=how.guidance_scale)
        if strength < 1:
            embeds = self.encode_image([square], how.batch_size)
            own |= dict(init=np.repeat(self.base_pictures([square]), n, axis=0), strength=strength)
        else:
            latents = self.invert([square], captions=captions, num_steps=how.inversion_steps, **how.running)
            embeds = latents.image_embeds
            own["x_T"] = np.repeat(latents.x_T, n, axis=0)
        return self._drawn(
            np.repeat(embeds, n, axis=0), ["variation"] * n, how, captions=captions and captions * n, own=own
        )

    def from_latents(self, latents: Latents, *, eta: float = 0.0, **drawing):
        """The pictures of latents, by as many steps as their inversion took."""
        how = Drawing(**drawing)
        if how.num_steps not in (None, latents.num_steps):
            raise ValueError(f"these latents are drawn in the {latents.num_steps} steps of their inversion")
        own = how.faithful | dict(num_steps=latents.num_steps, eta=eta, x_T=latents.x_T)
        labels = latents.captions or ["reconstruction"] * len(latents.x_T)
        return self._drawn(latents.image_embeds, labels, how, captions=latents.captions, own=own)

    def interpolate(
        self,
        first,
        second,
        *,
        frames: int = 9,
        same_noise: bool = False,
        **drawing,
    ):
        """`frames` pictures on the way from `first` to `second`, each a picture or a caption.

        The ends draw the given pictures again, unless `same_noise` draws all from one noise, the first
        picture's. A caption's latents are its prior's embedding and noise of the seed. Guidance, which leads
        away from the ends, is 1 unless given.
        """
        if frames < 2:
            raise ValueError(f"frames {frames} must be 2 or more")
        self._check_reads_embeds("interpolate")
        how = Drawing(**drawing)
        (z_1, x_1), (z_2, x_2) = (self._end(thing, i, how) for i, thing in enumerate((first, second)))
        thetas = np.linspace(0, 1, frames)
        x_T = [x_1 if same_noise else slerp(x_1, x_2, theta) for theta in thetas]
        return self._drawn(
            np.stack([slerp(z_1, z_2, theta) for theta in thetas]),
            [f"theta {theta:.2f}" for theta in thetas],
            how,
            own=how.faithful | dict(x_T=np.stack(x_T)),
        )

    def _end(self, thing, i: int, how: Drawing) -> tuple[np.ndarray, np.ndarray]:
        """(z of unit norm, x_T) of a picture, or of a caption, with noise of (seed, i)."""
        if isinstance(thing, str):
            embed, _ = self.sample_prior([thing], seed=how.seed, **how.running)
            size = self.cascade.stage("decoder").image_size
            noise = np.random.default_rng((how.seed, i)).standard_normal((size, size, 3), np.float32)
            return unit(embed[0]), noise
        latents = self.invert([thing], num_steps=how.inversion_steps, fit=how.fit, **how.running)
        return latents.image_embeds[0], latents.x_T[0]

    def textdiff(
        self,
        image,
        source: str | None,
        target: str,
        *,
        theta: float = 0.5,
        frames: int = 6,
        **drawing,
    ):
        """`frames` pictures on the way from `image` towards what `target` has and `source` has not.

        z goes to slerp(z, norm(y_target - y_source), theta), theta from 0 to the given one (the paper's ends
        lie in 0.25 .. 0.5), all from the picture's own x_T. source: a caption of the picture, or None for
        norm(y_target) alone.
        """
        if not 0 < theta <= 1:
            raise ValueError(f"theta {theta} must lie in 0 .. 1; 0.25 to 0.5 are usual")
        if frames < 2:
            raise ValueError(f"frames {frames} must be 2 or more")
        self._check_reads_embeds("textdiff")
        how, texts = Drawing(**drawing), [target] if source is None else [target, source]
        (embeds, _), _ = self.encode_text(texts, **how.running)
        if source is not None and np.allclose(embeds[0], embeds[1]):
            raise ValueError(f"{source!r} and {target!r} are the same to this model's CLIP: say what differs")
        direction = unit(embeds[0] if source is None else embeds[0] - embeds[1])
        latents = self.invert([image], num_steps=how.inversion_steps, fit=how.fit, **how.running)
        direction = direction * np.linalg.norm(latents.image_embeds[0])  # 1, unless CLIP's are of any norm
        thetas = np.linspace(0, theta, frames)
        return self._drawn(
            np.stack([slerp(latents.image_embeds[0], direction, at) for at in thetas]),
            [f"theta {at:.2f}" for at in thetas],
            how,
            own=how.faithful | dict(x_T=np.repeat(latents.x_T, frames, axis=0)),
        )

    def image_to_image(
        self,
        image,
        caption: str,
        *,
        strength: float = 0.7,
        n: int = 1,
        negative: str | None = None,
        **drawing,
    ):
        """`n` pictures of `caption` that begin as `image`, noised as far as `strength` of the steps go."""
        _check_strength(strength)
        how = Drawing(**drawing)
        square = square_picture(image, self.image_size, how.fit)
        embeds, timings = self.sample_prior([caption], seed=how.seed, n=n, **how.running)
        return self._drawn(
            embeds,
            [caption] * n,
            how,
            captions=[caption] * n,
            own=dict(
                num_steps=how.num_steps,
                guidance_scale=how.guidance_scale,
                init=np.repeat(self.base_pictures([square]), n, axis=0),
                strength=strength,
                negative=negative,
            ),
            timings=timings,
        )

    def inpaint(
        self,
        image,
        mask,
        caption: str,
        *,
        n: int = 1,
        resample: int | None = None,
        negative: str | None = None,
        **drawing,
    ):
        """`n` pictures that show `caption`, equal to `image` where `mask` is not white and opaque.

        mask: what `pictures.repaint_mask` takes, of the picture's size: a picture, or bool or uint8 [H, W].
        caption says what the whole picture shows. Every step is taken `resample` times, so that the new fits
        the old: once by a decoder that was trained to see the old, else RESAMPLE times, unless given. What is
        kept is unchanged in the finished picture, at its full size.
        """
        how = Drawing(**drawing)
        image = whole_picture(image)
        repaint = square_mask(mask, self.image_size, image.shape[1::-1], how.fit)
        square = square_picture(image, self.image_size, how.fit)
        if resample is None:
            resample = 1 if self.cascade.stage("decoder").inpaint else RESAMPLE
        embeds, timings = self.sample_prior([caption], seed=how.seed, n=n, **how.running)
        return self._drawn(
            embeds,
            [caption] * n,
            how,
            captions=[caption] * n,
            # With nothing to fit to, this is drawing a caption.
            own=dict(
                num_steps=how.num_steps,
                guidance_scale=how.guidance_scale,
                resample=1 if repaint.all() else resample,
                negative=negative,
            ),
            known=None if repaint.all() else (square, repaint),
            timings=timings,
        )

    def outpaint(self, image, caption: str, *, scale: float = 0.5, fit: str = "crop", **settings):
        """Draw around `image`, which takes the middle `scale` of the side; the rest is as for `inpaint`."""
        from PIL import Image

        if not 0 < scale < 1:
            raise ValueError(f"scale {scale} must lie between 0 and 1: the share of the side that is kept")
        side = self.image_size
        inner = max(1, round(scale * side))
        canvas, mask = Image.new("RGB", (side, side), "grey"), np.ones((side, side), bool)
        corner = (side - inner) // 2
        canvas.paste(Image.fromarray(square_picture(image, inner, fit)), (corner, corner))
        mask[corner : corner + inner, corner : corner + inner] = False
        return self.inpaint(canvas, mask, caption, **settings)

    def reconstruct(
        self,
        image,
        components: Sequence[int],
        **drawing,
    ):
        """What CLIP sees in `image`, drawn from the first k principal components of its embedding, each k.

        All from one noise (section 4 of the paper). The components are those of an autoregressive prior;
        raises ValueError for a model without one.
        """
        if "components" not in self.cascade.params("prior").get("stats", {}):
            raise ValueError(
                f"model {self.name!r} has no principal components: they come with an autoregressive prior"
            )
        stats = {name: np.asarray(x, np.float64) for name, x in self.cascade.params("prior")["stats"].items()}
        most = len(stats["components"])
        for k in components:
            if not 1 <= k <= most:
                raise ValueError(f"{k} components are not possible: give 1 .. {most}")
        how = Drawing(**drawing)
        square = square_picture(image, self.image_size, how.fit)
        z = self.encode_image([square], how.batch_size)[0] - stats["mean"]
        bases = [stats["components"][:k] for k in components]
        embeds = np.stack([stats["mean"] + base.T @ (base @ z) for base in bases]).astype(np.float32)
        own = dict(num_steps=how.num_steps, method="ddim", eta=0.0, guidance_scale=how.guidance_scale)
        return self._drawn(
            embeds,
            [f"{k} components" for k in components],
            how,
            numbers=[0] * len(embeds),
            own=own,
        )

    def upscale(
        self,
        image,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        tile: int | None = None,
        caption: str | None = None,
        progress=None,
    ) -> np.ndarray:
        """A picture of any size, enlarged by the last upsampler: uint8 [s H, s W, 3].

        tile: side of the windows that are drawn at a time, in finished pixels; by default the whole picture
        where it is no larger than in training. caption: what the picture shows, for an upsampler that reads
        it; None for the null caption.
        """
        name = self.cascade.upsamplers[-1] if self.cascade.upsamplers else None
        if name is None:
            raise ValueError(f"model {self.name!r} has no upsampler")
        low_res = whole_picture(image)
        stage = self.cascade.stage(name)
        own = settings.of_stage(self.cascade, name, num_steps=num_steps, tile=tile)
        if max(low_res.shape) > stage.low_res_size:
            own["tile"] = own["tile"] or stage.crop_size
        task = tasks.upsampler_task(self.cascade, name, seed, own, low_res.shape)
        rows = {"low_res": low_res[None], "number": np.zeros(1, np.uint32)}
        rows |= self._told(name, None if caption is None else [caption], 1)
        images, _ = self.cascade.run(task, rows, batch_size=1, progress=progress)
        return images[0]

    def rank(self, images, caption: str, batch_size: int | None = None) -> np.ndarray:
        """The order [N] of pictures by how close CLIP finds them to `caption`, the closest first."""
        (text, _), _ = self.encode_text([caption], batch_size)
        return np.argsort(-(unit(self.encode_image(images, batch_size)) @ text[0]), kind="stable")

    def _check_reads_embeds(self, action: str) -> None:
        if not self.cascade.reads_embeds:
            raise ValueError(
                f"{action} needs CLIP's image embeddings, and the decoder of model {self.name!r} reads none: "
                "image_to_image and inpaint work with it"
            )

    def _drawn(
        self,
        embeds: np.ndarray,
        labels: Sequence[str],
        how: Drawing,
        *,
        captions: Sequence[str] | None = None,
        numbers: Sequence[int] | None = None,
        own: dict,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        timings: dict | None = None,
    ):
        """The `Result` of decoding `embeds` with the keywords `own` of `decode`, and enlarging."""
        numbers = tuple(range(len(embeds))) if numbers is None else tuple(numbers)
        common = dict(seed=how.seed, numbers=numbers, **how.running)
        timings = dict(timings or {})
        at_base = None
        if known is not None:
            square, repaint = known
            size = self.cascade.stage("decoder").image_size
            at_base = (self.base_pictures([square])[0], shrink_mask(repaint, size))
        base, timings["decoder"] = self.decode(embeds, captions, known=at_base, **own, **common)
        if how.seen is not None:
            how.seen("decoder", base)
        images = base
        if how.upsample:
            images, more = self.upsample(base, captions, known=known, seen=how.seen, **common)
            timings |= more
        used = {
            "decoder": {name: value for name, value in own.items() if isinstance(value, int | float | str)}
        }
        return self._result(labels, numbers, how.seed, embeds, base, images, used, timings)


def _check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} must lie in 0 .. 1: the share of the steps that is taken")

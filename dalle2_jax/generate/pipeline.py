"""UnCLIP: a model directory that draws captions through the whole cascade.

    caption --CLIP text--> text embedding --prior--> image embedding --decoder--> base --upsamplers--> picture

A model whose decoder reads no image embedding (GLIDE, ADM) begins with the decoder.
Each stage samples in one compiled function that holds one `lax.scan` (see tasks.py). The same seed and
caption give the same picture whatever else is drawn with it. Nothing here needs TensorFlow.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.shards import encodable
from dalle2_jax.generate import tasks
from dalle2_jax.generate.cascade import BASE_STAGES, GUIDES, Cascade, Progress, Seen, Timing
from dalle2_jax.generate.editing import Editing, unit
from dalle2_jax.generate.pictures import shrink_mask, square_picture
from dalle2_jax.generate.settings import of_stage, of_upsamplers, resolve, split
from dalle2_jax.runtime import processes

MAX_CAPTION = 1000


@dataclasses.dataclass(frozen=True)
class Result:
    """Drawn pictures, n of each caption side by side.

    Attributes:
      captions: N captions, one a picture.
      numbers: N picture numbers, 0 .. n-1 within a caption unless others were asked for; with seed and
        settings they fix the picture.
      seed: the seed of all of them.
      image_embeds: [N, E] float32, the prior's, in CLIP's own scale; [N, 0] where the decoder reads none.
      base: uint8 [N, h, w, 3], the decoder's pictures.
      images: uint8 [N, H, W, 3], after the last upsampler (`base` if there is none).
      settings: stage -> what it was run with, JSON values.
      timings: stage -> Timing, in the order in which they ran; 'text' is CLIP reading the captions.
    """

    captions: tuple[str, ...]
    numbers: tuple[int, ...]
    seed: int
    image_embeds: np.ndarray
    base: np.ndarray
    images: np.ndarray
    settings: dict
    timings: dict[str, Timing]


def check_captions(captions: Sequence[str]) -> None:
    """Raise ValueError for no captions, an empty one, or one of more than MAX_CAPTION characters."""
    if isinstance(captions, str):
        raise ValueError("captions must be a list of texts, not one text")
    if not len(captions):
        raise ValueError("give at least one caption")
    for i, caption in enumerate(captions, 1):
        if not isinstance(caption, str):
            raise ValueError(f"caption {i} is {caption!r}: captions must be texts")
        if not caption.strip():
            raise ValueError(f"caption {i} is empty: say what to draw")
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError(f"caption {i}, {caption!r}, holds half a character: write it in UTF-8")
        if len(caption) > MAX_CAPTION:
            raise ValueError(f"caption {i} has {len(caption)} characters: at most {MAX_CAPTION} are allowed")


def _repeated(captions: Sequence[str], n: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(each caption n times, the numbers 0 .. n-1 of each)."""
    return tuple(caption for caption in captions for _ in range(n)), tuple(range(n)) * len(captions)


def _check_counts(what: str, count: int, **given: Sequence | None) -> None:
    """Raises ValueError for something given, by its name, of which there is not one for each."""
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{count} {what} need as many {name}, got {len(values)}")


class UnCLIP(Editing):
    """A model that draws. Make one with `UnCLIP.load`."""

    def __init__(self, cascade: Cascade):
        self.cascade = cascade

    @staticmethod
    def load(
        model_dir: str | os.PathLike | None = None,
        dtype: str | None = None,
        mesh=None,
        low_memory: bool = False,
    ) -> "UnCLIP":
        """Open a model directory; weights are read when a stage is first used.

        Args:
          model_dir: the directory, or hf://OWNER/NAME@COMMIT; None for the small model that comes with the
            package.
          dtype: compute type of the networks, 'float32' or 'bfloat16'; None: as trained.
          mesh: devices that share the pictures of a batch; None: all of them.
          low_memory: keep weights in the type that they are stored in, and those of one stage at a time on
            the devices; they are read again whenever its turn comes.

        Raises:
          FileNotFoundError: no such directory, or a part of it is missing.
          ValueError: a part is damaged, or the stages do not fit together.
        """
        return UnCLIP(Cascade.open(model_dir, dtype, mesh, low_memory))

    def __call__(self, captions: Sequence[str], **options) -> Result:
        """`text_to_image`."""
        return self.text_to_image(captions, **options)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.cascade.name

    @property
    def image_size(self) -> int:
        """Side of the finished picture."""
        return self.cascade.stage((("decoder",) + self.cascade.upsamplers)[-1]).image_size

    def cut_captions(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption that is longer than a stage reads, saying what is left of it; one for all
        where nothing reads them."""
        stages = self.cascade.stages
        reads = {name: getattr(stages.get(name), "context_length", None) for name in BASE_STAGES}
        if not any(reads.values()):
            told = any(getattr(stage, "num_classes", 0) for stage in stages.values())
            return [] if told else [f"model {self.name!r} reads no captions: it draws what it was trained on"]
        # A token stands for at least one byte, a character for at most four.
        lengths = self.cascade.tokenizer(4 * MAX_CAPTION + 2)(list(captions))[1].sum(axis=1)
        lines = []
        for i, (caption, length) in enumerate(zip(captions, lengths, strict=True), 1):
            short = {name: limit for name, limit in reads.items() if limit and limit < length}
            if short:
                name = min(short, key=short.get)
                tokenizer = self.cascade.tokenizer(short[name])
                read = tokenizer.decode(tokenizer([caption])[0][0])
                lines.append(
                    f"caption {i} is too long by {length - short[name]} tokens: {name} reads only {read!r}"
                )
        return lines

    def settings(self, **asked) -> dict[str, dict]:
        """stage -> what `text_to_image` runs it with for these keywords of `settings.SETTINGS`."""
        return resolve(self.cascade, **asked)

    def encode_text(
        self, captions: Sequence[str], batch_size: int | None = None, progress: Progress | None = None
    ) -> tuple[tuple[np.ndarray, np.ndarray], Timing]:
        """((text_embed [N, E], text_states [N, L, D]) of captions by CLIP, float32; Timing)."""
        check_captions(captions)
        return self._encode_text(captions, batch_size, progress)

    def _encode_text(self, captions, batch_size=None, progress=None):
        """`encode_text` of any texts, "" too."""
        tokens, token_mask = self._tokens("clip", captions)
        rows = {"tokens": tokens, "token_mask": token_mask}
        return self.cascade.run(tasks.text_task(self.cascade), rows, batch_size=batch_size, progress=progress)

    def _tokens(self, name: str, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, token_mask) of captions at the context length of a stage."""
        return self.cascade.tokenizer(self.cascade.stage(name).context_length)(list(captions))

    def encode_image(self, images, batch_size: int | None = None) -> np.ndarray:
        """Image embeddings [N, E] float32 in CLIP's own scale (unit norm, unless `unit_embeds` is off).

        Args:
          images: uint8 [N, H, W, 3], or a sequence of PIL pictures and uint8 [H, W, 3] of any sizes; each is
            resized bicubically to CLIP's size and its central square taken, as in training.
          batch_size: pictures at a time.
        """
        size = self.cascade.stage("clip").image_size
        small = np.stack([square_picture(image, size, halve=False) for image in images])
        return self.cascade.run(tasks.image_task(self.cascade), {"image": small}, batch_size=batch_size)[0]

    def sample_prior(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        n: int = 1,
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        return_candidates: bool = False,
        **own,
    ) -> tuple[np.ndarray, dict[str, Timing]]:
        """(n image embeddings of each caption, [N, E] float32 in CLIP's own scale; stage -> Timing).

        [N, 0] for a decoder that reads none. numbers: instead of n, one a caption, that of the embedding to
        draw for it. return_candidates: all that a diffusion prior drew for each, [N, num_candidates, E], none
        chosen. own: instead of the prior's own settings, its names of them: num_steps, guidance_scale, ...

        Raises ValueError for captions that are not allowed, and for numbers of which there is not one a
        caption.
        """
        _check_counts("captions", len(captions), numbers=numbers)
        if not self.cascade.reads_embeds:
            return np.zeros((len(captions) * (n if numbers is None else 1), 0), np.float32), {}
        check_captions(captions)
        if numbers is None:
            captions, numbers = _repeated(captions, n)
        own = of_stage(self.cascade, "prior", **own)
        own |= {"return_candidates": True} if return_candidates else {}
        (text_embed, text_states), text_timing = self.encode_text(captions, batch_size, progress)
        tokens, token_mask = self._tokens("prior", captions)
        known = dict(tokens=tokens, token_mask=token_mask, text_embed=text_embed, text_states=text_states)
        task = tasks.prior_task(self.cascade, seed, own)
        rows = {name: value for name, value in known.items() if name in task.rows}
        rows["number"] = np.asarray(numbers)
        embeds, timing = self.cascade.run(task, rows, batch_size=batch_size, progress=progress)
        return embeds, {"text": text_timing, "prior": timing}

    def decode(
        self,
        image_embeds: np.ndarray,
        captions: Sequence[str] | None = None,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        negative: str | None = None,
        x_T: np.ndarray | None = None,
        init: np.ndarray | None = None,
        strength: float = 1.0,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        resample: int = 1,
        return_path: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **own,
    ) -> tuple[np.ndarray, Timing]:
        """(base pictures uint8 [N, h, w, 3] of image embeddings, Timing).

        Args:
          image_embeds: [N, E] in CLIP's own scale; [N, 0] for a decoder that reads none.
          captions: N of them, or None for the null caption.
          seed, numbers: picture i has the key of (seed, numbers[i]); by default 0 .. N-1.
          negative: a caption that guidance leads away from.
          x_T: noise [N, h, w, 3] to start from, such as `invert` finds.
          init, strength: base pictures uint8 [N, h, w, 3], and the share of the steps taken from there.
          known: a base picture uint8 [h, w, 3] and where to repaint it, bool [h, w]; the rest comes back.
          resample: how often each step is taken, see `diffusion.sampling`.
          return_path: the pictures after every step instead, uint8 [N, steps, h, w, 3].
          batch_size, progress: see `text_to_image`.
          own: instead of the decoder's own settings, its names of them (num_steps, guidance_scale, ...), and
            how strongly guides of the model steer to the captions.
        """
        decoder = self.cascade.stage("decoder")
        image_embeds = np.asarray(image_embeds, np.float32)
        if image_embeds.ndim != 2 or image_embeds.shape[1] != decoder.embed_dim:
            raise ValueError(f"image_embeds must be [N, {decoder.embed_dim}], not {list(image_embeds.shape)}")
        count = len(image_embeds)
        _check_counts("image embeddings", count, captions=captions, numbers=numbers)
        numbers = np.arange(count) if numbers is None else np.asarray(numbers)
        how = of_stage(self.cascade, "decoder", **own)
        given = {name: value for name, value in (("x_T", x_T), ("init", init)) if value is not None}
        if known is not None:
            given["known"], given["repaint"] = (np.repeat(np.asarray(x)[None], count, 0) for x in known)
        if negative is not None:
            check_captions([negative])
            if how["guidance_scale"] == 1 or decoder.context_length is None:
                raise ValueError(
                    "a negative caption needs a decoder that reads captions, and guidance above 1"
                )
            text = self._told("decoder", [negative] * count, count, batch_size)
            given |= {f"negative_{name}": value for name, value in text.items()}
        how |= {"strength": strength} if strength != 1 else {}
        how |= {"resample": resample} if resample != 1 else {}
        how |= {"return_path": True} if return_path else {}
        task = tasks.decoder_task(self.cascade, seed, how, tuple(given))
        rows = {"number": numbers} | given | self._guide_rows(how, captions, batch_size)
        rows |= {"image_embed": image_embeds} if decoder.embed_dim else {}
        rows |= self._told("decoder", captions, count, batch_size)
        return self.cascade.run(task, rows, batch_size=batch_size, progress=progress)

    def explain(self, caption: str, *, seed: int = 0, progress: Progress | None = None, **asked) -> dict:
        """What happens on the way from a caption to picture 0 of `text_to_image` with the same arguments.

        Returns a dict of
          tokens: the texts of the tokens that CLIP reads, as many as it reads of the caption.
          text_embed: [E] float32, what CLIP made of the caption.
          candidates: [k, E] float32, the embeddings that the prior drew; cosines: [k], theirs with the text
            embedding; kept: which is the largest.
          path: uint8 [n, h, w, 3], the base picture after each of the decoder's steps.
          stages: name -> uint8 [h, w, 3], what the decoder and each upsampler drew.

        Raises ValueError for a model without a CLIP and a prior.
        """
        check_captions([caption])
        if not self.cascade.reads_embeds:
            raise ValueError("only a model with a CLIP and a prior can be explained")
        settings, own = self.settings(**asked), split(asked)
        tokens, mask = self._tokens("clip", [caption])
        tokenizer = self.cascade.tokenizer(self.cascade.stage("clip").context_length)
        pieces = [tokenizer.decode(tokens[0][i : i + 1]) for i in np.flatnonzero(mask[0])]
        common = dict(seed=seed, progress=progress)
        candidates = settings["prior"].get("num_candidates", 1)
        embed, _ = self.sample_prior([caption], **common, **own["prior"])
        drawn = embed
        if "num_steps" in settings["prior"] and candidates > 1:
            drawn, _ = self.sample_prior([caption], **common, **own["prior"], return_candidates=True)
            drawn = drawn[0]
        (text_embed, _), _ = self.encode_text([caption])
        cosines = unit(drawn) @ unit(text_embed[0])
        path, _ = self.decode(embed, [caption], return_path=True, **common, **own["decoder"])
        stages = {"decoder": path[:, -1]}
        self.upsample(path[:, -1], [caption], seen=stages.__setitem__, **common, **own["upsampler"])
        return dict(
            tokens=[piece for piece in pieces if piece],
            text_embed=text_embed[0],
            candidates=drawn,
            cosines=cosines,
            kept=int(cosines.argmax()),
            path=path[0],
            stages={name: images[0] for name, images in stages.items()},
        )

    def _told(
        self, name: str, captions: Sequence[str] | None, count: int, batch_size: int | None = None
    ) -> dict[str, np.ndarray]:
        """What the decoder or an upsampler reads of captions, or of `count` null ones; {} if nothing."""
        stage = self.cascade.stage(name)
        specs = tasks.told_specs(stage)
        rows = {field: np.zeros((count, *spec.shape), spec.dtype) for field, spec in specs.items()}
        if "label" in rows:
            if captions is None and not getattr(stage, "label_drop", 0):
                raise ValueError(f"the {name} draws classes: give a caption that names one")
            rows["label"] = np.full(count, -1) if captions is None else self.labels(captions, name)
        if captions is None and getattr(stage, "null_tokens", 0):
            captions = [""] * count  # which is the null caption of decoders that have tokens of one
        if captions is not None and "token_mask" in rows:
            known = dict(zip(("tokens", "token_mask"), self._tokens(name, captions), strict=True))
            if "text_states" in rows:
                (known["text_embed"], known["text_states"]), _ = self._encode_text(captions, batch_size)
            rows |= {field: value for field, value in known.items() if field in rows}
        return rows

    def _guide_rows(self, own: dict, captions: Sequence[str] | None, batch_size: int | None) -> dict:
        """What the guides of these settings are to steer to: a text embedding, a label a caption."""
        used = [guide for guide in GUIDES if guide in own]
        if used and captions is None:
            raise ValueError(f"{' and '.join(used)} steer to captions: give them, or leave the guide out")
        rows = {}
        if "noisy_clip" in used:
            tokens, token_mask = self._tokens("noisy_clip", captions)
            task = tasks.text_task(self.cascade, "noisy_clip")
            known = {"tokens": tokens, "token_mask": token_mask}
            (rows["guide_text_embed"], _), _ = self.cascade.run(task, known, batch_size=batch_size)
        if "classifier" in used:
            rows["guide_label"] = self.labels(captions)
        return rows

    def labels(self, captions: Sequence[str], name: str = "classifier") -> np.ndarray:
        """The class [N] int32 of the classifier, or of stage `name`, that each caption names.

        -1 where a caption names not one, for a stage that was trained without classes, too; ValueError for
        others.
        """
        from dalle2_jax.data.pipeline import label_of

        classes = self.cascade.configs[name]["data"]["classes"]
        labels = [label_of(caption, classes) for caption in captions]
        for caption, label in zip(captions, labels, strict=True):
            if label < 0 and not getattr(self.cascade.stage(name), "label_drop", 0):
                leave = ", or leave classifier out" if name == "classifier" else ""
                raise ValueError(
                    f"caption {caption!r} does not name exactly one class of the {name}, such as "
                    f"{', '.join(map(repr, classes[:3]))}: name one{leave}"
                )
        return np.array(labels, np.int32)

    def _check_classes(self, settings: dict, captions: Sequence[str]) -> None:
        """Raise ValueError for a caption that names no class where a stage or the classifier needs one."""
        told = [name for name in settings if getattr(self.cascade.stage(name), "num_classes", 0)]
        for name in told + ["classifier"] * ("classifier" in settings.get("decoder", {})):
            self.labels(captions, name)

    def upsample(
        self,
        images: np.ndarray,
        captions: Sequence[str] | None = None,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        seen: Seen | None = None,
        **own,
    ) -> tuple[np.ndarray, dict[str, Timing]]:
        """(pictures of the decoder's size, uint8 [N, h, w, 3], through all upsamplers; stage -> Timing).

        captions: N of them for upsamplers that read them, None for the null caption. known: a finished
        picture uint8 [H, W, 3] and where to repaint it, bool [H, W]; the rest comes back. seen: called with
        the pictures of every upsampler as it finishes. own: as for `decode`, for every upsampler; of
        `num_steps` there is one number for each.

        Raises ValueError for other pictures than those, and for captions or numbers that are not as many.
        """
        own = of_upsamplers(self.cascade, **own)
        images, timings = np.asarray(images), {}
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 [N, h, w, 3], not {images.dtype} {list(images.shape)}")
        _check_counts("pictures", len(images), captions=captions, numbers=numbers)
        numbers = np.arange(len(images)) if numbers is None else np.asarray(numbers)
        for name in self.cascade.upsamplers:
            task = tasks.upsampler_task(
                self.cascade, name, seed, own[name], images.shape[1:], keeps=known is not None
            )
            rows = {"low_res": images, "number": numbers}
            rows |= self._told(name, captions, len(images), batch_size)
            if known is not None:
                size = self.cascade.stage(name).image_size
                at_size = square_picture(known[0], size), shrink_mask(known[1], size)
                rows["known"], rows["repaint"] = (np.repeat(x[None], len(images), 0) for x in at_size)
            images, timings[name] = self.cascade.run(task, rows, batch_size=batch_size, progress=progress)
            if seen is not None:
                seen(name, images)
        return images, timings

    def text_to_image(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        n: int = 1,
        numbers: Sequence[int] | None = None,
        upsample: bool = True,
        batch_size: int | None = None,
        progress: Progress | None = None,
        seen: Seen | None = None,
        **asked,
    ) -> Result:
        """Draw n pictures of each caption.

        Args:
          captions: texts of at most MAX_CAPTION characters.
          seed: 0 .. 2**32 - 1; with a picture's number within its caption, all of its randomness.
          n: pictures a caption.
          numbers: instead of n, one a caption, that of the picture to draw for it.
          upsample: False stops at the base pictures.
          batch_size: pictures at a time, rounded up to a multiple of the devices; None: 8, or one a device.
          progress: called as progress(stage, pictures done, pictures in all, seconds in this stage).
          seen: called as seen(stage, pictures) when the decoder and each upsampler have finished, with the
            pictures of this process.
          asked: any of `settings.SETTINGS` (guidance_scale, decoder_steps, prior_method, ...) instead of the
            model's own.

        Of several processes each draws its share of the pictures, and every one gets all of them; the
        timings are its own.

        Raises:
          ValueError: for captions or settings that are not allowed, before anything is computed.
        """
        check_captions(captions)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} must lie in 0 .. {2**32 - 1}")
        if n < 1:
            raise ValueError(f"n {n} must be 1 or more pictures a caption")
        _check_counts("captions", len(captions), numbers=numbers)
        settings, own, timings = self.settings(**asked), split(asked), {}
        self._check_classes(settings, captions)  # before anything is computed
        if numbers is None:
            captions, numbers = _repeated(captions, n)
        common = dict(seed=seed, batch_size=batch_size, progress=progress)

        def draw(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            texts = [captions[i] for i in rows]
            self._prepare(settings, len(rows), seed, upsample, batch_size)
            of_rows = common | dict(numbers=[numbers[i] for i in rows])
            image_embeds, more = self.sample_prior(texts, **of_rows, **own["prior"])
            timings.update(more)
            base, timings["decoder"] = self.decode(image_embeds, texts, **of_rows, **own["decoder"])
            if seen is not None:
                seen("decoder", base)
            if not upsample:
                return image_embeds, base, base
            images, more = self.upsample(base, texts, **of_rows, seen=seen, **own["upsampler"])
            timings.update(more)
            return image_embeds, base, images

        drawn = processes.in_shares(draw, len(captions))
        used = {name: values for name, values in settings.items() if name in timings}
        return self._result(captions, numbers, seed, *drawn, used, timings)

    def prepare(self, *, n: int = 1, upsample: bool = True, batch_size: int | None = None, **asked) -> None:
        """Begins to compile, beside other work, what `text_to_image` of a caption with these needs."""
        self._prepare(self.settings(**asked), n, 0, upsample, batch_size)

    def _prepare(self, settings: dict, count: int, seed: int, upsample: bool, batch_size) -> None:
        # All stages are compiled at once, the later ones while the earlier ones run.
        prepare = self.cascade.prepare
        if "prior" in settings:
            prepare(tasks.text_task(self.cascade), count, batch_size)
            prepare(tasks.prior_task(self.cascade, seed, settings["prior"]), count, batch_size)
        prepare(tasks.decoder_task(self.cascade, seed, settings["decoder"]), count, batch_size)
        side = self.cascade.stage("decoder").image_size
        for name in self.cascade.upsamplers if upsample else ():
            prepare(
                tasks.upsampler_task(self.cascade, name, seed, settings[name], (side, side, 3)),
                count,
                batch_size,
            )
            side = self.cascade.stage(name).image_size

    def _result(self, captions, *rest) -> Result:
        return Result(tuple(map(encodable, captions)), *rest)  # to be written into files

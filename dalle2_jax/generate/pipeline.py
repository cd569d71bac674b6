"""Pipeline: a model directory that draws, encodes, and runs the steps of any action of its system.

Each step samples in one compiled function that holds one `lax.scan` (see tasks.py). The same seed and caption
give the same picture whatever else is drawn with it. Nothing here needs TensorFlow.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from dalle2_jax.data.shards import encodable
from dalle2_jax.generate import captions as texts
from dalle2_jax.generate import tasks
from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.engine import Engine, Progress, Seen, Timing
from dalle2_jax.generate.pictures import shrink_mask, square_picture
from dalle2_jax.generate.settings import resolve
from dalle2_jax.runtime import processes
from dalle2_jax.systems.step import Step


@dataclasses.dataclass(frozen=True)
class Result:
    """Drawn pictures, n of each caption side by side.

    Attributes:
      captions: N captions, one a picture; "" for a model that reads none.
      numbers: N picture numbers, 0 .. n-1 within a caption unless others were asked for; with seed and
        settings they fix the picture.
      seed: the seed of all of them.
      image_embeds: [N, E] float32, the prior's, in CLIP's own scale; [N, 0] where no step reads them.
      base: uint8 [N, h, w, 3], the first step's pictures.
      images: uint8 [N, H, W, 3], after the last upsampler (`base` if there is none).
      settings: step -> its settings, JSON values.
      timings: step -> Timing, in the order in which they ran; 'text' is CLIP reading the captions.
    """

    captions: tuple[str, ...]
    numbers: tuple[int, ...]
    seed: int
    image_embeds: np.ndarray
    base: np.ndarray
    images: np.ndarray
    settings: dict
    timings: dict[str, Timing]

    def __post_init__(self):
        object.__setattr__(self, "captions", tuple(map(encodable, self.captions)))  # to be written into files


@dataclasses.dataclass(frozen=True)
class Running:
    """How steps run, whatever they draw.

    Attributes:
      seed: the same seed gives the same pictures.
      batch_size: examples at a time, rounded up to a multiple of the devices; None: 8, or one a device.
      progress: called as progress(step, examples done, examples in all, seconds in this step).
      seen: called as seen(step, pictures) when a step has drawn pictures.
    """

    seed: int = 0
    batch_size: int | None = None
    progress: Progress | None = None
    seen: Seen | None = None


def repeated(captions: Sequence[str], n: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(each caption n times, the numbers 0 .. n-1 of each)."""
    return tuple(caption for caption in captions for _ in range(n)), tuple(range(n)) * len(captions)


def check_counts(what: str, count: int, **given: Sequence | None) -> None:
    """Raise ValueError for given values, by their name, that are not as many as `what`."""
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{count} {what} need as many {name}, got {len(values)}")


class Pipeline:
    """A model that draws. Make one with `Pipeline.load`.

    Attributes:
      engine: the opened model directory: stages, configs, weights.
      actions: what its stages can do together: action -> its steps.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.actions = engine.system.actions(engine.stages)

    @classmethod
    def load(
        cls,
        model_dir: str | os.PathLike | None = None,
        dtype: str | None = None,
        mesh=None,
        low_memory: bool = False,
    ) -> "Pipeline":
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
        return cls(Engine.open(model_dir, dtype, mesh, low_memory))

    def __call__(self, captions: Sequence[str] = (), **options) -> Result:
        """`text_to_image`."""
        return self.text_to_image(captions, **options)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.name

    def steps(self, action: str) -> tuple[Step, ...]:
        """The steps of an action; ValueError says why the model cannot do it, and what it can."""
        try:
            return self.engine.system.steps(action, self.engine.stages)
        except ValueError as error:
            can = ", ".join(self.actions) or "nothing"
            raise ValueError(f"model {self.name!r} cannot do {action}: {error}; it can do {can}") from None

    @property
    def image_size(self) -> int:
        """Side of the finished picture."""
        action = "redraw" if "redraw" in self.actions else "draw"
        return self.engine.stage(self.steps(action)[-1].stage).image_size

    @property
    def reads_captions(self) -> bool:
        """Whether a drawn picture depends on its caption."""
        steps = self.steps("draw")
        return any(set(step.specs(self.engine.stage(step.stage))) & set(texts.FIELDS) for step in steps)

    def cut_captions(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption that is longer than a stage reads, with the part that it reads; one for all
        where nothing reads them."""
        if "draw" in self.actions and not self.reads_captions:
            return [f"model {self.name!r} reads no captions: it draws what it was trained on"]
        steps = self.actions.get("draw") or self.actions.get("encode_text", ())
        return texts.cut_captions(self.engine, list(dict.fromkeys(step.stage for step in steps)), captions)

    def settings(self, **asked) -> dict[str, dict]:
        """step -> what `text_to_image` runs it with for these keywords of `settings.SETTINGS`."""
        return resolve(self.engine, self.steps("draw"), **asked)

    def encode_text(
        self, captions: Sequence[str], batch_size: int | None = None, progress: Progress | None = None
    ) -> tuple[tuple[np.ndarray, np.ndarray], Timing]:
        """((text_embed [N, E], text_states [N, L, D]) of captions by CLIP, float32; Timing)."""
        check_captions(captions)
        (step,) = self.steps("encode_text")
        return self._encode_text(step, captions, Running(0, batch_size, progress))

    def _encode_text(self, step: Step, captions: Sequence[str], how: Running):
        """`encode_text` of any texts, "" too."""
        made, timings = self.run((step,), {"caption": captions}, {}, how)
        return tuple(made[f"{step.name}.{field}"] for field in step.writes), timings[step.name]

    def encode_image(self, images, batch_size: int | None = None) -> np.ndarray:
        """Image embeddings [N, E] float32 in CLIP's own scale (unit norm, unless `unit_embeds` is off).

        Args:
          images: uint8 [N, H, W, 3], or a sequence of PIL pictures and uint8 [H, W, 3] of any sizes; each is
            resized bicubically to CLIP's size and its central square taken, as in training.
          batch_size: pictures at a time.
        """
        (step,) = self.steps("encode_image")
        size = self.engine.stage(step.stage).image_size
        small = np.stack([square_picture(image, size, halve=False) for image in images])
        made, _ = self.run((step,), {"image.image": small}, {}, Running(batch_size=batch_size))
        return made["image.image_embed"]

    def run(
        self, steps: Sequence[Step], batch: Mapping, settings: Mapping[str, dict], how: Running
    ) -> tuple[dict, dict[str, Timing]]:
        """(`batch` with the outputs of steps, step -> Timing).

        Args:
          steps: of an action, or some of them.
          batch: what is given: 'caption', N texts, or None for the null caption; 'number', the numbers of the
            pictures; 'STEP.FIELD', arrays [N, ...] for a step's field, or the output of an earlier step;
            'known', a picture uint8 [H, W, 3] and where to repaint it, bool [H, W], of any size; 'negative',
            a caption that guidance leads away from.
          settings: step -> keywords of its operation.
          how: seed, batch size, callbacks.
        """
        batch, timings = dict(batch), {}
        for step in steps:
            own = settings.get(step.name, {}) | dict(step.fixed)
            examples = self._examples(step, batch, own, how)
            specs = tasks.specs(self.engine, step, own, examples)
            task = tasks.make_task(self.engine, step, own, specs, how.seed)
            made, timings[step.name] = self.engine.run(
                task, examples, batch_size=how.batch_size, progress=how.progress
            )
            batch |= {f"{step.name}.{field}": value for field, value in made.items()}
            if how.seen is not None and step.fold is not None and "image" in made:
                how.seen(step.name, made["image"])
        return batch, timings

    def _examples(self, step: Step, batch: dict, settings: dict, how: Running) -> dict[str, np.ndarray]:
        """Arrays [N, ...] of all that a step reads: of the batch, or made from the captions."""
        stage, captions, found, missing = self.engine.stage(step.stage), batch.get("caption"), {}, []
        needed = step.specs(stage)
        for field in (*needed, *step.optional):
            sources = [name for name in (f"{step.name}.{field}", step.bind.get(field)) if name in batch]
            if sources:
                found[field] = np.asarray(batch[sources[0]])
            elif field in needed:
                missing.append(field)
        counted = batch.get("number", captions)
        count = len(next(iter(found.values())) if counted is None else counted)
        found |= self.conditioning(step, missing, captions, count, how)
        if step.fold is not None:
            found["number"] = np.asarray(batch["number"])
        if "known" in step.optional and batch.get("known") is not None:
            picture, repaint = batch["known"]
            at_size = square_picture(picture, stage.image_size), shrink_mask(repaint, stage.image_size)
            found["known"], found["repaint"] = (np.repeat(x[None], count, 0) for x in at_size)
        if "negative" in step.optional and batch.get("negative") is not None:
            check_captions([batch["negative"]])
            if settings["guidance_scale"] == 1 or stage.context_length is None:
                raise ValueError(
                    f"a negative caption needs a {step.name} that reads captions, and guidance above 1"
                )
            fields = [field for field in needed if field in texts.FIELDS]
            negative = self.conditioning(step, fields, [batch["negative"]] * count, count, how)
            found |= {f"negative_{field}": value for field, value in negative.items()}
        return found | self._guide_examples(step, settings, captions, how)

    def conditioning(
        self, step: Step, fields: Sequence[str], captions: Sequence[str] | None, count: int, how: Running
    ) -> dict[str, np.ndarray]:
        """These fields of a step, made from captions, or from `count` null captions."""
        name, stage = step.stage, self.engine.stage(step.stage)
        specs = step.specs(stage)
        for field in fields:
            if field not in texts.FIELDS:
                raise ValueError(f"{step.name} reads {field}, which nothing gives it")
        found = {field: np.zeros((count, *specs[field].shape), specs[field].dtype) for field in fields}
        if "label" in found:
            if captions is None and not getattr(stage, "label_drop", 0):
                raise ValueError(f"the {name} draws classes: give a caption that names one")
            found["label"] = np.full(count, -1) if captions is None else self.labels(captions, name)
        if captions is None and getattr(stage, "null_tokens", 0):
            captions = [""] * count  # the null caption of stages that have tokens of one
        if captions is not None and found.keys() & {"tokens", "token_mask"}:
            tokens = self.engine.tokenizer(name)(list(captions))
            made = dict(zip(("tokens", "token_mask"), tokens, strict=True))
            if "text_states" in found:
                encode = self.engine.system.encode_text(self.engine.entries[name]["uses"].get("clip", "clip"))
                alone = Running(batch_size=how.batch_size)
                (made["text_embed"], made["text_states"]), _ = self._encode_text(encode, captions, alone)
            found |= {field: value for field, value in made.items() if field in found}
        return found

    def _guide_examples(self, step: Step, settings: dict, captions, how: Running) -> dict[str, np.ndarray]:
        """What the guides of these settings steer to: a text embedding, a label a caption."""
        used = [guide for guide in step.guides if guide in settings]
        if used and captions is None:
            raise ValueError(f"{' and '.join(used)} steer to captions: give them, or leave the guide out")
        found = {}
        for guide in used:
            field = tasks.guide_field(self.engine, guide)
            if field.endswith(".label"):
                found[field] = self.labels(captions, guide)
            else:
                encode = self.engine.system.encode_text(guide)
                (found[field], _), _ = self._encode_text(encode, captions, Running(batch_size=how.batch_size))
        return found

    def labels(self, captions: Sequence[str], name: str = "classifier") -> np.ndarray:
        """The class [N] int32 of the classifier, or of stage `name`, that each caption names; see
        `captions.labels`."""
        return texts.labels(self.engine, captions, name)

    def _check_classes(self, steps: Sequence[Step], settings: dict, captions: Sequence[str]) -> None:
        """Raise ValueError for a caption that names no class where a stage or a guide needs one."""
        for step in steps:
            if "label" in step.specs(self.engine.stage(step.stage)):
                self.labels(captions, step.stage)
            for guide in step.guides:
                if guide in settings.get(step.name, {}) and self.engine.system.GUIDES[guide] == "label":
                    self.labels(captions, guide)

    def text_to_image(
        self,
        captions: Sequence[str] = (),
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
          captions: texts of at most MAX_CAPTION characters; none for a model that reads none.
          seed: 0 .. 2**32 - 1; with a picture's number within its caption, all of its randomness.
          n: pictures a caption.
          numbers: instead of n, one a caption, that of the picture to draw for it.
          upsample: False stops at the base pictures.
          batch_size, progress, seen: see `Running`; of several processes each sees its own share.
          asked: any of `settings.SETTINGS` (guidance_scale, decoder_steps, prior_method, ...) instead of the
            model's own.

        Of several processes each draws its share of the pictures, and every one gets all of them; the
        timings are its own.

        Raises:
          ValueError: for captions or settings that are not allowed, before anything is computed.
        """
        if not isinstance(captions, str) and not len(captions) and not self.reads_captions:
            captions = None
        else:
            check_captions(captions)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} must lie in 0 .. {2**32 - 1}")
        if n < 1:
            raise ValueError(f"n {n} must be 1 or more pictures a caption")
        if captions is not None:
            check_counts("captions", len(captions), numbers=numbers)
        steps, settings, timings = self._until(upsample), self.settings(**asked), {}
        self._check_classes(self.steps("draw"), settings, captions)
        if captions is None:
            numbers = range(n) if numbers is None else numbers
        elif numbers is None:
            captions, numbers = repeated(captions, n)
        how = Running(seed, batch_size, progress, seen)

        def draw(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            self._prepare(steps, settings, len(chosen), how)
            given = {"number": [numbers[i] for i in chosen]}
            if captions is not None:
                given["caption"] = [captions[i] for i in chosen]
            made, more = self.run(steps, given, settings, how)
            timings.update(more)
            images = [made[f"{step.name}.image"] for step in steps if "image" in step.writes]
            no_embeds = np.zeros((len(chosen), 0), np.float32)
            return made.get("prior.image_embed", no_embeds), images[0], images[-1]

        drawn = processes.in_shares(draw, len(numbers))
        used = {name: values for name, values in settings.items() if name in timings}
        labels = [""] * len(numbers) if captions is None else captions
        return Result(tuple(labels), tuple(numbers), seed, *drawn, used, timings)

    def _until(self, upsample: bool) -> tuple[Step, ...]:
        """The steps of drawing, up to the first that draws pictures where they are not enlarged."""
        steps = self.steps("draw")
        first = next(i for i, step in enumerate(steps) if "image" in step.writes)
        return steps if upsample else steps[: first + 1]

    def prepare(self, *, n: int = 1, upsample: bool = True, batch_size: int | None = None, **asked) -> None:
        """Begins to compile, beside other work, what `text_to_image` of a caption with these needs."""
        self._prepare(self._until(upsample), self.settings(**asked), n, Running(batch_size=batch_size))

    def _prepare(self, steps: Sequence[Step], settings: dict, count: int, how: Running) -> None:
        # All stages are compiled at once, the later ones while the earlier ones run.
        for step in steps:
            own = settings.get(step.name, {}) | dict(step.fixed)
            task = tasks.make_task(self.engine, step, own, tasks.specs(self.engine, step, own), how.seed)
            self.engine.prepare(task, count, how.batch_size)

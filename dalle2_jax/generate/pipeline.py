"""Pipeline: a model directory that draws, encodes, and runs the steps of any action of its system.

Each step samples in one compiled function that holds one `lax.scan` (see tasks.py). The same seed and caption
give the same picture whatever else is drawn with it. Nothing here needs TensorFlow.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from dalle2_jax.generate import captions as texts
from dalle2_jax.generate import output, tasks
from dalle2_jax.generate import rerank as ranking
from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.engine import Engine, OnImages, Progress, Timing
from dalle2_jax.generate.pictures import shrink_mask, square_picture
from dalle2_jax.generate.result import Result
from dalle2_jax.generate.settings import SETTINGS, check_keywords, resolve
from dalle2_jax.runtime import processes
from dalle2_jax.systems.step import Step


@dataclasses.dataclass(frozen=True)
class Running:
    """How steps run: the options of all functions that draw.

    Attributes:
      seed: 0 .. 2**32 - 1; the same seed gives the same pictures.
      batch_size: examples at a time, rounded up to a multiple of the devices; None: 8, or one a device.
      progress: called as progress(step, examples done, number of examples, seconds in this step).
      on_images: called as on_images(step, uint8 [N, h, w, 3]) when a step has drawn pictures.
    """

    seed: int = 0
    batch_size: int | None = None
    progress: Progress | None = None
    on_images: OnImages | None = None

    @staticmethod
    def take(options: dict) -> "Running":
        """Removes its fields from keywords, and returns them."""
        return Running(**{name: options.pop(name) for name in RUNNING if name in options})


RUNNING = tuple(field.name for field in dataclasses.fields(Running))
# keywords of `Pipeline.text_to_image` beside `SETTINGS`
KEYWORDS = ("captions", "n", "numbers", "upsample", "negative", "judge", *RUNNING)


def repeated(captions: Sequence[str], n: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(each caption n times, the numbers 0 .. n-1 of each)."""
    return tuple(caption for caption in captions for _ in range(n)), tuple(range(n)) * len(captions)


def check_counts(what: str, count: int, **values: Sequence | None) -> None:
    """Raise ValueError for values, by their name, unless there are `count` of them or none."""
    for name, value in values.items():
        if value is not None and len(value) != count:
            raise ValueError(f"{count} {what} need as many {name}, got {len(value)}")


class Pipeline:
    """A model that draws. Make one with `Pipeline.load`.

    Attributes:
      engine: the opened model directory: stages, configs, weights.
      name: the model's name.
      actions: action -> its steps, of all actions that the stages can do.
    """

    def __init__(self, engine: Engine):
        self.engine, self.name = engine, engine.name
        self._speeds: dict[str, float] = {}  # step -> seconds a picture when it last ran
        self.actions = engine.system.actions(engine.stages)

    @classmethod
    def load(
        cls,
        model_dir: str | os.PathLike | None = None,
        dtype: str | None = None,
        mesh=None,
        low_memory: bool = False,
    ) -> Self:
        """Open a model directory; the first use of a stage reads its weights.

        Args:
          model_dir: the directory, or hf://OWNER/NAME@COMMIT; None: the small model of the package.
          dtype: compute type of the networks, 'float32' or 'bfloat16'; None: as trained.
          mesh: devices that share the pictures of a batch; None: all of them.
          low_memory: keep weights in their stored type, and those of one stage at a time on the devices;
            each stage reads them again at its turn.

        Raises:
          FileNotFoundError: no such directory, or a part of it is missing.
          ValueError: a part is damaged, or the stages do not fit together.
        """
        return cls(Engine(model_dir, dtype, mesh, low_memory))

    def __call__(
        self, captions: str | Sequence[str] = (), *, progress: Progress | bool | None = True, **options
    ) -> Result:
        """`text_to_image` of a caption or several, with a line of progress on stderr.

        progress: True: the line; False or None: none; or a function, see `Running`. options, errors: those of
        `text_to_image`.
        """
        captions = [captions] if isinstance(captions, str) else captions
        if progress is not True:
            return self.text_to_image(captions, progress=progress or None, **options)
        with output.ProgressLine([step.name for step in self.steps("draw")], self._speeds) as line:
            return self.text_to_image(captions, progress=line, **options)

    def steps(self, action: str) -> tuple[Step, ...]:
        """The steps of an action. ValueError names what the model lacks for it, and its actions."""
        try:
            return self.engine.system.steps(action, self.engine.stages)
        except ValueError as error:
            can = ", ".join(self.actions) or "nothing"
            raise ValueError(f"model {self.name!r} cannot do {action}: {error}; it can do {can}") from None

    @property
    def image_size(self) -> int:
        """Side of the finished picture."""
        action = next((name for name in ("redraw", "draw", "reconstruct") if name in self.actions), "draw")
        return self.engine.stage(self.steps(action)[-1].stage).image_size

    @property
    def reads_captions(self) -> bool:
        """Whether a drawn picture depends on its caption."""
        steps = self.steps("draw")
        return any(set(step.specs(self.engine.stage(step.stage))) & set(texts.FIELDS) for step in steps)

    def cut_captions(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption that a stage cuts, with the part that it reads; one line for a model that
        reads no captions."""
        if "draw" in self.actions and not self.reads_captions:
            return [f"model {self.name!r} reads no captions: it draws what it was trained on"]
        steps = self.actions.get("draw") or self.actions.get("encode_text", ())
        return texts.cut_captions(self.engine, list(dict.fromkeys(step.stage for step in steps)), captions)

    def caption_notes(self, captions: Sequence[str]) -> list[str]:
        """`cut_captions`, and a line for each caption with words that the model has never seen."""
        unseen = texts.unseen_words(self.engine, captions) if self.reads_captions else []
        return self.cut_captions(captions) + unseen

    def settings(self, **keywords) -> dict[str, dict]:
        """step -> its settings in `text_to_image` with these keywords of `settings.SETTINGS`."""
        return resolve(self.engine, self.steps("draw"), **keywords)

    def encode_text(
        self, captions: Sequence[str], batch_size: int | None = None, progress: Progress | None = None
    ) -> tuple[tuple[np.ndarray, np.ndarray], Timing]:
        """((text_embed [N, E], text_states [N, L, D]) of captions by CLIP, float32; Timing)."""
        check_captions(captions)
        (step,) = self.steps("encode_text")
        return self._encode_text(step, captions, Running(0, batch_size, progress))

    def _encode_text(self, step: Step, captions: Sequence[str], how: Running):
        """`encode_text` without the check: the null caption may be ""."""
        made, timings = self.run((step,), {"caption": captions}, {}, how)
        return tuple(made[f"{step.name}.{field}"] for field in step.writes), timings[step.name]

    def encode_image(self, images, batch_size: int | None = None) -> np.ndarray:
        """Image embeddings [N, E] float32 in CLIP's scale (unit norm, unless `unit_embeds` is off).

        Args:
          images: uint8 [N, H, W, 3], or a sequence of PIL pictures and uint8 [H, W, 3] of any sizes; each is
            resized bicubically to CLIP's size and its central square taken, as by OpenAI's CLIP.
          batch_size: pictures at a time.
        """
        (step,) = self.steps("encode_image")
        size = self.engine.stage(step.stage).image_size
        small = np.stack([square_picture(image, size, halve=False) for image in images])
        made, _ = self.run((step,), {"image.image": small}, {}, Running(batch_size=batch_size))
        return made["image.image_embed"]

    def score(self, images, captions: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """log p(class | picture) [N] by the classifier, of pictures and of the class that each caption names.

        images: see `encode_image`. Raises ValueError for a caption that names no class.
        """
        (step,) = self.steps("score")
        size = self.engine.stage(step.stage).image_size
        small = np.stack([square_picture(image, size, halve=False) for image in images])
        batch = {"caption": captions, f"{step.name}.image": small}
        return self.run((step,), batch, {}, Running(batch_size=batch_size))[0]["score.score"]

    def run(
        self, steps: Sequence[Step], batch: Mapping, settings: Mapping[str, dict], how: Running
    ) -> tuple[dict[str, Any], dict[str, Timing]]:
        """(`batch` with the outputs of steps, step -> Timing).

        Args:
          steps: of an action, or some of them.
          batch: 'caption', N texts, or None for the null caption; 'number', the numbers of the pictures;
            'STEP.FIELD', arrays [N, ...] for a step's field, or the output of an earlier step; 'inpaint', a
            picture uint8 [H, W, 3] and a mask bool [H, W] of any size, True where it is drawn anew;
            'negative', a caption that guidance leads away from.
          settings: step -> keywords of its operation.
          how: seed, batch size, callbacks.
        """
        batch, timings = dict(batch), {}
        for step in steps:
            now = settings.get(step.name, {}) | dict(step.fixed)
            examples = self._examples(step, batch, now, how)
            specs = tasks.specs(self.engine, step, now, examples)
            task = tasks.make_task(self.engine, step, now, specs, how.seed)
            made, timings[step.name] = self.engine.run(
                task, examples, batch_size=how.batch_size, progress=how.progress
            )
            batch |= {f"{step.name}.{field}": value for field, value in made.items()}
            if how.on_images is not None and step.fold is not None and "image" in made:
                how.on_images(step.name, made["image"])
        return batch, timings

    def _examples(self, step: Step, batch: dict, settings: dict, how: Running) -> dict[str, np.ndarray]:
        """Arrays [N, ...] of all inputs of a step: from the batch, or made from the captions."""
        stage, captions, missing = self.engine.stage(step.stage), batch.get("caption"), []
        needed, found = step.specs(stage), {}
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
        if "inpaint_image" in step.optional and batch.get("inpaint") is not None:
            picture, mask = batch["inpaint"]
            at_size = square_picture(picture, stage.image_size), shrink_mask(mask, stage.image_size)
            found["inpaint_image"], found["inpaint_mask"] = (np.repeat(x[None], count, 0) for x in at_size)
        if "negative" in step.optional and batch.get("negative") is not None:
            self._check_negative(step, settings, batch["negative"])
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
                raise ValueError(f"{step.name} needs the input {field}")
        found = {field: np.zeros((count, *specs[field].shape), specs[field].dtype) for field in fields}
        if "label" in found and captions is not None:
            found["label"] = texts.labels(self.engine, captions, name)
        elif "label" in found:
            if not getattr(stage, "label_drop", False):
                raise ValueError(f"the {name} draws classes: give a caption that names one")
            found["label"] -= 1  # the null label
        if captions is None and getattr(stage, "null_tokens", False):
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

    def _check_negative(self, step: Step, settings: dict, negative: str) -> None:
        """Raise ValueError for an invalid negative caption, and for a step that cannot read one."""
        check_captions([negative])
        if settings["guidance_scale"] == 1 or self.engine.stage(step.stage).context_length is None:
            raise ValueError(
                f"a negative caption needs a {step.name} that reads captions, and guidance above 1"
            )

    def _guide_examples(self, step: Step, settings: dict, captions, how: Running) -> dict[str, np.ndarray]:
        """The targets of the guides: a text embedding, a label a caption."""
        targets, found = tasks.guide_fields(self.engine, step, settings), {}
        if targets and captions is None:
            raise ValueError(f"{' and '.join(targets)} steer to captions: give them, or leave the guide out")
        for guide, field in targets.items():
            if field.endswith(".label"):
                found[field] = texts.labels(self.engine, captions, guide)
            else:
                encode = self.engine.system.encode_text(guide)
                (found[field], _), _ = self._encode_text(encode, captions, Running(batch_size=how.batch_size))
        return found

    def _check_classes(self, steps: Sequence[Step], settings: dict, captions) -> None:
        """Raise ValueError for a caption that names no class where a stage or a guide needs one."""
        for step in steps:
            if "label" in step.specs(self.engine.stage(step.stage)):
                texts.labels(self.engine, captions, step.stage)
            for guide, field in tasks.guide_fields(self.engine, step, settings.get(step.name, {})).items():
                if field.endswith(".label"):
                    texts.labels(self.engine, captions, guide)

    def text_to_image(
        self,
        captions: Sequence[str] = (),
        *,
        n: int = 1,
        numbers: Sequence[int] | None = None,
        upsample: bool = True,
        negative: str | None = None,
        rerank: int | None = None,
        judge: "Pipeline | None" = None,
        **options,
    ) -> Result:
        """Draw n pictures of each caption.

        Args:
          captions: texts of at most MAX_CAPTION characters; none for a model that reads none.
          n: pictures a caption.
          numbers: instead of n, one a caption, the number of its picture. With the seed it fixes all
            randomness of a picture.
          upsample: False: base pictures alone.
          negative: a caption that the decoder's guidance leads away from; None: the null caption.
          rerank: draw so many candidates a caption, and return the n best, see `rerank.drawn`; None or
            1: no candidates.
          judge: a model whose CLIP or classifier ranks; None: this model, or else the one of the package.
          options: the fields of `Running`: seed, batch_size, progress, on_images; and any of
            `settings.SETTINGS` (guidance_scale, decoder_steps, prior_method, ...), by default the model's.

        Each of several processes draws its share of the pictures and gets all of them. Its callbacks and
        timings count its share alone.

        Raises:
          ValueError: for invalid captions or settings, before anything is computed.
        """
        check_keywords(options, (*KEYWORDS, *SETTINGS))
        if rerank is not None and rerank != 1:
            options |= dict(upsample=upsample, negative=negative)
            return ranking.drawn(self, captions, rerank, judge, n=n, numbers=numbers, **options)
        how = Running.take(options)
        read = isinstance(captions, str) or len(captions) > 0 or self.reads_captions
        if read:
            check_captions(captions)
            check_counts("captions", len(captions), numbers=numbers)
        if not 0 <= how.seed < 2**32:
            raise ValueError(f"seed {how.seed} must lie in 0 .. {2**32 - 1}")
        if n < 1:
            raise ValueError(f"n {n} must be 1 or more pictures a caption")
        steps, settings, timings = self.steps("draw"), self.settings(**options), {}
        self._check_classes(steps, settings, captions if read else None)
        led: list[str] = []  # steps that read the negative caption
        if negative is not None:
            for step in (step for step in steps if "negative" in step.optional):
                self._check_negative(step, settings[step.name], negative)
                led.append(step.name)
        if not upsample:
            first = next(i for i, step in enumerate(steps) if "image" in step.writes)
            steps = steps[: first + 1]
        if numbers is None:
            captions, numbers = repeated(captions, n) if read else ((), range(n))
        labels = captions if read else [""] * len(numbers)

        def draw(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            # The decoder's program with a negative caption has further inputs: it is compiled at its turn.
            self._prepare([s for s in steps if s.name not in led], settings, len(chosen), how)
            batch: dict = {"number": [numbers[i] for i in chosen], "negative": negative}
            batch |= {"caption": [captions[i] for i in chosen]} if read else {}
            made, more = self.run(steps, batch, settings, how)
            timings.update(more)
            images = [made[f"{step.name}.image"] for step in steps if "image" in step.writes]
            no_embeds = np.zeros((len(chosen), 0), np.float32)
            return made.get("prior.image_embed", no_embeds), images[0], images[-1]

        embeds, base, images = processes.split_over_processes(draw, len(numbers))
        used = {name: values for name, values in settings.items() if name in timings}
        used |= {name: used[name] | {"negative": negative} for name in led}
        origin = output.origin(self, len(numbers), how.batch_size)
        drawn = embeds, base, images, used, timings, self.name, origin
        return Result(tuple(labels), tuple(numbers), how.seed, *drawn)

    def prepare(self, *, n: int = 1, **options) -> None:
        """Begin, in the background, to compile `text_to_image` of a caption with these arguments."""
        how = Running.take(options)
        self._prepare(self.steps("draw"), self.settings(**options), n, how)

    def _prepare(self, steps: Sequence[Step], settings: dict, count: int, how: Running) -> None:
        # All stages are compiled at once, the later ones while the earlier ones run.
        for step in steps:
            now = settings.get(step.name, {}) | dict(step.fixed)
            task = tasks.make_task(self.engine, step, now, tasks.specs(self.engine, step, now), how.seed)
            self.engine.prepare(task, count, how.batch_size)

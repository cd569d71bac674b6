"""The studio at work: checked requests, one step at a time, in turn."""

import base64
import collections
import contextlib
import dataclasses
import json
import shlex
import threading
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.edit import actions
from dalle2_jax.generate import pictures
from dalle2_jax.generate.output import metadata
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio.explain import explain
from dalle2_jax.studio.requests import ACTIONS, Refused, check

MAX_WAITING = 8  # requests at work and waiting
PRIORS = {"prior": "diffusion prior", "ar_prior": "autoregressive prior", None: "no prior"}
# Inputs that a command reads from files, downloaded before.
FILES = {"picture": "picture.png", "mask": "mask.png", "first": "picture.png", "second": "second.png"}


class Full(Refused):
    """The queue is full."""


class Stopped(Exception):
    """The client has gone."""


class Turns:
    """A bounded queue of requests; its head computes, and may go to the end."""

    def __init__(self, most: int = MAX_WAITING):
        self.most = most
        self._queue: collections.deque = collections.deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, waiting: Callable[[int], None] = lambda before: None):
        """Wait for the turn; yields a function that lets the others go first. Raises Full at once.

        waiting: called with the number of requests before this one, whenever it changes.
        """
        me = object()
        with self._changed:
            if len(self._queue) >= self.most:
                raise Full(f"the studio is busy: {self.most} requests wait already. Try again in a minute")
            self._queue.append(me)
        try:
            self._wait(me, waiting)
            yield lambda: self._pass_on(me, waiting)
        finally:
            with self._changed:
                self._queue.remove(me)
                self._changed.notify_all()

    def _wait(self, me, waiting) -> None:
        before = -1
        while before:
            with self._changed:
                while self._queue.index(me) == before:
                    self._changed.wait()
                before = self._queue.index(me)
            if before:
                waiting(before)

    def _pass_on(self, me, waiting) -> None:
        with self._changed:
            if len(self._queue) == 1:
                return
            self._queue.remove(me)
            self._queue.append(me)
            self._changed.notify_all()
        self._wait(me, waiting)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
      png: its file, with the settings inside.
      label: what to call it. caption: what it shows, to be changed in edits; "": unknown.
      settings: of the drawing. command: the command line that makes it; "": none does.
    """

    png: bytes
    label: str
    settings: dict
    command: str
    caption: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the file's header."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")


def as_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


class Studio:
    """Models at work for several people. `draw` may be called from any thread.

    Attributes:
      models: its name in requests -> Pipeline; the first is the default.
      folders: the same names -> model directories; None: the bundled model.
      seconds: (name, action, its settings, step) -> seconds of that step when it last ran.
    """

    def __init__(self, model_dirs: Sequence[str | None] = (None,), most: int = MAX_WAITING, **options):
        """Opens model directories; `options` and errors are those of `Pipeline.load`."""
        self.turns = Turns(most)
        self.seconds: dict[tuple[str, str, str, str], float] = {}
        self.models: dict[str, Pipeline] = {}
        self.folders: dict[str, str | None] = {}
        for folder in model_dirs:
            model = Pipeline.load(folder, **options)
            priors = [step.stage for step in model.steps("draw") if step.role == "prior"]
            kind = model.engine.configs[priors[0]]["stage"] if priors else None
            name = f"{model.name} ({PRIORS[kind]})"
            while name in self.models:
                name += "*"
            self.models[name], self.folders[name] = model, folder

    def warm(self) -> None:
        """Begin, in the background, to compile `create` with the page's defaults."""
        model = next(iter(self.models.values()))
        model.prepare(n=ACTIONS["create"]["n"].default)

    def draw(self, action: str, request: dict, tell: Callable[..., None] = lambda *event: None):
        """The pictures [Picture] of a request; for `explain` its dict.

        tell: called with ('note', text), ('waiting', requests before it), ('stage', step, done, total, share
        of the whole or None, seconds left or None) and ('pictures', step, uint8 [N, h, w, 3]); an exception
        in it stops the work. A note is of a request that may be a mistake.

        Raises Refused for an invalid request, before anything is computed.
        """
        name = next(iter(self.models), None)
        if isinstance(request, dict):
            request = dict(request)
            if (chosen := request.pop("model", None)) is not None:
                name = chosen
        if not isinstance(name, str) or name not in self.models:
            raise Refused(f"no such model: choose one of {', '.join(self.models)}")
        model = self.models[name]
        fields = check(action, request, model.reads_captions)
        try:
            steps = [step.name for step in model.steps("draw" if action == "create" else action)]
            if action in ("create", "explain"):
                model.settings(**{k: v for k, v in fields.items() if k not in ("caption", "seed", "n")})
            elif "num_steps" in fields:
                model.settings(decoder_steps=fields["num_steps"])
            if "mask" in fields:
                pictures.repaint_mask(fields["mask"], fields["picture"].shape[1::-1])
                if pictures.keeps_nothing(fields["mask"]):
                    tell("note", pictures.ALL_WHITE)
        except ValueError as error:
            raise Refused(str(error)) from None
        content = ("text", "picture", "mask")
        settings = {k: v for k, v in fields.items() if k != "seed" and ACTIONS[action][k].kind not in content}
        same = name, action, str(settings)  # requests that take the same time
        with self.turns.turn(lambda before: tell("waiting", before)) as pass_on:

            def progress(step, done, total, seconds):
                tell("stage", step, done, total, *self._left(same, steps, step, done / total, seconds))
                pass_on()

            try:
                return self._run(name, action, fields, progress, lambda *event: tell("pictures", *event))
            except ValueError as error:
                raise Refused(str(error)) from None

    def _left(
        self, same: tuple[str, str, str], steps: Sequence[str], step: str, share: float, seconds: float
    ) -> tuple[float | None, float | None]:
        """(share of the whole that is done, seconds left), when `share` of a step has taken `seconds`.

        None: unknown. The seconds left are known where all further steps ran before with the same settings.
        """
        before = self.seconds.get((*same, step), seconds / share)
        if share == 1:
            self.seconds[*same, step] = seconds
        if step not in steps:
            return None, None
        place = steps.index(step)
        later = [(*same, name) for name in steps[place + 1 :]]
        left = None
        if all(key in self.seconds for key in later):
            left = max(before - seconds, 0.0) + sum(self.seconds[key] for key in later)
        return (place + share) / len(steps), left

    def compiling(self, name: str) -> bool:
        """Whether programs of a model are being compiled."""
        return name in self.models and self.models[name].engine.compiling

    def _run(self, name: str, action: str, fields: dict, progress, on_images):
        model = self.models[name]
        if action == "explain":
            return explain(model, **fields, progress=progress)
        command = self.command(name, action, fields)
        if action == "upscale":
            small = _small(fields["picture"], model)
            image = actions.upscale(model, small, seed=fields["seed"], progress=progress)
            settings = {"action": action, "seed": fields["seed"]}
            texts = {"dalle2_jax": json.dumps(settings | {"model": model.name})}
            return [Picture(png_bytes(image, texts), "enlarged", settings, command)]
        options = dict(fields)
        callbacks = dict(progress=progress, on_images=on_images)
        if action == "create":
            captions = [caption] if (caption := options.pop("caption")) else []
            result = model.text_to_image(captions, **options, **callbacks)
        else:
            result = getattr(actions, action)(model, **options, **callbacks)
        plain = {name: value for name, value in options.items() if not isinstance(value, np.ndarray)}
        made = []
        for i, image in enumerate(result.images):
            texts = metadata(result, i, model.name, action=action, asked=plain)
            settings = json.loads(texts["dalle2_jax"])
            made.append(Picture(png_bytes(image, texts), result.captions[i], settings, command))
        return made

    def command(self, name: str, action: str, fields: dict) -> str:
        """The command line that makes the same pictures, from files in `FILES`."""
        order = actions.INPUTS.get(action, ("caption",))
        inputs = [FILES.get(field) or fields[field] for field in order]
        inputs = inputs if any(inputs) else []  # `generate` without captions
        words = ["dalle2_jax.edit", action] if action in actions.INPUTS else ["dalle2_jax.generate"]
        words += [] if self.folders[name] is None else [f"--model={self.folders[name]}"]
        for field, value in fields.items():
            if field not in order:
                flag = "steps" if field == "num_steps" else field
                words.append(f"--{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
        words += ["--"] if any(text.startswith("-") for text in inputs) else []
        return shlex.join(["python", "-m", *words, *inputs])


def _small(image: np.ndarray, model: Pipeline) -> np.ndarray:
    """A picture no larger than the model's: enlarged, it is then at most a few times that size."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((model.image_size, model.image_size))
    return np.asarray(picture)

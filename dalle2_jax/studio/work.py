"""The studio at work: requests that were checked, carried out one step at a time, in turn."""

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

MAX_WAITING = 8  # requests at work and waiting, all together
PRIORS = {"prior": "diffusion prior", "ar_prior": "autoregressive prior", None: "no prior"}


class Full(Refused):
    """Too many requests wait already."""


class Turns:
    """A bounded queue of those that want to compute; who is at its head does, and may pass the turn on."""

    def __init__(self, most: int = MAX_WAITING):
        self.most = most
        self._queue: collections.deque = collections.deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, waiting: Callable[[int], None] = lambda before: None):
        """Waits for the turn; gives a function that lets the others go first. Raises Full at once."""
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
        told = -1
        while True:
            with self._changed:
                while self._queue.index(me) == told:
                    self._changed.wait()
                told = self._queue.index(me)
                if not told:
                    return
            waiting(told)

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
    """A finished picture: its PNG file with settings inside, what it is called, the command that makes it."""

    png: bytes
    caption: str
    settings: dict
    command: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as the file's header says."""
        return tuple(int.from_bytes(self.png[i : i + 4], "big") for i in (16, 20))


def as_url(png: bytes) -> str:
    """A PNG file as an URL that holds all of it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


class Stopped(Exception):
    """The one who asked has gone."""


class Studio:
    """Models at work for several people. `draw` may be called from any thread.

    Attributes:
      models: what a request calls it -> Pipeline; the first is drawn with where none is named.
      folders: the same names -> model directories, None for the bundled model.
      seconds: (name, stage) -> seconds that a picture took in that stage when it last ran.
    """

    def __init__(self, model_dirs: Sequence[str | None] = (None,), most: int = MAX_WAITING, **options):
        """Opens model directories; `options` are those of `Pipeline.load`. Raises what it raises."""
        self.turns, self.seconds = Turns(most), {}
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
        """Has the programs of `create` as the page asks for it compiled, in the background."""
        model = next(iter(self.models.values()))
        model.prepare(n=ACTIONS["create"]["n"].default)

    def draw(self, action: str, request: dict, tell: Callable[..., None] = lambda *event: None):
        """The pictures [Picture] of a request, or what `explain` returns.

        tell: called with ('note', text), ('waiting', before), ('stage', name, done, total, seconds) and
        ('pictures', stage, uint8 [N, h, w, 3]) as the work goes on; what it raises stops the work. A note
        says what a request does that its sender may not have meant.

        Raises Refused for what is not allowed, before anything is computed.
        """
        asked = dict(request) if isinstance(request, dict) else request
        name = asked.pop("model", None) if isinstance(asked, dict) else None
        name = next(iter(self.models)) if name is None else name
        if not isinstance(name, str) or name not in self.models:
            raise Refused(f"there is no such model: choose one of {', '.join(self.models)}")
        given, model = check(action, asked), self.models[name]
        try:
            if action != "create":
                model.steps(action)
            if action in ("create", "explain"):
                model.settings(**{k: v for k, v in given.items() if k not in ("caption", "seed", "n")})
            elif "num_steps" in given:
                model.settings(decoder_steps=given["num_steps"])
            if "mask" in given:
                pictures.repaint_mask(given["mask"], given["picture"].shape[1::-1])
                if pictures.keeps_nothing(given["mask"]):
                    tell("note", pictures.ALL_WHITE)
        except ValueError as error:
            raise Refused(str(error)) from None
        with self.turns.turn(lambda before: tell("waiting", before)) as pass_on:

            def progress(stage, done, total, seconds):
                self.seconds[name, stage] = seconds / done
                tell("stage", stage, done, total, seconds)
                pass_on()

            def seen(stage, images):
                tell("pictures", stage, images)

            try:
                return self._carry_out(name, action, given, progress, seen)
            except ValueError as error:
                raise Refused(str(error)) from None

    def _carry_out(self, name: str, action: str, given: dict, progress, seen):
        given, model = dict(given), self.models[name]
        if action == "explain":
            return explain(model, given.pop("caption"), progress=progress, **given)
        if action == "upscale":
            small = _small(given["picture"], model)
            image = actions.upscale(model, small, seed=given["seed"], progress=progress)
            texts = {"dalle2_jax": json.dumps({"action": action, "model": model.name, "seed": given["seed"]})}
            said = {"action": action, "seed": given["seed"]}
            return [Picture(png_bytes(image, texts), "enlarged", said, self.command(name, action, given))]
        command = self.command(name, action, given)
        if action == "create":
            result = model.text_to_image([given.pop("caption")], progress=progress, seen=seen, **given)
        else:
            if "picture" in given:
                given["image"] = given.pop("picture")
            if action == "textdiff":
                given.setdefault("source", None)
            result = getattr(actions, action)(model, **given, progress=progress, seen=seen)
        plain = {name: value for name, value in given.items() if not isinstance(value, np.ndarray)}
        made = []
        for i, image in enumerate(result.images):
            texts = metadata(result, i, model.name, action=action, asked=plain)
            said = json.loads(texts["dalle2_jax"])
            made.append(Picture(png_bytes(image, texts), result.captions[i], said, command))
        return made

    def command(self, name: str, action: str, given: dict) -> str:
        """The command line that makes the same pictures; pictures are files that were downloaded before."""
        rest = dict(given)
        names = {"picture": "picture.png", "mask": "mask.png", "first": "picture.png", "second": "second.png"}
        order = {
            "create": ("caption",),
            "variations": ("picture",),
            "inpaint": ("picture", "mask", "caption"),
            "outpaint": ("picture", "caption"),
            "textdiff": ("picture", "target"),
            "interpolate": ("first", "second"),
            "image_to_image": ("picture", "caption"),
            "upscale": ("picture",),
        }[action]
        words = ["python", "-m", "dalle2_jax.generate" if action == "create" else "dalle2_jax.edit"]
        words += [] if action == "create" else [action]
        flags = [] if self.folders[name] is None else [f"--model={self.folders[name]}"]
        places = [names.get(field) or rest[field] for field in order]
        for field in order:
            rest.pop(field)
        for field, value in rest.items():
            field = "steps" if field == "num_steps" else field
            flags.append(f"--{field}={','.join(map(str, value)) if isinstance(value, list) else value}")
        words += flags + (["--"] if any(place.startswith("-") for place in places) else []) + places
        return shlex.join(words)


def _small(image: np.ndarray, model: Pipeline) -> np.ndarray:
    """A picture no larger than the model draws: what is enlarged is then at most a few times that."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((model.image_size, model.image_size))
    return np.asarray(picture)

"""What the studio is asked for: requests checked against limits, carried out one stage at a time, in turn.

A request is a dict of plain values. `ACTIONS` says which fields an action has, and `FIELDS` what each may be.
Pictures are the bytes of a file, or base64 of them; nothing in a request names a file.
"""

import base64
import collections
import contextlib
import dataclasses
import json
import math
import shlex
import threading
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.generate import pictures, pipeline
from dalle2_jax.generate.generate import metadata
from dalle2_jax.runtime.grid import png_bytes

MAX_CAPTION = 300
MAX_PICTURES = 8
MAX_STEPS = 250
MAX_UPLOAD = 8 * 2**20  # bytes of a file
MAX_PIXELS = 16_000_000
MAX_WAITING = 8  # requests at work and waiting, all together
PRIORS = {"prior": "diffusion prior", "ar_prior": "autoregressive prior", None: "no prior"}


class Refused(ValueError):
    """A request that is not carried out; the text says why, and what to change."""


class Full(Refused):
    """Too many requests wait already."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of a request may be.

    Attributes:
      kind: 'text', 'int', 'float', 'ints' (of every upsampler), 'picture' or 'mask'.
      low, high: the least and the most of a number.
      default: where the field is left out; None is the model's own.
      needed: whether it may be left out.
      help: one line.
    """

    kind: str
    help: str
    low: float = 0
    high: float = 0
    default: object = None
    needed: bool = False


def _of(name: str, **changes) -> Field:
    return dataclasses.replace(_COMMON[name], **changes)


_COMMON = {
    "caption": Field("text", "what to draw", needed=True),
    "picture": Field("picture", f"a {pictures.FORMATS} file", needed=True),
    "n": Field("int", "pictures", 1, MAX_PICTURES, 4),
    "frames": Field("int", "pictures on the way", 2, MAX_PICTURES + 1, 7),
    "seed": Field("int", "the same seed gives the same pictures", 0, 2**32 - 1, 0),
    "guidance_scale": Field("float", "guidance of the decoder, 1 is none", 0, 20),
    "num_steps": Field("int", "steps of the decoder", 1, MAX_STEPS),
    "strength": Field("float", "the share of the steps that is taken", 0.05, 1),
}
_EDIT = {name: _COMMON[name] for name in ("seed", "guidance_scale", "num_steps")}
_CREATE = {
    "caption": _COMMON["caption"],
    "seed": _COMMON["seed"],
    "guidance_scale": _COMMON["guidance_scale"],
    "decoder_steps": _COMMON["num_steps"],
    "prior_steps": Field("int", "steps of a diffusion prior", 1, MAX_STEPS),
    "prior_candidates": Field("int", "embeddings drawn; the closest is kept", 1, 8),
    "prior_guidance_scale": Field("float", "guidance of the prior, 1 is none", 0, 20),
    "upsampler_steps": Field("ints", "steps of each upsampler, such as 4,2", 1, MAX_STEPS),
}
# action -> its fields
ACTIONS = {
    "create": _CREATE | {"n": _COMMON["n"]},
    "explain": _CREATE,
    "variations": {"picture": _COMMON["picture"], "n": _COMMON["n"]}
    | {
        "eta": Field("float", "how much is left to chance", 0, 1, 1.0),
        "strength": _of("strength", default=1.0),
    }
    | _EDIT,
    "inpaint": {
        "picture": _COMMON["picture"],
        "mask": Field("mask", "a file of the picture's size; opaque white is drawn anew", needed=True),
        "caption": _of("caption", help="what the whole picture shows"),
        "n": _COMMON["n"],
    }
    | _EDIT,
    "outpaint": {
        "picture": _COMMON["picture"],
        "caption": _of("caption", help="what the whole picture shows"),
        "scale": Field("float", "the share of the side that the picture takes", 0.2, 0.9, 0.5),
        "n": _COMMON["n"],
    }
    | _EDIT,
    "textdiff": {
        "picture": _COMMON["picture"],
        "source": _of("caption", help="what the picture shows", needed=False),
        "target": _of("caption", help="what it should show"),
        "theta": Field("float", "how far to go", 0.05, 1, 0.5),
        "frames": _COMMON["frames"],
    }
    | _EDIT,
    "interpolate": {
        "first": _COMMON["picture"],
        "second": _COMMON["picture"],
        "frames": _COMMON["frames"],
    }
    | _EDIT,
    "image_to_image": {
        "picture": _COMMON["picture"],
        "caption": _COMMON["caption"],
        "strength": _of("strength", default=0.7),
        "n": _COMMON["n"],
    }
    | _EDIT,
    "upscale": {"picture": _COMMON["picture"], "seed": _COMMON["seed"]},
}


def from_base64(text: str, name: str = "the picture") -> bytes:
    """The bytes of base64: also of a data URL, with line breaks, in the alphabet for URLs.

    Raises Refused for another text; `name` is what it calls the text.
    """
    if text[:5] == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise Refused(f"{name} is a data URL without ;base64: send base64 of a {pictures.FORMATS} file")
    text = "".join(text.split())
    if "-" in text or "_" in text:  # the alphabet for URLs, which often goes without padding
        text = text.translate({ord("-"): "+", ord("_"): "/"})
        text += "=" * (-len(text) % 4)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(f"{name} is not base64: send base64 of a {pictures.FORMATS} file") from None


def read_upload(data: bytes | str, name: str = "the picture", keep_alpha: bool = False):
    """The PIL picture (RGB, upright) of an uploaded file: bytes, or base64 as `from_base64` takes it.

    keep_alpha: a picture with transparency stays RGBA. Raises Refused with the reason for what is no picture,
    and for one that training would not read; `name` is what it calls the picture.
    """
    if isinstance(data, str):
        data = from_base64(data, name)
    if not isinstance(data, bytes):
        raise Refused(f"{name} must be a {pictures.FORMATS} file, as base64 text")
    if len(data) > MAX_UPLOAD:
        raise Refused(too_large(len(data), name))
    try:
        return pictures.decode_picture(data, name, MAX_PIXELS, keep_alpha)
    except ValueError as error:
        raise Refused(str(error)) from None


def too_large(size: float, name: str = "the picture") -> str:
    """What is said of a file of so many bytes."""
    rounded = math.ceil(size / 2**20 * 10) / 10  # upwards: what is too large shall look so
    return (
        f"{name} is a file of {rounded} MiB: at most {MAX_UPLOAD >> 20} MiB are allowed, so make it smaller "
        "or save it as JPEG"
    )


def _checked(name: str, field: Field, value):
    """The value of one field, of its kind and within its limits; Refused otherwise."""
    if field.kind == "picture":
        called = "the picture" if name == "picture" else f"the {name} picture"
        return pictures.whole_picture(read_upload(value, called))
    if field.kind == "mask":
        try:
            return pictures.repaint_mask(read_upload(value, "the mask", keep_alpha=True))
        except ValueError as error:
            raise Refused(str(error)) from None
    if field.kind == "text":
        if not isinstance(value, str) or not value.strip():
            raise Refused(f"{name} is empty: say {field.help}")
        if len(value) > MAX_CAPTION:
            raise Refused(f"{name} has {len(value)} characters: at most {MAX_CAPTION} are allowed")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refused(f"{name} has characters that are no text: leave them out") from None
        return " ".join(value.split())
    if field.kind == "ints":
        value = value.split(",") if isinstance(value, str) else value
        if not isinstance(value, list) or not 1 <= len(value) <= 8:
            raise Refused(f"{name} must be whole numbers, such as 4,2")
        return [_checked(name, dataclasses.replace(field, kind="int"), each) for each in value]
    if isinstance(value, str | bool):
        text = value if isinstance(value, str) else ""
        if len(text) > 20 or not text.strip().isdecimal():
            raise Refused(f"{name} must be a number from {field.low:g} to {field.high:g}")
        value = int(text)
    if not isinstance(value, int | float) or (field.kind == "int" and value != value // 1):
        kind = "whole number" if field.kind == "int" else "number"
        raise Refused(f"{name} must be a {kind} from {field.low:g} to {field.high:g}")
    if not field.low <= value <= field.high:
        raise Refused(f"{name} {value} is not allowed: give {field.low:.10g} to {field.high:.10g}")
    return int(value) if field.kind == "int" else float(value)


def check(action: str, request: dict) -> dict:
    """The request's fields, checked, with defaults; those left to the model are left out. Else Refused."""
    if not isinstance(action, str) or action not in ACTIONS:
        raise Refused(f"there is no such action: choose one of {', '.join(ACTIONS)}")
    if not isinstance(request, dict):
        raise Refused("a request is a JSON object")
    fields, made = ACTIONS[action], {}
    for name in request:
        if name not in fields:
            raise Refused(f"{str(name)[:40]!r} is no field of {action}: it has {', '.join(fields)}")
    for name, field in fields.items():
        value = request.get(name)
        if value is None or (value == "" and not field.needed):
            if field.needed:
                raise Refused(f"{name} is missing: give {field.help}")
            value = field.default
        else:
            value = _checked(name, field, value)
        if value is not None:
            made[name] = value
    return made


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
      models: what a request calls it -> UnCLIP; the first is drawn with where none is named.
      folders: the same names -> model directories, None for the bundled model.
      seconds: (name, stage) -> seconds that a picture took in that stage when it last ran.
    """

    def __init__(self, model_dirs: Sequence[str | None] = (None,), most: int = MAX_WAITING, **options):
        """Opens model directories; `options` are those of `UnCLIP.load`. Raises what it raises."""
        self.turns, self.seconds = Turns(most), {}
        self.models: dict[str, pipeline.UnCLIP] = {}
        self.folders: dict[str, str | None] = {}
        for folder in model_dirs:
            model = pipeline.UnCLIP.load(folder, **options)
            kind = model.cascade.configs["prior"]["stage"] if model.cascade.reads_embeds else None
            name = f"{model.name} ({PRIORS[kind]})"
            while name in self.models:
                name += "*"
            self.models[name], self.folders[name] = model, folder

    def warm(self) -> None:
        """Has the programs of `create` as the page asks for it compiled, in the background."""
        model = next(iter(self.models.values()))
        model.prepare(n=_COMMON["n"].default)

    def draw(self, action: str, request: dict, tell: Callable[..., None] = lambda *event: None):
        """The pictures [Picture] of a request, or what `UnCLIP.explain` returns.

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
            return model.explain(given.pop("caption"), progress=progress, **given)
        if action == "upscale":
            image = model.upscale(_small(given["picture"], model), seed=given["seed"], progress=progress)
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
            result = getattr(model, action)(**given, progress=progress, seen=seen)
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


def _small(image: np.ndarray, model: pipeline.UnCLIP) -> np.ndarray:
    """A picture no larger than the model draws: what is enlarged is then at most a few times that."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((model.image_size, model.image_size))
    return np.asarray(picture)

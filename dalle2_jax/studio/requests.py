"""Requests to the studio: actions, their fields and limits, and the check of a request.

A request is a dict of plain values; `ACTIONS` has the fields of each action. Pictures are the bytes of a
file, or base64 of them; nothing in a request names a file.
"""

import base64
import dataclasses
import math
import re

from dalle2_jax.generate import pictures
from dalle2_jax.generate.settings import SETTINGS
from dalle2_jax.models.stages.settings import Setting

MAX_CAPTION = 300
MAX_PICTURES = 8
MAX_STEPS = 250
MAX_UPLOAD = 8 * 2**20  # bytes of a file
MAX_PIXELS = 16_000_000


class Refused(ValueError):
    """A request that is refused; the text has the reason and the remedy."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a request.

    Attributes:
      kind: 'text', 'int', 'float', 'ints' (one a stage), 'pair' (two numbers), 'choice', 'picture' or 'mask'.
      help: one line.
      low, high: the range of a number.
      default: of a field that is left out; None: the model's.
      needed: the field may not be left out.
      choices: the texts of a 'choice'.
    """

    kind: str
    help: str
    low: float = 0
    high: float = 0
    default: object = None
    needed: bool = False
    choices: tuple[str, ...] = ()


def _of_setting(setting: Setting) -> Field | None:
    """A setting's field, with the studio's limits; None for one without bounds or choices."""
    if isinstance(setting.kind, tuple):
        return Field("choice", setting.help, choices=setting.kind)
    high = min(setting.high, _MOST.get(setting.name, math.inf))
    if not (math.isfinite(setting.low) and math.isfinite(high)):
        return None
    kind = {int: "int", float: "float", "list": "ints", "pair": "pair"}[setting.kind]
    return Field(kind, setting.help, setting.low, high)


# The studio's maximum of a setting of sampling, where it is less than a stage's.
_MOST = {"num_steps": MAX_STEPS, "guidance_scale": 20, "num_candidates": 8, "temperature": 10}
SAMPLING = {name: field for name, setting in SETTINGS.items() if (field := _of_setting(setting))}
_PICTURE = Field("picture", f"a {pictures.FORMATS} file", needed=True)
_CAPTION = Field("text", "what to draw", needed=True)
_FIELDS = {
    "picture": _PICTURE,
    "first": _PICTURE,
    "second": _PICTURE,
    "mask": Field("mask", "a file of the picture's size; opaque white is drawn anew", needed=True),
    "caption": _CAPTION,
    "source": Field("text", "what the picture shows"),
    "target": Field("text", "what it should show", needed=True),
    "eta": Field("float", "how much is left to chance", 0, 1, 1.0),
    "scale": Field("float", "the share of the side that the picture takes", 0.2, 0.9, 0.5),
    "theta": Field("float", "how far to go", 0.05, 1, 0.5),
    "strength": Field("float", "the share of the steps that is taken", 0.05, 1, 1.0),
    "n": Field("int", "pictures", 1, MAX_PICTURES, 4),
    "frames": Field("int", "pictures on the way", 2, MAX_PICTURES + 1, 7),
    "seed": Field("int", "the same seed gives the same pictures", 0, 2**32 - 1, 0),
    "guidance_scale": SAMPLING["guidance_scale"],
    "num_steps": SAMPLING["decoder_steps"],
}


def _edit(*names: str, **changes: Field) -> dict[str, Field]:
    fields = {name: _FIELDS[name] for name in (*names, "seed", "guidance_scale", "num_steps")}
    return fields | changes


_CREATE = {"caption": _CAPTION, "seed": _FIELDS["seed"]} | SAMPLING
_WHOLE = Field("text", "what the whole picture shows", needed=True)
# action -> its fields
ACTIONS = {
    "create": _CREATE | {"n": _FIELDS["n"]},
    "explain": _CREATE,
    "variations": _edit("picture", "n", "eta", "strength"),
    "inpaint": _edit("picture", "mask", "caption", "n", caption=_WHOLE),
    "outpaint": _edit("picture", "caption", "scale", "n", caption=_WHOLE),
    "textdiff": _edit("picture", "source", "target", "theta", "frames"),
    "interpolate": _edit("first", "second", "frames"),
    "image_to_image": _edit(
        *("picture", "caption", "strength", "n"),
        strength=dataclasses.replace(_FIELDS["strength"], default=0.7),
    ),
    "upscale": {"picture": _PICTURE, "seed": _FIELDS["seed"]},
}


def from_base64(text: str, name: str = "the picture") -> bytes:
    """The bytes of base64: also of a data URL, with line breaks, in the alphabet for URLs.

    Raises Refused for another text; `name` is for the message.
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

    keep_alpha: a picture with transparency stays RGBA. Raises Refused for a file that is no picture or that
    training would not read; `name` is for the message.
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
    """The message for a file of so many bytes."""
    rounded = math.ceil(size / 2**20 * 10) / 10  # upwards: never shown as the limit itself
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
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise Refused(f"{name} has characters that are no text: leave them out")
        return " ".join(value.split())
    if field.kind == "choice":
        if value not in field.choices:
            raise Refused(f"{name} must be one of {', '.join(field.choices)}")
        return value
    if field.kind in ("ints", "pair"):
        value = value.split(",") if isinstance(value, str) else value
        if field.kind == "pair" and (not isinstance(value, list) or len(value) != 2):
            raise Refused(f"{name} must be two numbers, such as 0.3,5")
        if not isinstance(value, list) or not 1 <= len(value) <= 8:
            raise Refused(f"{name} must be whole numbers, such as 4,2")
        kind = "int" if field.kind == "ints" else "float"
        return [_number(name, dataclasses.replace(field, kind=kind), each) for each in value]
    return _number(name, field, value)


def _number(name: str, field: Field, value) -> int | float:
    """The value of a number's field within its limits; Refused otherwise."""
    if isinstance(value, str | bool):
        text = value.strip() if isinstance(value, str) and len(value) <= 20 else ""
        if not text.isdecimal() and not (field.kind == "float" and re.fullmatch(r"\d*\.\d+", text)):
            raise Refused(f"{name} must be a number from {field.low:g} to {field.high:g}")
        value = int(text) if text.isdecimal() else float(text)
    if not isinstance(value, int | float) or (field.kind == "int" and value != value // 1):
        kind = "whole number" if field.kind == "int" else "number"
        raise Refused(f"{name} must be a {kind} from {field.low:g} to {field.high:g}")
    if not field.low <= value <= field.high:
        raise Refused(f"{name} {value} is not allowed: give {field.low:.10g} to {field.high:.10g}")
    return int(value) if field.kind == "int" else float(value)


def check(action: str, request: dict, reads_captions: bool = True) -> dict:
    """The checked fields of a request, with defaults, without those left to the model; Refused otherwise.

    reads_captions: False: the caption may be left out, and is "" then.
    """
    if not isinstance(action, str) or action not in ACTIONS:
        raise Refused(f"no such action: choose one of {', '.join(ACTIONS)}")
    if not isinstance(request, dict):
        raise Refused("a request is a JSON object")
    fields, made = ACTIONS[action], {}
    for name in request:
        if name not in fields:
            raise Refused(f"{str(name)[:40]!r} is no field of {action}: it has {', '.join(fields)}")
    for name, field in fields.items():
        value = request.get(name)
        if name == "caption" and not reads_captions:
            field = dataclasses.replace(field, needed=False, default="")
        if value is None or (value == "" and not field.needed):
            if field.needed:
                raise Refused(f"{name} is missing: give {field.help}")
            value = field.default
        else:
            value = _checked(name, field, value)
        if value is not None:
            made[name] = value
    return made

"""From an encoded picture to the square uint8 arrays of training. PIL and numpy only.

Pictures are resized as by guided-diffusion: while the shorter side is at least twice the target, halve with a
box filter; then resize the shorter side to the target bicubically (PIL's filter is antialiased); then crop
the square. The input of CLIP is only resized bicubically, as in CLIP's training. `low_res` is made from the
full picture, never from a crop.

In training libjpeg halves JPEGs: it decodes at a half, a quarter or an eighth of the size (docs/data.md).
"""

import dataclasses
import io
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle2_jax.data import degradations
from dalle2_jax.data.records import BadRecord
from dalle2_jax.data.splitmix import GAMMA, mix

MAX_PIXELS = 50_000_000
MAX_ASPECT = 20.0
_SIDES = re.compile(r"\b(?:left|right)|左|右", re.IGNORECASE)  # also leftmost, right-handed; not bright
_FORMATS = ("PNG", "JPEG", "WEBP")
ALL_FORMATS = (*_FORMATS, "BMP", "GIF", "TIFF", "PPM")  # of pictures in evaluation
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_ORIENTATION = 0x0112
_TURNED_BY = ("exif", "xmp", "XML:com.adobe.xmp")  # Pillow's entries with an orientation
_TURNS = {  # EXIF orientation -> the transposition to upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The slots of `uniforms`, one for each use of randomness: a new use never changes another.
CAPTION, LANGUAGE, PLACE_X, PLACE_Y, FLIP, CROP_Y, CROP_X, BLUR = range(8)


def uniforms(seed: int, epoch, index) -> np.ndarray:
    """Eight numbers in [0, 1) for each (seed, epoch, record): float64 [..., 8], the slots CAPTION ... BLUR.

    seed: any integer. epoch, index: integer arrays of one shape [...].
    """
    gamma = np.uint64(GAMMA)
    with np.errstate(over="ignore"):
        state = mix(np.uint64(seed % 2**64) + gamma)
        state = mix(state ^ (np.asarray(epoch).astype(np.uint64) + np.uint64(1)) * gamma)
        state = mix(state ^ (np.asarray(index).astype(np.uint64) + np.uint64(1)) * gamma)
        slots = mix(state[..., None] + np.arange(1, 9, dtype=np.uint64) * gamma)
    return (slots >> np.uint64(11)) * 2.0**-53


def decode(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    max_aspect: float = MAX_ASPECT,
    enough: int | None = None,
    formats: tuple[str, ...] = _FORMATS,
    keep_alpha: bool = False,
) -> Image.Image:
    """Decode a file of one of `formats` to an upright RGB picture, transparency laid on white.

    keep_alpha: a picture with transparency becomes RGBA instead. enough: a JPEG is decoded at the smallest of
    1/1, 1/2, 1/4 and 1/8 of its size whose shorter side has so many pixels; None: at full size.

    The header's size is checked before anything is decoded. Raises BadRecord: empty | undecodable | too_large
    (pixels) | too_long (aspect) | animated.
    """
    if not data:
        raise BadRecord("empty")
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        width, height = picture.size
        if width * height > max_pixels:
            raise BadRecord("too_large", f"{width} x {height}")
        if max(width, height) > max_aspect * min(width, height):
            raise BadRecord("too_long", f"{width} x {height}")
        # MPO, a camera's several pictures: the first.
        animated = picture.format != "MPO" and getattr(picture, "is_animated", False)
        if animated and (frames := getattr(picture, "n_frames", 1)) > 1:
            raise BadRecord("animated", f"{frames} frames")
        if picture.mode == "F" or picture.mode == "I" and picture.format == "TIFF":  # no known white
            raise BadRecord("undecodable", "32 bits a channel: save it with 8 or 16")
        if enough and picture.format == "JPEG" and min(width, height) >= 2 * enough:
            picture = _decode_small(picture, min(width, height) // enough)
        picture.load()
        turn = _TURNS.get(_orientation(picture)) if "exif" in picture.info else None
        picture = to_rgb(picture, keep_alpha)
        picture = picture if turn is None else picture.transpose(turn)
        for name in _TURNED_BY:  # so that nothing turns it again
            picture.info.pop(name, None)
        return picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord("too_large", str(error)) from None
    except UnidentifiedImageError:
        names = ["WebP" if name == "WEBP" else name for name in formats]
        raise BadRecord("undecodable", f"no {', '.join(names[:-1])} or {names[-1]} file") from None
    except _DECODE_ERRORS as error:
        raise BadRecord("undecodable", str(error)) from None


def _decode_small(picture: Any, shrink: int) -> Image.Image:
    """A JPEG at most `shrink` times smaller, without the part of its last column and row that lies outside
    the picture (a fraction of a pixel), which libjpeg fills in."""
    _, box = picture.draft(None, (picture.width // shrink, picture.height // shrink))
    size = (int(box[2]), int(box[3]))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC, box=box)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if the EXIF data cannot be read."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except (*_DECODE_ERRORS, KeyError, TypeError):
        return 1


def to_rgb(picture: Image.Image, keep_alpha: bool = False) -> Image.Image:
    """Any mode as RGB: the upper eight of 16 bits, transparency laid on white or, with `keep_alpha`, RGBA."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits a pixel
        upper = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if keep_alpha:
            return picture
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def square(
    picture: Image.Image,
    size: int,
    place: tuple[float, float] | None = None,
    halve: bool = True,
    round_twice: bool = False,
    round_centre: bool = False,
) -> Image.Image:
    """Resize the shorter side to `size` and crop a square, by the rule of this module.

    Args:
        size: side of the square in pixels.
        place: position (x, y) of the square in the free room, in [0, 1); None: the centre.
        halve: halve with a box filter first; False: only bicubic, as for CLIP.
        round_twice: round after the rows and after the columns of that filter, as guided-diffusion does;
            False: once if both sides are even, and once for two halvings: at most 1 off for each halving.
        round_centre: the centre begins at half of the room, rounded half to even (torchvision's CenterCrop,
            in OpenAI's CLIP); False: rounded down. The two differ where the room is 4k + 3 pixels.
    """
    while halve and min(picture.size) >= 2 * size:
        if round_twice or picture.width % 2 or picture.height % 2:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        else:  # means of 4 or 16 pixels, in a third of the time
            twice = min(picture.size) >= 4 * size and picture.width % 4 == picture.height % 4 == 0
            picture = picture.reduce(4 if twice else 2)
    if min(picture.size) != size:
        scaled = (size * side / min(picture.size) for side in picture.size)
        # CLIP truncates the longer side.
        width, height = (max(size, round(side) if halve else int(side)) for side in scaled)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    room_x, room_y = picture.width - size, picture.height - size
    if not room_x and not room_y:
        return picture
    left, top = (round(room / 2) if round_centre else room // 2 for room in (room_x, room_y))
    if place is not None:
        left, top = int(place[0] * (room_x + 1)), int(place[1] * (room_y + 1))
    return picture.crop((left, top, left + size, top + size))


def names_sides(captions: dict[str, tuple[str, ...]]) -> bool:
    """Whether a caption of a record, in any language, says left or right."""
    return any(_SIDES.search(text) for texts in captions.values() for text in texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The pictures to make of a record's picture; a size of None: no such picture.

    image_size: side of the full picture. image_sizes: OWNER.image -> side of the picture for the frozen stage
    OWNER. crop_size: `image` is a window of this side, at `crop_yx` of the full picture. low_res_size: side
    of `low_res`. low_res_blur: the probability of its blur, with `low_res_blur_sigma` pixels. low_res_bsr:
    'full' or 'light' degrades it by BSR instead. random_crop: the square's place is random, not the centre.
    flip: mirror half of the pictures.
    """

    image_size: int | None = None
    image_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    low_res_size: int | None = None
    crop_size: int | None = None
    low_res_blur: float = 0.0
    low_res_blur_sigma: float = 0.6
    low_res_bsr: str = ""
    random_crop: bool = False
    flip: bool = False

    @property
    def enough(self) -> int | None:
        """The shorter side that suffices for `decode`; None: frozen stages' pictures need the full size."""
        return None if self.image_sizes else self.image_size

    @property
    def degrades(self) -> bool:
        """Whether low_res is blurred or degraded."""
        return bool(self.low_res_blur or self.low_res_bsr)

    def make(self, picture: Image.Image, draws: np.ndarray, may_flip: bool = True) -> dict[str, np.ndarray]:
        """The pictures of one record, of those with a size.

        picture: RGB. draws: [8] from `uniforms`. may_flip: False if a caption names sides. Returns image
        uint8 [H, W, 3], OWNER.image uint8, low_res uint8 (degraded: float32 in [-1, 1]), crop_yx int32 [2].
        """
        place = (draws[PLACE_X], draws[PLACE_Y]) if self.random_crop else None
        if self.flip and may_flip and draws[FLIP] < 0.5:
            picture = ImageOps.mirror(picture)
        made = {}
        for name, side in self.image_sizes.items():
            made[name] = np.asarray(square(picture, side, place, halve=False))
        if not self.image_size:
            return made
        full = square(picture, self.image_size, place)
        if self.low_res_size:
            made["low_res"] = self._low_res(full, self.low_res_size, draws)
        image = np.asarray(full)
        if self.crop_size:
            room = self.image_size - self.crop_size
            top, left = int(draws[CROP_Y] * (room + 1)), int(draws[CROP_X] * (room + 1))
            image = image[top : top + self.crop_size, left : left + self.crop_size]
            made["crop_yx"] = np.array([top, left], np.int32)
        made["image"] = image
        return made

    def _low_res(self, full: Image.Image, size: int, draws: np.ndarray) -> np.ndarray:
        if self.low_res_bsr:
            rng = np.random.default_rng(int(draws[BLUR] * 2**53))
            scaled = np.asarray(full, np.float32) / 255
            return degradations.bsr(scaled, full.width // size, rng, self.low_res_bsr) * 2 - 1
        low_res = np.asarray(full.resize((size, size), Image.Resampling.BICUBIC))
        if not self.low_res_blur:
            return low_res
        scaled = low_res.astype(np.float32) / 255
        if draws[BLUR] < self.low_res_blur:
            scaled = degradations.gaussian_blur(scaled, self.low_res_blur_sigma)
        return scaled * 2 - 1

"""From an encoded picture to the square uint8 arrays that training reads. PIL and numpy only.

One rule for resizing, that of guided-diffusion: while the shorter side is at least twice the target, halve
the picture with a box filter; then resize bicubically (PIL's, which is antialiased) so that the shorter
side is the target; then crop the square. The input of CLIP is resized bicubically in one go instead, as
CLIP was trained. `low_res` is made from the finished full picture, never from a crop of it, so that
crop(image) and crop_yx refer to the same picture.

Training lets libjpeg do the halving of a JPEG: it decodes at a half, a quarter or an eighth. docs/data.md
says what that changes.
"""

import dataclasses
import io
import re
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle2_jax.data import degradations
from dalle2_jax.data.records import BadRecord
from dalle2_jax.data.splitmix import GAMMA, mix

MAX_PIXELS = 50_000_000
MAX_ASPECT = 20.0
_SIDES = re.compile(r"\b(?:left|right)|左|右", re.IGNORECASE)  # also leftmost, right-handed; not bright
_FORMATS = ("PNG", "JPEG", "WEBP")
ALL_FORMATS = (*_FORMATS, "BMP", "GIF", "TIFF", "PPM")  # that pictures to measure may have
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_ORIENTATION = 0x0112
_TURNED_BY = ("exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for an orientation
_TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The slots of `uniforms`: one draw each, so that a new use of randomness never shifts another.
CAPTION, LANGUAGE, PLACE_X, PLACE_Y, FLIP, CROP_Y, CROP_X, BLUR = range(8)


def uniforms(seed: int, epoch, index) -> np.ndarray:
    """Eight numbers in [0, 1) for each (seed, epoch, record), a pure function of the three.

    Args:
        seed: any integer. epoch, index: integer arrays of one shape [...].

    Returns:
        float64 [..., 8], the slots CAPTION ... BLUR.
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

    keep_alpha: a picture with transparency becomes RGBA instead.

    The size is read from the header and checked before anything is decoded. A JPEG is decoded at the smallest
    of 1/1, 1/2, 1/4 and 1/8 of its size whose shorter side has `enough` pixels, where that is given.

    Raises:
        BadRecord: empty | undecodable | too_large (pixels) | too_long (aspect) | animated.
    """
    if not data:
        raise BadRecord("empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord("too_large", str(error)) from None
    except UnidentifiedImageError:
        names = ["WebP" if name == "WEBP" else name for name in formats]
        raise BadRecord("undecodable", f"no {', '.join(names[:-1])} or {names[-1]} file") from None
    except _DECODE_ERRORS as error:
        raise BadRecord("undecodable", str(error)) from None
    width, height = picture.size
    if width * height > max_pixels:
        raise BadRecord("too_large", f"{width} x {height}")
    if max(width, height) > max_aspect * min(width, height):
        raise BadRecord("too_long", f"{width} x {height}")
    try:
        # Of a camera's MPO, take the first.
        animated = picture.format != "MPO" and getattr(picture, "is_animated", False)
        frames = picture.n_frames if animated else 1
    except _DECODE_ERRORS as error:
        raise BadRecord("undecodable", str(error)) from None
    if frames > 1:
        raise BadRecord("animated", f"{frames} frames")
    if picture.mode == "F" or picture.mode == "I" and picture.format == "TIFF":
        # What is white is nowhere said.
        raise BadRecord("undecodable", "32 bits a channel: save it with 8 or 16")
    try:
        if enough and picture.format == "JPEG" and min(width, height) >= 2 * enough:
            picture = _decode_small(picture, min(width, height) // enough)
        picture.load()
        turn = _TURNS.get(_orientation(picture)) if "exif" in picture.info else None
        picture = to_rgb(picture, keep_alpha)
        picture = picture if turn is None else picture.transpose(turn)
        for name in _TURNED_BY:  # it is upright now, and nobody shall turn it again
            picture.info.pop(name, None)
        return picture
    except _DECODE_ERRORS as error:
        raise BadRecord("undecodable", str(error)) from None


def _decode_small(picture: Image.Image, shrink: int) -> Image.Image:
    """A JPEG at most `shrink` times smaller. libjpeg completes the last column and row with what lies
    outside: that is cut off, to the fraction of a pixel."""
    _, box = picture.draft(None, (picture.width // shrink, picture.height // shrink))
    size = (int(box[2]), int(box[3]))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC, box=box)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where the EXIF data cannot be read."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except (*_DECODE_ERRORS, KeyError, TypeError):
        return 1


def to_rgb(picture: Image.Image, keep_alpha: bool = False) -> Image.Image:
    """Any mode as RGB: the upper eight of 16 bits, transparency laid on white or, with `keep_alpha`, RGBA."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits a pixel: keep the upper eight
        return Image.fromarray(
            (np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        ).convert("RGB")
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
) -> Image.Image:
    """Resize the shorter side to `size` and crop a square, by the rule of this module.

    Args:
        size: side of the square in pixels.
        place: where in the free room the square lies, (x, y) in [0, 1); None for the centre.
        halve: halve with a box filter first; False resizes bicubically in one go, as CLIP.
        round_twice: round after the rows and again after the columns of that filter, as guided-diffusion;
            else once where both sides are even, and once for two halvings. A value differs by at most 1 for
            each halving.
    """
    while halve and min(picture.size) >= 2 * size:
        if round_twice or picture.width % 2 or picture.height % 2:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        else:  # means of 4 or 16 pixels, in a third of the time
            twice = min(picture.size) >= 4 * size and picture.width % 4 == picture.height % 4 == 0
            picture = picture.reduce(4 if twice else 2)
    if min(picture.size) != size:
        to_whole, shorter = (
            round if halve else int,
            min(picture.size),
        )  # CLIP cuts the longer side's fraction off
        new_size = tuple(max(size, to_whole(size * side / shorter)) for side in picture.size)
        picture = picture.resize(new_size, Image.Resampling.BICUBIC)
    room_x, room_y = picture.width - size, picture.height - size
    if not room_x and not room_y:
        return picture
    left, top = (
        (room_x // 2, room_y // 2)
        if place is None
        else (int(place[0] * (room_x + 1)), int(place[1] * (room_y + 1)))
    )
    return picture.crop((left, top, left + size, top + size))


def names_sides(captions: dict[str, tuple[str, ...]]) -> bool:
    """Whether any caption of a record, in any language, says left or right."""
    return any(_SIDES.search(text) for texts in captions.values() for text in texts)


@dataclasses.dataclass(frozen=True)
class Views:
    """Which pictures to make of one: None leaves a picture out.

    image_size: side of the full picture. image_sizes: field, such as clip.image -> side of the picture that a
    frozen stage reads. crop_size: `image` is a window of this side, at `crop_yx` of the
    full picture. low_res_size: side of `low_res`. low_res_blur: probability that it is blurred, with
    `low_res_blur_sigma` pixels. low_res_bsr: 'full' or 'light' degrades it by BSR instead. random_crop:
    whether the square lies anywhere in the picture, or in its centre. flip: mirror half of the pictures.
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
        """The shorter side with which these pictures can be made by halving alone (`decode`); None where a
        frozen stage's is among them, which is made of the whole picture."""
        return None if self.image_sizes else self.image_size

    @property
    def degrades(self) -> bool:
        """Whether low_res is more than a smaller picture."""
        return bool(self.low_res_blur or self.low_res_bsr)

    def make(self, picture: Image.Image, draws: np.ndarray, may_flip: bool = True) -> dict[str, np.ndarray]:
        """The pictures of one record.

        Args:
            picture: RGB. draws: [8] from `uniforms`. may_flip: False where a caption names sides.

        Returns:
            image uint8 [H, W, 3], clip.image uint8, low_res uint8 (float32 in [-1, 1] where it is
            degraded), crop_yx int32 [2]: those that were asked for.
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
            made["low_res"] = self._low_res(full, draws)
        image = np.asarray(full)
        if self.crop_size:
            room = self.image_size - self.crop_size
            top, left = int(draws[CROP_Y] * (room + 1)), int(draws[CROP_X] * (room + 1))
            image = image[top : top + self.crop_size, left : left + self.crop_size]
            made["crop_yx"] = np.array([top, left], np.int32)
        made["image"] = image
        return made

    def _low_res(self, full: Image.Image, draws: np.ndarray) -> np.ndarray:
        if self.low_res_bsr:
            rng = np.random.default_rng(int(draws[BLUR] * 2**53))
            scaled = np.asarray(full, np.float32) / 255
            factor = self.image_size // self.low_res_size
            return degradations.bsr(scaled, factor, rng, self.low_res_bsr) * 2 - 1
        low_res = np.asarray(full.resize((self.low_res_size, self.low_res_size), Image.Resampling.BICUBIC))
        if not self.low_res_blur:
            return low_res
        scaled = low_res.astype(np.float32) / 255
        if draws[BLUR] < self.low_res_blur:
            scaled = degradations.gaussian_blur(scaled, self.low_res_blur_sigma)
        return scaled * 2 - 1

"""Picture files and masks of any kind, made square and of the size that a stage reads."""

import os
import re

import numpy as np
from etils import epath

from dalle2_jax.runtime import files

FITS = ("crop", "pad")
FORMATS = "PNG, JPEG or WebP"
ALL_WHITE = "the mask is white all over the picture: nothing of it is kept. Paint black what is to be kept"
SHAPES = ((), (3,), (4,))  # channels of a mask: none, or those of a picture
# first bytes of a file -> its format, of common formats that are not read
_BEGINNINGS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "a Photoshop document",
    b"gimp xcf": "a GIMP document",
    b"\0\0\1\0": "an icon (ICO)",
    b"\xff\n": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"%PDF": "PDF",
    b"PK\3\4": "a zip archive",
}


def decode_picture(data: bytes, name: str, max_pixels: int | None = None, keep_alpha: bool = False):
    """The PIL picture (RGB, upright) of a file's bytes; `name` is for messages.

    max_pixels: None: the limit of training. keep_alpha: a picture with transparency stays RGBA. Raises
    ValueError with the fault of the file and its remedy.
    """
    from dalle2_jax.data import records, transforms

    max_pixels = max_pixels or transforms.MAX_PIXELS
    try:
        return transforms.decode(data, max_pixels, keep_alpha=keep_alpha)
    except records.BadRecord as error:
        # Pillow's message for a size that it refuses
        detail = re.sub(r"Image size \((\d+) pixels\).*", r"\1", error.detail)
        why = {
            "empty": "is empty: the file has no bytes",
            "too_large": f"has too many pixels ({detail}): at most {max_pixels / 1e6:.0f} million are "
            "allowed, so make it smaller",
            "too_long": f"is too long and narrow ({error.detail}): the longer side may be at most "
            f"{transforms.MAX_ASPECT:.0f} times the shorter, so crop it",
            "animated": f"is animated ({error.detail}): save one frame as a still picture",
        }.get(error.reason)
        if why is None:
            why = f"cannot be read as a picture: the file is {_unreadable(data, error.detail)}"
        raise ValueError(f"{name} {why}") from None


def _unreadable(data: bytes, detail: str) -> str:
    """The fault of a file that is no readable picture, by its first bytes, and its remedy."""
    webp = (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
    if webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return f"cut off or damaged ({detail}); save or send it again"
    found = files.not_arrived(data[:1024])
    if found == "git_lfs_pointer":
        return "a pointer that git-lfs left; fetch the picture with git lfs pull"
    if found == "web_page":
        return "a web page; download the picture itself"
    return f"{_format(data) or 'no picture of a known format'}; save it as {FORMATS}"


def _format(data: bytes) -> str | None:
    """The format of a file that is not PNG, JPEG or WebP, by its first bytes; None: unknown."""
    if data[4:8] == b"ftyp":  # the box that begins every file of the MP4 family names its brand
        brands = {b"avif": "AVIF", b"avis": "AVIF", b"mif1": "HEIC", b"msf1": "HEIC"}
        brand = data[8:12]
        return brands.get(brand, "HEIC" if brand[:2] == b"he" else "a video (MP4)")
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in start:
        return "SVG"
    return next((name for begin, name in _BEGINNINGS.items() if data.startswith(begin)), None)


def read_picture(path: str | os.PathLike):
    """The PIL picture of a file; ValueError for a file that is no picture, or too large."""
    return decode_picture(epath.Path(files.expand(path)).read_bytes(), str(path))


def read_mask(text: str, like: tuple[int, int]):
    """The mask of `text`: a picture's file, or a box 'left,top,right,bottom' in shares of the sides.

    like: (width, height) of the picture. Returns a PIL picture, with its transparency, or bool [height,
    width], for `repaint_mask`. Raises ValueError for an empty box and for a file that is no picture,
    FileNotFoundError for a missing file.
    """
    parts = text.split(",")
    try:
        left, top, right, bottom = (float(part) for part in parts)
    except ValueError:
        if len(parts) == 4 and not epath.Path(files.expand(text)).exists():
            raise ValueError(f"mask {text!r} is no file, nor a box such as '0.5,0,1,1'") from None
        return decode_picture(epath.Path(files.expand(text)).read_bytes(), f"mask {text}", keep_alpha=True)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"box {text!r} must be left,top,right,bottom with 0 <= left < right <= 1, top < bottom"
        )
    width, height = like
    mask = np.zeros((height, width), bool)
    mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return mask


def repaint_mask(mask, like: tuple[int, int] | None = None) -> np.ndarray:
    """bool [H, W], True where the mask is opaque white: there the picture is drawn anew.

    mask: bool [H, W]; uint8 [H, W]; or a picture: PIL, of any mode, or uint8 [H, W, 3 or 4]. A pixel is white
    where its darkest channel, laid on black where it is transparent, is above 127. like: (width, height) of
    the picture.

    Raises ValueError for a mask without white, for a size other than `like`, and for a mask of the opposite
    convention, which draws transparent parts anew.
    """
    from PIL import Image, ImageOps

    from dalle2_jax.data import transforms

    if not isinstance(mask, Image.Image):
        mask = np.asarray(mask)
        if mask.dtype not in (bool, np.uint8) or mask.ndim not in (2, 3) or mask.shape[2:] not in SHAPES:
            raise ValueError(
                "a mask must be a picture, or bool or uint8 [H, W] (uint8: white is 255), "
                f"not {mask.dtype} {list(mask.shape)}"
            )
        if mask.ndim == 2:
            return _checked(mask if mask.dtype == bool else mask > 127, mask, like)
        mask = Image.fromarray(mask if mask.dtype == np.uint8 else mask.astype(np.uint8) * 255)
    values = np.asarray(transforms.to_rgb(ImageOps.exif_transpose(mask), keep_alpha=True))
    white = values[..., :3].min(axis=-1)
    if values.shape[-1] == 4:
        alpha = values[..., 3]
        white = (white.astype(int) * alpha // 255).astype(np.uint8)
        _check_convention(values[..., :3], alpha > 127, white > 127)
    return _checked(white > 127, white, like)


def _check_convention(rgb: np.ndarray, opaque: np.ndarray, white: np.ndarray) -> None:
    """ValueError for a mask with transparent parts that may be something else than strokes on a layer.

    rgb: uint8 [H, W, 3]. opaque, white: bool [H, W]. A layer of strokes is black and white where it is
    opaque. A picture has colours or middle greys there. A hole in something opaque touches no border.
    """
    if opaque.all():
        return
    border = np.concatenate([opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]])
    shown = rgb[opaque].astype(int)
    coloured = (shown.max(axis=-1) - shown.min(axis=-1) > 64).mean() if len(shown) else 0
    grey = ((shown.mean(axis=-1) > 48) & (shown.mean(axis=-1) < 208)).mean() if len(shown) else 0
    if not len(shown):
        found = "is transparent all over"
    elif coloured > 0.005 or grey > 0.1:  # the smooth edges of strokes have some grey, too
        found = "is a picture with transparent parts"
    elif border.all():
        found = "is opaque with a transparent hole"
    elif not white.any():
        found = "has transparent parts and no opaque white"
    else:
        return
    raise ValueError(
        f"the mask {found}. Here opaque white is drawn anew and all else is kept; elsewhere, as in OpenAI's "
        "image edits, transparent parts are drawn anew. Paint white what is to be drawn anew, on black or on "
        "a transparent layer. To use the transparent parts, make them white and all else black"
    )


def _checked(marked: np.ndarray, values: np.ndarray, like: tuple[int, int] | None) -> np.ndarray:
    """`marked` bool [H, W], made of `values` [H, W]; ValueError if it is empty or not of the size `like`."""
    if like is not None and marked.shape[::-1] != tuple(like):
        found = "x".join(str(side) for side in marked.shape[::-1])
        raise ValueError(f"the mask is {found}, the picture {like[0]}x{like[1]}: make them one size")
    if marked.any():
        return marked
    most = "" if values.dtype == bool else f"; its brightest pixel is {values.max(initial=0)}, white is 255"
    raise ValueError(f"the mask is empty: paint white what is to be drawn anew{most}")


def whole_picture(image) -> np.ndarray:
    """A PIL picture or uint8 [H, W, 3] as uint8 [H, W, 3]: upright, transparency on white."""
    from PIL import Image, ImageOps

    from dalle2_jax.data import transforms

    if isinstance(image, Image.Image):
        return np.asarray(transforms.to_rgb(ImageOps.exif_transpose(image)))
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"a picture must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image


def square_picture(image, size: int, fit: str = "crop", halve: bool = True) -> np.ndarray:
    """A PIL picture or uint8 [H, W, 3] as uint8 [size, size, 3]: upright, transparency on white.

    fit: 'crop' takes the central square, 'pad' adds white borders. halve: see `transforms.square`; False is
    the way of OpenAI's CLIP.
    """
    from PIL import Image, ImageOps

    from dalle2_jax.data import transforms

    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown; choose one of {', '.join(FITS)}")
    image = Image.fromarray(whole_picture(image))
    if fit == "pad" and image.width != image.height:
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    return np.asarray(transforms.square(image, size, halve=halve, round_centre=not halve))


def square_mask(mask, size: int, like: tuple[int, int], fit: str = "crop") -> np.ndarray:
    """`repaint_mask` as bool [size, size]: a pixel is drawn anew if any pixel that it covers is."""
    return shrink_mask(_squared(repaint_mask(mask, like), fit), size)


def keeps_nothing(mask: np.ndarray, fit: str = "crop") -> bool:
    """Whether a mask bool [H, W] is white all over the square that is drawn."""
    return bool(mask.all() or _squared(mask, fit).all())  # 'pad' adds black borders


def _squared(mask: np.ndarray, fit: str) -> np.ndarray:
    """bool [H, W] -> bool [s, s], cropped or padded as `square_picture` does with the picture."""
    height, width = mask.shape
    side = max(mask.shape) if fit == "pad" else min(mask.shape)
    top, left = abs(side - height) // 2, abs(side - width) // 2
    if fit == "pad":
        return np.pad(mask, ((top, side - height - top), (left, side - width - left)))
    square = mask[top : top + side, left : left + side]
    if not square.any():
        raise ValueError("the mask has no white in the central square: move it there, or use fit 'pad'")
    return square


def shrink_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool [s, s] -> bool [size, size], True where any pixel that it covers is True."""
    side = mask.shape[0]
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    low = np.floor(np.arange(size) * side / size).astype(int)
    high = np.maximum(np.ceil(np.arange(1, size + 1) * side / size).astype(int), low + 1)
    covered = sums[high][:, high] - sums[low][:, high] - sums[high][:, low] + sums[low][:, low]
    return covered > 0

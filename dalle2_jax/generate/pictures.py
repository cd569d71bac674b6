"""Pictures and masks as people have them, made square and of the size that a stage reads."""

import os
import re

import numpy as np
from etils import epath

from dalle2_jax.runtime import files

FITS = ("crop", "pad")
FORMATS = "PNG, JPEG or WebP"
ALL_WHITE = "the mask is white all over the picture: nothing of it is kept, and black is what would be"
SHAPES = ((), (3,), (4,))  # channels of a mask: none, or those of a picture
# how a file begins -> what it is, of those that people send and that are not read
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
    """The PIL picture (RGB, upright) of a file's bytes; `name` is what messages call it.

    max_pixels: the most that is allowed; None is what training allows. keep_alpha: a picture with
    transparency stays RGBA. Raises ValueError that says what is wrong with the file, and what to change.
    """
    from dalle2_jax.data import records, transforms

    max_pixels = max_pixels or transforms.MAX_PIXELS
    try:
        return transforms.decode(data, max_pixels, keep_alpha=keep_alpha)
    except records.BadRecord as error:
        # Pillow's own words for a size that it does not even read
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
            why = f"cannot be read as a picture: {_unreadable(data, error.detail)}"
        raise ValueError(f"{name} {why}") from None


def _unreadable(data: bytes, detail: str) -> str:
    """Why the bytes of a file are no picture that is read here, by how they begin."""
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4], data[8:12]) == (
        b"RIFF",
        b"WEBP",
    ):
        return f"the file is cut off or damaged ({detail}); save or send it again"
    found = files.not_arrived(data[:1024])
    if found == "git_lfs_pointer":
        return "the file is a pointer that git-lfs left; fetch the picture with git lfs pull"
    if found == "web_page":
        return "the file is a web page; download the picture itself"
    kind = _kind(data)
    found = f"the file is {kind}" if kind else "the file is no picture of a known format"
    return f"{found}; save it as {FORMATS}"


def _kind(data: bytes) -> str | None:
    """What a file is, by its first bytes, where it is no PNG, JPEG or WebP file; None for an unknown kind."""
    if data[4:8] == b"ftyp":  # the box that begins every file of the MP4 family names its brand
        brands = {b"avif": "AVIF", b"avis": "AVIF", b"mif1": "HEIC", b"msf1": "HEIC"}
        brand = data[8:12]
        return brands.get(brand, "HEIC" if brand[:2] == b"he" else "a video (MP4)")
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in start:
        return "SVG"
    return next((name for begin, name in _BEGINNINGS.items() if data.startswith(begin)), None)


def read_picture(path: str | os.PathLike):
    """The PIL picture of a file; ValueError for one that is none, or too large."""
    return decode_picture(epath.Path(files.expand(path)).read_bytes(), str(path))


def read_mask(text: str, like: tuple[int, int]):
    """The mask that `text` names: a picture's file, or a box 'left,top,right,bottom' in shares of the sides.

    like: (width, height) of the picture that a box is for. Returns a PIL picture, which keeps its
    transparency, or bool [height, width]: what `repaint_mask` takes. Raises ValueError for a box that holds
    nothing and for a file that is no picture, FileNotFoundError where there is no file.
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
    """bool [H, W], True where a mask says that the picture is drawn anew: where it is white and opaque.

    mask: bool [H, W]; uint8 [H, W]; or a picture: PIL, of any mode, or uint8 [H, W, 3 or 4]. A pixel is white
    where its darkest channel, laid on black where it is transparent, is above 127. like: (width, height) of
    the picture that the mask belongs to.

    Raises ValueError for a mask without white, for one of another size than `like`, and for one that looks
    like the opposite convention, where transparent parts are drawn anew.
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
        mask = Image.fromarray(mask if mask.dtype == np.uint8 else np.uint8(mask) * 255)
    values = np.asarray(transforms.to_rgb(ImageOps.exif_transpose(mask), keep_alpha=True))
    white = values[..., :3].min(axis=-1)
    if values.shape[-1] == 4:
        alpha = values[..., 3]
        white = np.uint8(white.astype(int) * alpha // 255)
        _check_convention(values[..., :3], alpha > 127, white > 127)
    return _checked(white > 127, white, like)


def _check_convention(rgb: np.ndarray, opaque: np.ndarray, white: np.ndarray) -> None:
    """ValueError for a mask with transparent parts that need not mean strokes on a transparent layer.

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
    """`marked` bool [H, W]; ValueError where it is nowhere True or of another size than `like`.

    values: [H, W], what it was made of.
    """
    if like is not None and marked.shape[::-1] != tuple(like):
        found = "x".join(str(side) for side in marked.shape[::-1])
        raise ValueError(f"the mask is {found}, the picture {like[0]}x{like[1]}: make them one size")
    if marked.any():
        return marked
    told = "" if values.dtype == bool else f"; its brightest pixel is {values.max(initial=0)}, white is 255"
    raise ValueError(f"the mask is empty: paint white what is to be drawn anew{told}")


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
    CLIP's way.
    """
    from PIL import Image, ImageOps

    from dalle2_jax.data import transforms

    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown; choose one of {', '.join(FITS)}")
    image = Image.fromarray(whole_picture(image))
    if fit == "pad" and image.width != image.height:
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    return np.asarray(transforms.square(image, size, halve=halve))


def square_mask(mask, size: int, like: tuple[int, int], fit: str = "crop") -> np.ndarray:
    """A mask, of any kind that `repaint_mask` takes, as bool [size, size], True where it is drawn anew.

    A pixel is drawn anew if any of what it covers is. `like`: (width, height) of the picture that the mask
    belongs to. Raises ValueError for another size, and for what `repaint_mask` refuses.
    """
    return shrink_mask(_squared(repaint_mask(mask, like), fit), size)


def keeps_nothing(mask: np.ndarray, fit: str = "crop") -> bool:
    """Whether a mask bool [H, W] is white all over the square that is drawn."""
    return bool(mask.all() or _squared(mask, fit).all())  # what 'pad' adds is not of the picture


def _squared(mask: np.ndarray, fit: str) -> np.ndarray:
    """bool [H, W] -> bool [s, s], cropped or padded as `square_picture` does with the picture."""
    height, width = mask.shape
    if fit == "pad":
        side = max(mask.shape)
        whole = np.zeros((side, side), bool)
        top, left = (side - height) // 2, (side - width) // 2
        whole[top : top + height, left : left + width] = mask
        return whole
    side = min(mask.shape)
    top, left = (height - side) // 2, (width - side) // 2
    whole = mask[top : top + side, left : left + side]
    if not whole.any():
        raise ValueError("the mask has no white in the central square: move it there, or use fit 'pad'")
    return whole


def shrink_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool [s, s] -> bool [size, size], True where any pixel that is covered is True."""
    side = mask.shape[0]
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    low = np.floor(np.arange(size) * side / size).astype(int)
    high = np.maximum(np.ceil(np.arange(1, size + 1) * side / size).astype(int), low + 1)
    covered = sums[high][:, high] - sums[low][:, high] - sums[high][:, low] + sums[low][:, low]
    return covered > 0

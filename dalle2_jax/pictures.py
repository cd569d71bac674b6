"""Pictures and masks as people have them, made square and of the size that a stage reads."""

import os

import numpy as np
from etils import epath

from dalle2_jax import files

FITS = ("crop", "pad")


def read_picture(path: str | os.PathLike):
    """The PIL picture of a file; ValueError for one that is none, or too large."""
    from dalle2_jax.data import records, transforms

    try:
        return transforms.decode(epath.Path(files.expand(path)).read_bytes())
    except records.BadRecord as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


def read_mask(text: str, like: tuple[int, int]):
    """The mask that `text` names: a picture's file, or a box 'left,top,right,bottom' in shares of the sides.

    like: (width, height) of the picture that a box is for. Returns a PIL picture, or bool [height, width].
    Raises ValueError for a box that holds nothing, FileNotFoundError where there is no file.
    """
    parts = text.split(",")
    try:
        left, top, right, bottom = (float(part) for part in parts)
    except ValueError:
        if len(parts) == 4 and not epath.Path(files.expand(text)).exists():
            raise ValueError(f"mask {text!r} is no file, nor a box such as '0.5,0,1,1'") from None
        return read_picture(text)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"box {text!r} must be left,top,right,bottom with 0 <= left < right <= 1, top < bottom"
        )
    width, height = like
    mask = np.zeros((height, width), bool)
    mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return mask


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
    """A mask (PIL picture, or bool or uint8 [H, W]; white is repainted) as bool [size, size].

    A pixel is repainted if any of what it covers is. `like`: (width, height) of the picture that it belongs
    to. Raises ValueError for another size, and for a mask without white.
    """
    from PIL import Image

    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) > 127
    mask = np.asarray(mask)
    mask = mask if mask.dtype == bool else mask > 127
    if mask.ndim != 2 or mask.shape[::-1] != tuple(like):
        found = "x".join(str(side) for side in mask.shape[::-1])
        raise ValueError(f"the mask is {found}, the picture {like[0]}x{like[1]}: make them one size")
    if not mask.any():
        raise ValueError("the mask is empty: paint white what is to be drawn anew")
    height, width = mask.shape
    if fit == "pad":
        side = max(mask.shape)
        whole = np.zeros((side, side), bool)
        top, left = (side - height) // 2, (side - width) // 2
        whole[top : top + height, left : left + width] = mask
    else:
        side = min(mask.shape)
        top, left = (height - side) // 2, (width - side) // 2
        whole = mask[top : top + side, left : left + side]
        if not whole.any():
            raise ValueError("the mask has no white in the central square: move it there, or use fit 'pad'")
    return shrink_mask(whole, size)


def shrink_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool [s, s] -> bool [size, size], True where any pixel that is covered is True."""
    side = mask.shape[0]
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    low = np.floor(np.arange(size) * side / size).astype(int)
    high = np.maximum(np.ceil(np.arange(1, size + 1) * side / size).astype(int), low + 1)
    covered = sums[high][:, high] - sums[low][:, high] - sums[high][:, low] + sums[low][:, low]
    return covered > 0

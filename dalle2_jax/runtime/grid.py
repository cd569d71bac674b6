"""Grids of pictures with labels, and PNG files.

Labels are drawn with Pillow's font, or with a font of the system that has the characters it lacks (Chinese,
accents). Characters that no font has are left out.
"""

import bisect
import contextlib
import functools
import glob
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dalle2_jax.runtime.files import AnyPath

# Usual places of fonts with more than Latin letters, the most complete first.
SYSTEM_FONTS = (
    "/usr/share/fonts/**/NotoSansCJK*Regular*",
    "/usr/share/fonts/**/NotoSansSC*Regular*",
    "/usr/share/fonts/**/SourceHanSans*Regular*",
    "/usr/share/fonts/**/wqy-*.tt*",
    "/usr/share/fonts/**/DroidSansFallback*.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/System/Library/Fonts/STHeiti*.ttc",
    "C:/Windows/Fonts/msyh.tt*",
    "C:/Windows/Fonts/simsun.ttc",
    "/usr/share/fonts/**/DejaVuSans.ttf",
)


def labelled_grid(
    images: np.ndarray,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    min_size: int = 128,
    max_lines: int = 4,
) -> np.ndarray:
    """A grid of images, each with its label below: uint8 [height, width, 3], black text on white.

    Args:
      images: uint8 [N, H, W, 3].
      labels: N texts, wrapped to the width of an image in at most `max_lines` lines; None: no labels. A label
        without a character that a font can draw becomes its number, '#3'.
      columns: images a row; None: about the square root of N.
      min_size: pixels of smaller images are repeated until an image is at least this wide.
    """
    from PIL import Image, ImageDraw

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    count = len(images)
    if labels is not None and len(labels) != count:
        raise ValueError(f"{count} images but {len(labels)} labels")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be >= 1")
    factor = max(1, math.ceil(min_size / images.shape[2]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = images.shape[1:3]
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    size = max(11, min(22, width // 14))
    gap, leading = max(4, width // 32), size + size // 4
    texts = labels if labels is not None else [""] * count
    wrapped = [_wrap(text, size, width, max_lines, f"#{i + 1}") for i, text in enumerate(texts)]
    label_height = max(len(lines) for _, lines in wrapped) * leading + (gap // 2 if labels is not None else 0)
    cell_height, cell_width = height + label_height + gap, width + gap
    canvas = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (font, lines) in enumerate(wrapped):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        canvas.paste(Image.fromarray(images[i]), (x, y))
        for j, line in enumerate(lines):
            draw.text((x, y + height + gap // 2 + j * leading), line, font=font, fill="black")
    return np.asarray(canvas)


def _wrap(label: str, size: int, width: int, max_lines: int, fallback: str) -> tuple[Any, list[str]]:
    """(font, lines): breaks at spaces, or anywhere in text without spaces, such as Chinese.

    A text of more than `max_lines` lines is cut and ends in '...'; the rest of it is not measured.
    """
    text = " ".join(str(label).split())
    most = max_lines * (width + 1)  # a character is at least about a pixel wide
    cut, text = len(text) > most, text[:most]
    font = _font_for(text, size)
    drawable = " ".join("".join(c for c in text if c == " " or _has_glyph(font, c)).split())
    cut, text = cut and bool(drawable), drawable or (fallback if text else "")
    lines, line = [], ""
    for word in text.split(" ") if text else []:
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while len(lines) <= max_lines and (fits := _fitting(font, word, width)) < len(word):
            lines.append(word[:fits])
            word = word[fits:]
        line = word
        if len(lines) > max_lines:  # the rest is not shown
            break
    lines += [line] if line else []
    if len(lines) > max_lines or cut:
        *lines, last = lines[:max_lines]
        lines.append(last[: _fitting(font, last, width - font.getlength("..."))] + "...")
    return font, lines


def _fitting(font, text: str, width: float) -> int:
    """The number of leading characters that fit into `width` pixels, at least one, by binary search."""
    over = range(2, min(len(text), int(width) + 1) + 1)
    return min(1 + bisect.bisect_right(over, width, key=lambda n: font.getlength(text[:n])), len(text))


def _font_for(text: str, size: int) -> Any:
    """The first font that draws all characters of a text, else the one that draws the most."""
    letters = set(text) - {" "}
    best, best_count = None, -1
    for path in (None, *_system_fonts()):
        with contextlib.suppress(OSError):
            font = _open_font(path, size)
            count = sum(_has_glyph(font, c) for c in letters)
            if count > best_count:
                best, best_count = font, count
        if best_count == len(letters):
            break
    return best


@functools.cache
def _open_font(path: str | None, size: int):
    """The font of a file; None: Pillow's."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    paths = [path for pattern in SYSTEM_FONTS for path in sorted(glob.glob(pattern, recursive=True))]
    return tuple(path for path in paths if path.endswith((".ttf", ".ttc", ".otf")))


@functools.lru_cache(maxsize=65536)
def _has_glyph(font, character: str) -> bool:
    """Whether a font draws a character, not its box for missing ones."""
    try:
        missing, drawn = font.getmask("\U0010fffe"), font.getmask(character)
    except (UnicodeEncodeError, OSError):  # Pillow's bitmap font has Latin-1 only
        return False
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


def png_bytes(image: np.ndarray, texts: Mapping[str, str] | None = None) -> bytes:
    """uint8 [H, W, 3] as a PNG file with text entries."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: AnyPath, image: np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """Writes `png_bytes` to a file; makes its folder if needed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image, texts))

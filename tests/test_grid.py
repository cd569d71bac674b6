"""Labelled grids, read back by their pixels."""

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.runtime import grid


def coloured(count, size):
    levels = np.arange(1, count + 1, dtype=np.uint8) * 20
    return np.broadcast_to(levels[:, None, None, None], (count, size, size, 3)).copy()


def places(picture, images):
    """(row, column) of the top-left pixel of each of the one-coloured images."""
    found = []
    for image in images:
        found.append(tuple(np.argwhere((picture == image[0, 0]).all(-1)).min(0)))
    return found


def test_images_stand_whole_in_reading_order():
    images = coloured(5, 128)
    picture = grid.labelled_grid(images, columns=2)
    at = places(picture, images)
    assert at[0][0] == at[1][0] < at[2][0] == at[3][0] < at[4][0]
    assert at[0][1] == at[2][1] == at[4][1] < at[1][1] == at[3][1]
    for (y, x), image in zip(at, images, strict=True):
        np.testing.assert_array_equal(picture[y : y + 128, x : x + 128], image)


def test_small_images_are_enlarged_by_whole_pixels():
    image = np.random.default_rng(0).integers(0, 200, (1, 16, 16, 3), dtype=np.uint8)
    picture = grid.labelled_grid(image, min_size=40)  # the least whole factor that reaches 40 is 3
    (y, x) = np.argwhere((picture != 255).any(-1)).min(0)
    np.testing.assert_array_equal(picture[y : y + 48 : 3, x : x + 48 : 3], image[0])
    np.testing.assert_array_equal(picture[y + 2 : y + 48 : 3, x + 2 : x + 48 : 3], image[0])


def text_pixels(label, **options):
    """Dark pixels below a white image: those of its label."""
    white = np.full((1, 128, 128, 3), 255, np.uint8)
    return int((grid.labelled_grid(white, [label], **options) < 128).all(-1).sum())


def test_labels_are_drawn_and_more_text_is_more_ink():
    assert text_pixels("") == 0
    assert 0 < text_pixels("star") < text_pixels("star star star star star star")


def test_long_labels_wrap_and_end():
    white = np.full((1, 128, 128, 3), 255, np.uint8)
    heights = [grid.labelled_grid(white, ["word " * n], max_lines=3).shape[0] for n in (1, 8, 30, 300)]
    assert heights[0] < heights[1] <= heights[2] == heights[3]
    wide = grid.labelled_grid(white, ["w" * 300], max_lines=3)
    dark = np.argwhere((wide < 128).all(-1))
    assert dark[:, 1].max() < wide.shape[1] - 1  # stays on the canvas


class CountingFont:
    """Six pixels a character; it refuses to measure more than a label can need."""

    measured = 0

    def getlength(self, text: str) -> float:
        self.measured += len(text)
        assert self.measured < 100_000, "a label is measured without end"
        return 6.0 * len(text)


@pytest.mark.parametrize(
    "label",
    [
        *("x" * 1000, "x" * 65536, "星" * 21845, "word " * 13000, "a " * 32768),
        *(" " * 65536 + "x", "x" * 300 + " y" * 30000),
    ],
)
def test_a_label_of_any_length_is_wrapped_by_measuring_little(label, monkeypatch):
    font = CountingFont()
    monkeypatch.setattr(grid, "_font_for", lambda text, size: font)
    monkeypatch.setattr(grid, "_has_glyph", lambda font, character: True)
    _, lines = grid._wrap(label, 11, 128, 4, "#1")
    assert 1 <= len(lines) <= 4 and all(6 * len(line) <= 128 for line in lines)
    text, shown = "".join(label.split()), "".join("".join(lines).split())
    assert shown == text if len(lines) < 4 else shown.endswith("...") and text.startswith(shown[:-3])


def test_text_without_spaces_fills_its_lines(monkeypatch):
    """Chinese, and a long word between short ones; what fits is shown whole."""
    font = CountingFont()
    monkeypatch.setattr(grid, "_font_for", lambda text, size: font)
    monkeypatch.setattr(grid, "_has_glyph", lambda font, character: True)
    chinese = "一只红色的星星在蓝色的圆环上方，背景是绿色的草地和许多小花，天空很蓝。"
    _, lines = grid._wrap(chinese, 11, 128, 4, "#1")
    assert "".join(lines) == chinese and [len(line) for line in lines] == [21, len(chinese) - 21]
    _, lines = grid._wrap("a " + "w" * 30 + " star", 11, 128, 4, "#1")
    assert lines == ["a", "w" * 21, "w" * 9 + " star"]
    _, lines = grid._wrap("one two", 11, 5, 9, "#1")  # narrower than a letter: one a line
    assert lines == [*"onetwo"]


def test_a_picture_with_a_label_of_64_kibibytes_is_drawn():
    images = np.full((2, 64, 64, 3), 200, np.uint8)
    long = grid.labelled_grid(images, ["x" * 65536, "星" * 21845])
    assert long.shape == grid.labelled_grid(images, ["x " * 300, "one"]).shape


def test_a_label_that_no_font_can_draw_becomes_its_number(monkeypatch):
    monkeypatch.setattr(grid, "SYSTEM_FONTS", ())
    grid._system_fonts.cache_clear()
    try:
        assert text_pixels("红色的星星") == text_pixels("#1") > 0
        assert text_pixels("星 star") == text_pixels("star")
    finally:
        grid._system_fonts.cache_clear()


def test_a_font_with_the_glyphs_is_preferred():
    if not any(grid._has_glyph(grid._open_font(path, 14), "é") for path in grid._system_fonts()):
        pytest.skip("no system font with accents")
    assert text_pixels("é") != text_pixels("#1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 8, 8, 3), np.float32),), "uint8"),
        ((np.zeros((8, 8, 3), np.uint8),), r"\[N, H, W, 3\]"),
        ((np.zeros((0, 8, 8, 3), np.uint8),), "uint8"),
        ((np.zeros((2, 8, 8, 3), np.uint8), ["one"]), "2 images but 1 labels"),
        ((np.zeros((2, 8, 8, 3), np.uint8), None, 0), "columns=0"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid.labelled_grid(*arguments)


def test_png_round_trip_with_text(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    grid.save_png(tmp_path / "new" / "a.png", image, {"caption": "红 star"})
    with Image.open(tmp_path / "new" / "a.png") as png:
        np.testing.assert_array_equal(np.asarray(png), image)
        assert png.info["caption"] == "红 star"

"""Pictures become upright RGB squares by one rule, windows line up with the whole, bombs are refused."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dalle2_jax.data import degradations, transforms
from dalle2_jax.data.records import BadRecord
from dalle2_jax.data.transforms import Views
from dalle2_jax.generate.pictures import square_picture
from tests.data.shards_for_tests import encode, noise_picture

CENTRE = np.full(8, 0.5)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG file of width x height black pixels, made without ever holding them."""
    packer = zlib.compressobj(9)
    row, packed = bytes(1 + width * 3), []
    for _ in range(height):
        packed.append(packer.compress(row))
    packed.append(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"".join(packed)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    )


def decoded_alone(data: bytes) -> tuple[float, float, str]:
    """(seconds of CPU, MiB that the process grew by, what was raised) of decoding a file in a fresh process.

    Linux's VmHWM is the most that this process ever held; a process that was just started has no peak behind
    it that could hide the one of decoding.
    """
    code = """
import sys, time
from dalle2_jax.data import transforms
from tests.data.shards_for_tests import encode, noise_picture

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

data, said = sys.stdin.buffer.read(), ""
transforms.decode(encode(noise_picture((8, 8))))  # plugins are loaded
before, started = peak(), time.process_time()
try:
    transforms.decode(data)
except transforms.BadRecord as error:
    said = str(error)
print(time.process_time() - started, (peak() - before) / 1024, said, sep="|")
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], input=data, env=env, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    seconds, mebibytes, said = done.stdout.decode().strip().split("|")
    return float(seconds), float(mebibytes), said


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measured by Linux's /proc")
def test_decompression_bomb():
    data = bomb(16000, 12000)
    assert len(data) < 800_000  # it is a bomb: 576 MB of pixels
    seconds, mebibytes, said = decoded_alone(data)
    assert said.startswith("too_large") and seconds < 0.05 and mebibytes < 20
    _, mebibytes, said = decoded_alone(bomb(4000, 3000))  # the measure sees 36 MB that are allowed
    assert not said and mebibytes > 30
    small = bomb(8000, 6000)  # below PIL's own limit, so that our limit is what refuses it
    with pytest.raises(BadRecord, match="8000 x 6000"):
        transforms.decode(small, max_pixels=40_000_000)


def test_extreme_aspect_is_refused():
    with pytest.raises(BadRecord, match="too_long"):
        transforms.decode(encode(Image.new("RGB", (410, 20))))
    assert transforms.decode(encode(Image.new("RGB", (400, 20)))).size == (400, 20)


def corrupt_files():
    """(name, file, whether any decoder could notice)."""
    jpeg = encode(noise_picture((64, 64)), "JPEG")
    png = encode(noise_picture((64, 64)))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0x10
    return {
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "truncated png": png[: len(png) // 2],
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zero header": bytes(32) + jpeg[32:],
        "empty": b"",
        "flipped png": bytes(flipped),
        "gif": encode(Image.new("P", (8, 8)), "GIF"),
    }


@pytest.mark.parametrize("name", corrupt_files())
def test_corrupt_files_are_bad_records(name):
    with pytest.raises(BadRecord) as caught:
        transforms.decode(corrupt_files()[name])
    assert caught.value.reason == ("empty" if name == "empty" else "undecodable")


def test_animations_are_refused():
    frames = [noise_picture((8, 8), seed) for seed in range(3)]
    for kind in ("PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(BadRecord, match="animated"):
            transforms.decode(data)


def test_weird_modes():
    def mean(data):
        picture = transforms.decode(data)
        assert picture.mode == "RGB"
        return np.asarray(picture).reshape(-1, 3).mean(0)

    half = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    np.testing.assert_allclose(mean(half), (255, 127, 127), atol=1)  # laid on white
    np.testing.assert_allclose(mean(encode(Image.new("LA", (8, 8), (0, 0)))), 255)
    np.testing.assert_allclose(mean(encode(Image.new("LA", (8, 8), (0, 255)))), 0)
    np.testing.assert_allclose(mean(encode(Image.new("L", (8, 8), 77))), 77)
    np.testing.assert_allclose(mean(encode(Image.new("1", (8, 8), 1))), 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    np.testing.assert_allclose(mean(encode(palette)), (0, 255, 0))
    np.testing.assert_allclose(mean(encode(palette, transparency=1)), 255)  # P with tRNS
    grey16 = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert Image.open(io.BytesIO(encode(grey16))).mode.startswith("I")
    np.testing.assert_allclose(mean(encode(grey16)), 128)  # not clipped to 255
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    np.testing.assert_allclose(mean(cmyk), (254, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation, kind):
    picture = Image.fromarray(
        np.kron([[[250, 0, 0], [0, 250, 0], [0, 0, 250]]], np.ones((16, 16, 1))).astype(np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, kind, exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(transforms.decode(data)), np.asarray(expected))
    assert transforms.decode(data).size == ((16, 48) if orientation >= 5 else (48, 16))


def test_square_follows_the_rule_for_a_non_square_picture():
    picture = noise_picture((150, 100))
    fours = np.asarray(picture).astype(int).reshape(50, 2, 75, 2, 3).sum(axis=(1, 3))
    halved = Image.fromarray(((fours + 2) // 4).astype(np.uint8))
    resized = halved.resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        np.asarray(transforms.square(picture, 32)), np.asarray(resized.crop((8, 0, 40, 32)))
    )

    left = transforms.square(picture, 32, place=(0.0, 0.0))
    right = transforms.square(picture, 32, place=(1 - 1e-9, 0.0))
    np.testing.assert_array_equal(np.asarray(left), np.asarray(resized.crop((0, 0, 32, 32))))
    np.testing.assert_array_equal(np.asarray(right), np.asarray(resized.crop((16, 0, 48, 32))))


@pytest.mark.parametrize("room, clip, ours", [(3, 2, 1), (4, 2, 2), (5, 2, 2), (6, 3, 3), (7, 4, 3)])
def test_the_centre_of_clip_is_rounded_half_to_even(room, clip, ours):
    """torchvision's CenterCrop begins at int(round(room / 2))."""
    picture = noise_picture((32 + room, 32))
    pixels = np.asarray(picture)
    np.testing.assert_array_equal(square_picture(picture, 32, halve=False), pixels[:, clip : clip + 32])
    in_training = transforms.square(picture, 32, halve=False)
    np.testing.assert_array_equal(np.asarray(in_training), pixels[:, ours : ours + 32])


def test_halving_may_round_as_guided_diffusion_does():
    picture = noise_picture((64, 64))
    box = picture.resize((32, 32), Image.Resampling.BOX)
    twice = np.asarray(transforms.square(picture, 32, round_twice=True)).astype(int)
    np.testing.assert_array_equal(twice, np.asarray(box))
    once = np.asarray(transforms.square(picture, 32)).astype(int)
    assert 0 < np.abs(twice - once).max() <= 1


def test_two_halvings_at_once_round_once():
    picture = noise_picture((128, 128))
    sums = np.asarray(picture).astype(int).reshape(32, 4, 32, 4, 3).sum(axis=(1, 3))
    once = np.asarray(transforms.square(picture, 32)).astype(int)
    np.testing.assert_array_equal(once, (sums + 8) // 16)
    twice = np.asarray(transforms.square(picture, 32, round_twice=True)).astype(int)
    assert 0 < np.abs(twice - once).max() <= 2


@pytest.mark.parametrize(
    "enough, size",
    [(None, (130, 66)), (67, (130, 66)), (34, (130, 66)), (33, (65, 33)), (16, (32, 16)), (2, (16, 8))],
)
def test_a_jpeg_is_decoded_as_small_as_is_enough(enough, size):
    picture = noise_picture((130, 66))
    assert transforms.decode(encode(picture, "JPEG"), enough=enough).size == size
    for other in ("PNG", "WEBP"):
        assert transforms.decode(encode(picture, other), enough=enough).size == (130, 66)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = transforms.decode(encode(picture, "JPEG", exif=exif), enough=enough)
    assert turned.size == size[::-1]


@pytest.mark.parametrize("size", [48, 64, 128])
@pytest.mark.parametrize("side", [256, 261, 263])
def test_a_jpeg_decoded_small_is_what_halving_makes_of_it(size, side):
    """Of a picture without edges, to a level on average; of odd sides, which PIL's box filter moves by half a
    pixel at each halving, to what resizing makes of it in one go."""
    waves = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8))
    jpeg = encode(waves.resize((side, side), Image.Resampling.BICUBIC), "JPEG", quality=95)
    whole = transforms.decode(jpeg)
    small = transforms.decode(jpeg, enough=Views(image_size=size).enough)
    assert small.width <= side / 2
    expected = np.asarray(transforms.square(whole, size, halve=side % 2 == 0)).astype(float)
    difference = np.abs(np.asarray(transforms.square(small, size)) - expected)
    assert difference.mean() < 1 and difference.max() <= 6, (difference.mean(), difference.max())


def test_clip_sees_the_whole_picture():
    assert Views(image_size=64).enough == 64
    assert Views(image_size=64, image_sizes={"clip.image": 32}).enough is None
    assert Views(image_sizes={"clip.image": 32}).enough is None


def test_a_picture_of_odd_sides_is_halved_by_a_box_filter():
    picture = noise_picture((131, 67))
    halved = picture.resize((65, 33), Image.Resampling.BOX)
    np.testing.assert_array_equal(
        np.asarray(transforms.square(picture, 33)), np.asarray(halved.crop((16, 0, 49, 33)))
    )


@pytest.mark.parametrize("size", [16, 31, 64])
def test_resizing_is_antialiased(size):
    """A checkerboard of single pixels is grey from afar; picking pixels would keep it black and white."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    made = Views(image_size=size, image_sizes={"clip.image": size}).make(picture, CENTRE)
    for name in ("image", "clip.image"):
        assert abs(made[name].astype(float) - 127.5).max() < 20, name
    made = Views(image_size=128, low_res_size=size).make(picture, CENTRE)
    assert abs(made["low_res"].astype(float) - 127.5).max() < 20


def test_windows_line_up_with_the_full_picture():
    """At any offset `image` is the window of the full picture at crop_yx, and low_res is of the whole."""
    picture = noise_picture((90, 130), 3)
    full = Views(image_size=64, low_res_size=16).make(picture, CENTRE)
    corners = set()
    for index in range(100):
        draws = transforms.uniforms(0, np.int64(0), np.int64(index))
        made = Views(image_size=64, low_res_size=16, crop_size=16).make(picture, draws)
        top, left = made["crop_yx"]
        corners.add((int(top), int(left)))
        assert 0 <= top <= 48 and 0 <= left <= 48
        np.testing.assert_array_equal(made["image"], full["image"][top : top + 16, left : left + 16])
        np.testing.assert_array_equal(made["low_res"], full["low_res"])
    assert (
        len(corners) > 90 and len({top % 4 for top, _ in corners}) == 4
    )  # any pixel, not only multiples of the factor


def test_window_of_the_upsampled_low_res_lies_under_the_window():
    """crop(upsample(low_res)) resembles crop(image), at odd offsets too, and no other window."""
    ramp = np.add.outer(np.arange(64) * 3, np.arange(64))
    picture = Image.fromarray(np.stack([ramp, ramp, ramp], -1).astype(np.uint8))
    for index in range(20):
        draws = transforms.uniforms(1, np.int64(0), np.int64(index))
        made = Views(image_size=64, low_res_size=16, crop_size=16).make(picture, draws)
        top, left = made["crop_yx"]
        up = np.asarray(Image.fromarray(made["low_res"]).resize((64, 64), Image.Resampling.BILINEAR)).astype(
            float
        )
        inner = np.s_[4:-4, 4:-4]
        window = up[top : top + 16, left : left + 16][inner]
        assert abs(window - made["image"][inner]).max() < 3
        shifted = up[max(top - 2, 0) : max(top - 2, 0) + 16, left : left + 16][inner]
        if top >= 2:
            assert abs(shifted - made["image"][inner]).max() > 3


def test_blur_taps_and_border():
    np.testing.assert_allclose(degradations.gaussian_taps(0.6), (0.1664, 0.6672, 0.1664), atol=5e-5)
    impulse = np.zeros((5, 7, 3), np.float32)
    impulse[2, 3] = 1
    blurred = degradations.gaussian_blur(impulse, 0.6)
    taps = np.array(degradations.gaussian_taps(0.6))
    np.testing.assert_allclose(blurred[1:4, 2:5, 0], np.outer(taps, taps), atol=1e-6)
    assert abs(blurred.sum() - 3) < 1e-5
    flat = np.full((4, 4, 3), 0.25, np.float32)
    np.testing.assert_allclose(degradations.gaussian_blur(flat, 0.6), flat, atol=1e-6)


def test_blur_comes_as_often_as_asked_and_leaves_the_rest():
    picture = noise_picture((16, 16))
    plain = Views(image_size=16, low_res_size=8).make(picture, CENTRE)["low_res"] / np.float32(127.5) - 1
    changed = 0
    for index in range(200):
        draws = transforms.uniforms(0, np.int64(0), np.int64(index))
        low_res = Views(image_size=16, low_res_size=8, low_res_blur=0.25).make(picture, draws)["low_res"]
        assert low_res.dtype == np.float32
        changed += not np.allclose(low_res, plain, atol=1e-6)
    assert 25 < changed < 75  # 50 +- 4 standard deviations


def test_flip_turns_every_picture_and_spares_records_that_name_sides():
    picture = noise_picture((32, 32))
    sizes = dict(image_size=32, image_sizes={"clip.image": 16}, low_res_size=8)
    views = Views(**sizes)
    plain = views.make(picture, CENTRE)
    flipping = Views(**sizes, flip=True)
    draws = CENTRE.copy()
    draws[transforms.FLIP] = 0.1
    flipped = flipping.make(picture, draws)
    for name in ("image", "clip.image", "low_res"):
        assert not np.array_equal(flipped[name], plain[name])
        # Resizing a mirrored picture may round one level apart from mirroring the resized one.
        assert abs(flipped[name][:, ::-1].astype(int) - plain[name]).max() <= 1, name
    np.testing.assert_array_equal(flipping.make(picture, draws, may_flip=False)["image"], plain["image"])
    sides = ["a star Left of a ring", "backhand index pointing right", "the right-hand path", "左指", "向右"]
    assert all(transforms.names_sides({"en": ("x", text)}) for text in sides)
    assert not transforms.names_sides({"en": ("a bright upright star", "copyright"), "zh": ("圆",)})


def test_uniforms_are_uniform_and_distinct():
    index = np.arange(20_000)
    draws = transforms.uniforms(0, np.zeros_like(index), index)
    assert draws.shape == (20_000, 8) and draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=4 * 12**-0.5 / 20_000**0.5)
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert abs(correlation).max() < 5 / 20_000**0.5
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 5 / 20_000**0.5
    for other in (transforms.uniforms(1, index * 0, index), transforms.uniforms(0, index * 0 + 1, index)):
        assert abs(np.corrcoef(draws[:, 0], other[:, 0])[0, 1]) < 5 / 20_000**0.5
    one = transforms.uniforms(0, np.int64(0), np.int64(17))
    np.testing.assert_array_equal(one, draws[17])


# Formats of pictures to measure


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("BMP", "RGB"),
        ("BMP", "P"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
        ("TIFF", "I;16"),
        ("PPM", "RGB"),
        ("PPM", "I"),
    ],
)
def test_other_formats_are_decoded_where_they_are_asked_for(format, mode):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    if mode == "RGB":
        picture = noise_picture((8, 8))
    elif mode == "P":
        picture = grey.convert("P")
    else:
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    found = transforms.decode(encode(picture, format), formats=transforms.ALL_FORMATS)
    expected = picture if mode == "RGB" else grey.convert("RGB")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    with pytest.raises(BadRecord, match="no PNG, JPEG or WebP file"):  # training reads what it always read
        transforms.decode(encode(picture, format))


def test_other_formats_that_are_refused():
    def refused(data, reason):
        with pytest.raises(BadRecord, match=reason):
            transforms.decode(data, formats=transforms.ALL_FORMATS)

    frames = [noise_picture((8, 8), seed) for seed in (0, 1, 2)]
    for format in ("GIF", "TIFF", "PNG"):
        refused(encode(frames[0], format, save_all=True, append_images=frames[1:]), "animated: 3 frames")
    # What is white in floats and in 32 bits nobody says; black pictures would be measured.
    refused(encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "32 bits a channel")
    refused(encode(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "32 bits a channel")
    refused(b"P6\n8000 8000\n255\n", "too_large: 8000 x 8000")
    for format in ("BMP", "GIF", "TIFF", "PPM"):
        refused(encode(noise_picture((40, 40)), format)[:300], "undecodable")

"""Editing: what the latents of a picture are, what is kept and what is drawn, and what is refused.

A model with random weights draws no pictures, but what must hold of every model holds of it.
"""

import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.edit import __main__ as command_line
from dalle2_jax.edit.latents import Latents, slerp, unit
from dalle2_jax.generate import pictures
from dalle2_jax.models.diffusion import sampling
from tests.tiny_model import make_model

CAPTION = "a red star above a blue ring"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipeline.UnCLIP.load(make_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def picture():
    """A smooth picture of the finished size, 32 x 32."""
    y, x = np.mgrid[:32, :32] / 31
    return np.stack([200 * x, 200 * y, 100 + 100 * x * y], -1).astype(np.uint8)


# Great circles


def test_slerp_walks_the_great_circle_at_even_angles():
    """Trap 13: straight lines between unit vectors leave the sphere."""
    a, b = (unit(np.random.default_rng(i).normal(size=16)) for i in (0, 1))
    walk = np.stack([slerp(a, b, theta) for theta in np.linspace(0, 1, 9)])
    np.testing.assert_allclose(walk[0], a, atol=1e-6)
    np.testing.assert_allclose(walk[-1], b, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(walk, axis=-1), 1, atol=1e-6)
    angles = np.arccos(np.clip((walk[1:] * walk[:-1]).sum(-1), -1, 1))
    np.testing.assert_allclose(angles, np.arccos(a @ b) / 8, atol=1e-4)


def test_slerp_of_noise_keeps_its_length():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 8, 8, 3))
    middle = slerp(a, b, 0.5)
    assert middle.std() == pytest.approx(1.0, abs=0.15) and ((a + b) / 2).std() < 0.85
    np.testing.assert_allclose(slerp(a, a, 0.3), a, atol=1e-6)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)
    with pytest.raises(ValueError, match="shape"):
        slerp(a, b[0], 0.5)


# Pictures and masks


def test_pictures_become_square_as_asked():
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, 5:15] = 255
    assert (pictures.square_picture(wide, 10) == 255).all()
    padded = pictures.square_picture(wide, 20, fit="pad")
    assert (padded[:5] == 255).all() and (padded[5:15, :5] == 0).all() and (padded[15:] == 255).all()
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (pictures.square_picture(clear, 4) == 255).all()
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6
    assert pictures.whole_picture(turned).shape == (6, 4, 3)


def test_a_mask_is_shrunk_to_every_pixel_that_it_touches():
    mask = np.zeros((32, 32), bool)
    mask[9, 17] = True
    small = pictures.shrink_mask(mask, 8)
    assert small.sum() == 1 and small[2, 4]
    assert (pictures.shrink_mask(mask, 32) == mask).all()
    rows, columns = np.nonzero(pictures.shrink_mask(mask, 64))
    assert set(rows) == {18, 19} and set(columns) == {34, 35}
    assert pictures.shrink_mask(mask, 5).sum() >= 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((10, 20), bool), "empty: paint white"),
        (np.ones((20, 10), bool), "mask is 10x20, the picture 20x10"),
    ],
)
def test_masks_that_cannot_be_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        pictures.square_mask(mask, 8, (20, 10))


def test_a_mask_outside_of_what_is_kept_is_refused():
    mask = np.zeros((10, 20), bool)
    mask[:, :5] = True
    with pytest.raises(ValueError, match="no white in the central square"):
        pictures.square_mask(mask, 8, (20, 10))
    assert pictures.square_mask(mask, 20, (20, 10), "pad").any()


def test_a_mask_is_a_file_or_a_box(tmp_path):
    box = pictures.read_mask("0.5,0,1,0.25", (20, 8))
    assert box.shape == (8, 20) and box[:2, 10:].all() and box.sum() == 20
    Image.fromarray(np.uint8(box) * 255).save(tmp_path / "mask.png")
    read = pictures.read_mask(str(tmp_path / "mask.png"), (1, 1))
    np.testing.assert_array_equal(np.asarray(read.convert("L")) > 0, box)
    for text, message in (("0.5,0,0.2,1", "0 <= left < right"), ("a,b,c,d", "no file, nor a box")):
        with pytest.raises(ValueError, match=message):
            pictures.read_mask(text, (20, 8))
    with pytest.raises(FileNotFoundError):
        pictures.read_mask(str(tmp_path / "none.png"), (20, 8))


def layer(kind="RGBA", strokes="white"):
    """Strokes on a transparent layer, 20 x 10: the right half."""
    made = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    made.paste(strokes, (10, 0, 20, 10))
    if kind == "P":
        made = made.convert("P")
        made.info["transparency"] = made.getpixel((0, 0))
    return made.convert(kind)


def holed(colour, hole, size=(20, 10)):
    """A picture of one colour, or a given one, in which the box `hole` is transparent."""
    made = (colour if isinstance(colour, Image.Image) else Image.new("RGB", size, colour)).convert("RGBA")
    made.paste((0, 0, 0, 0), hole)
    return made


RIGHT_HALF = np.arange(20) >= np.full((10, 1), 10)


@pytest.mark.parametrize(
    "mask",
    [
        layer(),
        layer("LA"),
        layer("P"),
        np.asarray(layer()),
        layer().convert("RGB"),
        Image.fromarray(np.uint8(RIGHT_HALF) * 200),
        Image.fromarray(np.uint8(RIGHT_HALF) * 255).convert("1"),
        Image.fromarray(np.uint16(RIGHT_HALF) * 65535),
        np.uint8(RIGHT_HALF) * 128,
        RIGHT_HALF,
    ],
    ids=["RGBA", "LA", "P", "array RGBA", "RGB", "L", "1", "I;16", "uint8", "bool"],
)
def test_opaque_white_repaints_whatever_the_masks_mode(mask):
    np.testing.assert_array_equal(pictures.repaint_mask(mask), RIGHT_HALF)
    np.testing.assert_array_equal(pictures.square_mask(mask, 10, (20, 10)), RIGHT_HALF[:, 5:15])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_masks_file_keeps_its_transparency(tmp_path, kind):
    """The mask that repainted everything: transparency was laid on white before anybody looked."""
    path = tmp_path / f"layer.{kind.lower()}"
    layer().save(path, kind, **dict(lossless=True) if kind == "WEBP" else {})
    np.testing.assert_array_equal(pictures.repaint_mask(pictures.read_mask(str(path), (20, 10))), RIGHT_HALF)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (holed("red", (5, 0, 20, 10)), "a picture with transparent parts"),
        (
            holed(Image.linear_gradient("L").resize((20, 10)), (0, 0, 9, 10)),
            "a picture with transparent parts",
        ),
        (holed("white", (5, 3, 15, 7)), "opaque with a transparent hole"),
        (holed("black", (5, 0, 20, 10)), "transparent parts and no opaque white"),
        (layer("RGBA", "black"), "transparent parts and no opaque white"),
        (Image.new("RGBA", (20, 10), (255, 255, 255, 1)), "transparent all over"),
    ],
    ids=["colours", "greys", "hole", "black and hole", "black strokes", "transparent"],
)
def test_masks_of_the_opposite_convention_are_refused_by_its_name(mask, found):
    with pytest.raises(ValueError, match=f"the mask (is|has) {found}.*opaque white.*OpenAI.*make them white"):
        pictures.square_mask(mask, 8, (20, 10))


def test_masks_that_select_all_or_nothing_are_told():
    with pytest.raises(ValueError, match="empty: paint white .* brightest pixel is 1, white is 255$"):
        pictures.repaint_mask(np.uint8(RIGHT_HALF))
    with pytest.raises(ValueError, match="not float64"):
        pictures.repaint_mask(RIGHT_HALF.astype(float))
    middle = np.zeros((10, 20), bool)
    middle[:, 5:15] = True
    assert pictures.keeps_nothing(np.ones((10, 20), bool), "pad") and pictures.keeps_nothing(middle)
    assert not pictures.keeps_nothing(middle, "pad") and not pictures.keeps_nothing(RIGHT_HALF)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (encoded(Image.new("1", (400, 10))), r"too long and narrow \(400 x 10\).*20 times the shorter"),
        (encoded(Image.new("1", (200, 100))), r"too many pixels \(200 x 100\)"),
        (encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(180)]), r"animated \(2 frames\)"),
        (encoded(NOISE)[:1000], "cut off or damaged"),
        (encoded(NOISE, "JPEG")[:300], "cut off or damaged"),
        (encoded(NOISE, "GIF"), "the file is GIF; save it as PNG, JPEG or WebP"),
        (encoded(NOISE, "TIFF"), "the file is TIFF; save"),
        (b"\0\0\0\x18ftypheic" + bytes(16), "the file is HEIC; save"),
        (b"\0\0\0\x1cftypavif" + bytes(16), "the file is AVIF; save"),
        (
            b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>",
            "the file is SVG; save",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"no picture", "no picture of a known format; save it as PNG, JPEG or WebP"),
    ],
)
def test_a_file_that_is_refused_is_told_its_own_reason(data, why):
    with pytest.raises(ValueError, match=f"^a.png .*{why}") as told:
        pictures.decode_picture(data, "a.png", max_pixels=10_000)
    assert ("save it as PNG" in str(told.value)) == ("save" in why), "only another format is asked to be one"


def test_a_file_that_exif_turned_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = pictures.decode_picture(encoded(NOISE, exif=exif), "a.png")
    np.testing.assert_array_equal(pictures.whole_picture(upright), np.rot90(np.asarray(NOISE), -1))


def test_padding_of_a_mask_follows_the_picture():
    mask = np.zeros((10, 20), bool)
    mask[:, :10] = True
    cropped, padded = (pictures.square_mask(mask, 20, (20, 10), fit) for fit in pictures.FITS)
    assert cropped[:, :10].all() and not cropped[:, 10:].any()
    assert padded[5:15, :10].all() and padded.sum() == 100


# Latents


@pytest.mark.slow
def test_more_steps_find_latents_that_lead_closer_back():
    """With the bundled model, on a scene that it was trained on the like of. The solver's part of it is in
    tests/models/diffusion/test_sampling.py."""
    model = pipeline.UnCLIP.load()
    scene = scenes.sample_scene(scenes.preset("quickstart"), "validation", 0)
    picture, errors = scenes.render(scene, 64), {}
    small = pictures.square_picture(picture, 16)
    for steps in (10, 40):
        latents = model.invert([picture], num_steps=steps)
        assert latents.x_T.shape == (1, 16, 16, 3) and latents.image_embeds.shape == (1, 64)
        base = model.from_latents(latents, upsample=False).base[0]
        errors[steps] = np.abs(base.astype(float) - small).mean() / 255
    assert errors[40] < 0.7 * errors[10] and errors[40] < 0.05, errors


def test_latents_are_kept_in_a_file(model, picture, tmp_path):
    latents = model.invert([picture], captions=[CAPTION], num_steps=4)
    latents.save(tmp_path / "latents.npz")
    again = Latents.load(tmp_path / "latents.npz")
    np.testing.assert_array_equal(again.x_T, latents.x_T)
    assert (again.num_steps, again.captions) == (4, (CAPTION,))
    for name in ("image_embeds", "x_T"):
        np.testing.assert_array_equal(getattr(again, name), getattr(latents, name))
    (tmp_path / "other.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="holds no latents"):
        Latents.load(tmp_path / "other.npz")


# Paths


def test_a_path_begins_and_ends_with_its_pictures(model, picture):
    other = picture[::-1].copy()
    path = model.interpolate(picture, other, frames=3, num_steps=6)
    ends = model.from_latents(model.invert([picture, other], num_steps=6))
    # The frames share a batch of another size, and XLA may round that otherwise.
    assert np.abs(path.base[[0, -1]].astype(int) - ends.base).max() <= 1
    assert path.captions == ("theta 0.00", "theta 0.50", "theta 1.00")
    assert path.images.shape == (3, 32, 32, 3)
    same = model.interpolate(picture, other, frames=2, num_steps=6, same_noise=True)
    assert np.abs(same.base[1].astype(int) - ends.base[1]).max() > 1
    assert model.interpolate("a red star", "a blue ring", frames=2, num_steps=2).base.shape == (2, 8, 8, 3)


def test_textdiff_begins_with_the_picture_and_turns_by_theta(model, picture):
    path = model.textdiff(picture, "a red star", "a blue ring", theta=0.4, frames=3, num_steps=6)
    start = model.from_latents(model.invert([picture], num_steps=6))
    assert np.abs(path.base[0].astype(int) - start.base[0]).max() <= 1
    z, target = path.image_embeds, model.encode_text(["a blue ring", "a red star"])[0][0]
    direction = unit(target[0] - target[1])
    whole = np.arccos(z[0] @ direction)
    assert np.arccos(np.clip(z[0] @ z[2], -1, 1)) == pytest.approx(0.4 * whole, rel=1e-3)
    with pytest.raises(ValueError, match="are the same to this model's CLIP"):
        model.textdiff(picture, "a red star", "a red star")


def test_variations_differ_and_eta_0_does_not(model, picture):
    drawn = model.variations(picture, n=3, num_steps=6, upsample=False, guidance_scale=1.0)
    assert len({image.tobytes() for image in drawn.base}) == 3
    still = model.variations(picture, n=2, num_steps=6, eta=0.0, upsample=False, guidance_scale=1.0)
    assert (still.base[0] == still.base[1]).all()
    start = model.from_latents(model.invert([picture], num_steps=6), upsample=False)
    assert np.abs(still.base[0].astype(int) - start.base[0]).max() <= 1


def test_a_little_strength_changes_little(model, picture):
    small = pictures.square_picture(picture, 8).astype(int)
    options = dict(n=2, num_steps=50, upsample=False, guidance_scale=1.0)
    little, much = (model.variations(picture, strength=s, **options).base for s in (0.04, 0.9))
    assert np.abs(little - small).mean() < 0.5 * np.abs(much - small).mean()
    with pytest.raises(ValueError, match="strength 0 must lie"):
        model.variations(picture, strength=0)


# Repainting


def test_what_the_mask_keeps_is_unchanged_at_full_size(model, picture):
    mask = np.zeros((32, 32), bool)
    mask[:, 16:] = True
    result = model.inpaint(picture, mask, CAPTION, n=2, num_steps=4, resample=2)
    assert (result.images[:, :, :16] == picture[:, :16]).all()
    assert np.abs(result.images[:, :, 16:].astype(int) - picture[:, 16:]).mean() > 5
    assert (result.images[0] != result.images[1]).any()


def test_strokes_on_a_transparent_layer_repaint_what_they_cover(model, picture):
    strokes = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    strokes.paste("white", (16, 0, 32, 32))
    result = model.inpaint(picture, strokes, CAPTION, num_steps=4, resample=2)
    assert (result.images[:, :, :16] == picture[:, :16]).all()
    assert (result.images[:, :, 16:] != picture[:, 16:]).any()


@pytest.mark.parametrize("method", sampling.MULTISTEP)
def test_a_sampler_that_reads_the_step_before_inpaints_too(model, picture, method, monkeypatch):
    decoder = model.engine.stages["decoder"]
    changed = dataclasses.replace(decoder, diffusion=decoder.diffusion.with_settings(method=method))
    monkeypatch.setitem(model.engine.stages, "decoder", changed)
    mask = np.zeros((32, 32), bool)
    mask[:, 16:] = True
    result = model.inpaint(picture, mask, CAPTION, num_steps=2)
    assert (result.images[0, :, :16] == picture[:, :16]).all()


def test_repainting_everything_is_drawing_the_caption(model, picture):
    whole = np.ones((32, 32), bool)
    result = model.inpaint(picture, whole, CAPTION, n=2, seed=5)
    drawn = model.text_to_image([CAPTION], n=2, seed=5)
    np.testing.assert_array_equal(result.images, drawn.images)


def test_outpainting_keeps_the_middle(model, picture):
    result = model.outpaint(picture, CAPTION, scale=0.5, num_steps=3)
    middle = pictures.square_picture(picture, 16)
    assert (result.images[0, 8:24, 8:24] == middle).all()
    with pytest.raises(ValueError, match="scale 1 must lie"):
        model.outpaint(picture, CAPTION, scale=1)


def test_a_negative_caption_is_led_away_from(model, picture):
    options = dict(strength=1.0, num_steps=3, upsample=False, guidance_scale=3.0)
    plain = model.image_to_image(picture, CAPTION, **options).base
    led = model.image_to_image(picture, CAPTION, negative="a yellow circle", **options).base
    assert np.abs(plain.astype(int) - led).mean() > 1
    with pytest.raises(ValueError, match="guidance above 1"):
        model.image_to_image(picture, CAPTION, negative="x", **options | dict(guidance_scale=1.0))


# The rest


def test_pictures_of_any_size_are_enlarged(model, picture):
    assert model.upscale(picture[:12, :20], num_steps=2).shape == (48, 80, 3)
    assert model.upscale(picture[:8, :8], num_steps=2).shape == (32, 32, 3)


def test_pictures_are_ranked_by_the_caption(model, picture):
    images = np.stack([picture, picture[::-1], 255 - picture])
    order = model.rank(images, CAPTION)
    text = model.encode_text([CAPTION])[0][0][0]
    cosine = model.encode_image(images) @ text
    assert list(cosine[order]) == sorted(cosine, reverse=True)


def test_components_come_from_an_autoregressive_prior(model, picture, tmp_path):
    with pytest.raises(ValueError, match="no principal components"):
        model.reconstruct(picture, [4])
    other = pipeline.UnCLIP.load(make_model(tmp_path / "extended", extended=True))
    drawn = other.reconstruct(picture, [1, 4], num_steps=2, upsample=False)
    assert drawn.captions == ("1 components", "4 components") and drawn.base.shape[0] == 2
    with pytest.raises(ValueError, match="components are not possible"):
        other.reconstruct(picture, [0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what to do: choose one of variations"),
        (["vary"], "'vary' is no action"),
        (["inpaint", "a.png", "caption"], "inpaint needs PICTURE MASK CAPTION, not 2"),
        (["invert"], "invert needs PICTURE ..., not 0"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        command_line.check_arguments(argv)


def test_inputs_are_read_and_refused_before_the_model_is(tmp_path, picture):
    for name, image in (("picture", Image.fromarray(picture)), ("layer", layer().resize((32, 32)))):
        image.save(tmp_path / f"{name}.png")
    files = [str(tmp_path / "picture.png"), str(tmp_path / "layer.png")]
    inputs = command_line.read_inputs("inpaint", [*files, CAPTION])
    mask = inputs["mask"]
    assert inputs["picture"].size == (32, 32) and inputs["caption"] == CAPTION
    assert mask[:, 17:].all() and not mask[:, :15].any()
    Image.fromarray(picture[:20]).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="the mask is 32x32, the picture 32x20: make them one size"):
        command_line.read_inputs("inpaint", [str(tmp_path / "other.png"), files[1], CAPTION])


def test_a_caption_is_no_forgotten_file(tmp_path, picture):
    assert command_line.picture_or_caption(CAPTION) == CAPTION
    with pytest.raises(FileNotFoundError, match="no picture file"):
        command_line.picture_or_caption(str(tmp_path / "none.png"))
    with pytest.raises(FileNotFoundError, match="no picture file"):
        command_line.picture_or_caption(str(tmp_path / "none.HEIC"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        command_line.picture_or_caption(str(tmp_path / "text.png"))


def test_the_command_writes_pictures_a_path_and_what_made_them(model, picture, tmp_path):
    for name, image in (("a", picture), ("b", picture[::-1])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    command = [sys.executable, "-m", "dalle2_jax.edit", "interpolate", "a.png", "b.png", "--out=path"]
    command += [f"--model={model.engine.directory}", "--frames=3", "--steps=2"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "path"
    report = json.loads((out / "edit.json").read_text())
    assert report["pictures"][0]["action"] == "interpolate" and len(report["pictures"]) == 3
    moving = Image.open(out / "path.webp")
    assert moving.n_frames == 4 and moving.size == (32, 32)
    made = json.loads(Image.open(out / report["pictures"][1]["file"]).text["dalle2_jax"])
    assert made["given"] == ["a.png", "b.png"]

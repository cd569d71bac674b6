"""Pictures from folders, shards, npz files and scenes; npz out; the protocols' squares."""

import json
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import scenes
from dalle2_jax.evaluate import drawing, picture_sets, presets
from tests.data.shards_for_tests import colour_of, encode, flat_png, noise_picture, write_tar


def colours(pictures):
    return [tuple(item.picture()[0, 0].tolist()) for item in pictures.items()]


@pytest.fixture
def folder(tmp_path):
    """Five pictures, one in a folder below, and their captions."""
    (tmp_path / "set" / "below").mkdir(parents=True)
    for number in range(5):
        file = tmp_path / "set" / ("below" if number == 4 else "") / f"{number}.png"
        file.write_bytes(flat_png(number))
        file.with_suffix(".txt").write_text(f"\n picture {number} \nanother line\n")
    (tmp_path / "set" / ".hidden.png").write_bytes(b"no")
    return tmp_path / "set"


def test_a_folder(folder):
    found = picture_sets.open_pictures(folder)
    assert (found.name, found.kind, found.count) == ("set", "folder", 5)
    assert sorted(colours(found)) == sorted(colour_of(number) for number in range(5))
    assert sorted(found.captions()) == [f"picture {number}" for number in range(5)]
    assert colours(found) == colours(found)  # again from the start
    pairs = zip(found.captions(), colours(found), strict=True)
    assert all(colour == colour_of(int(text.split()[1])) for text, colour in pairs)
    (folder / "2.txt").unlink()
    with pytest.raises(ValueError, match="not every picture of set has a caption"):
        picture_sets.open_pictures(folder).captions()


def test_a_folder_of_generate(folder):
    listed = [{"file": f"{number}.png", "caption": f"drawn {number}"} for number in (2, 0)]
    (folder / "generate.json").write_text(json.dumps({"pictures": listed, "grid": "grid.png"}))
    found = picture_sets.open_pictures(folder)
    assert found.captions() == ["drawn 2", "drawn 0"] and colours(found) == [colour_of(2), colour_of(0)]
    assert (
        found.refused == {"hidden": 1, "not_listed": 3}
        and "1.png: generate.json does not" in found.describe()
    )
    for name, message in (("../x.png", "outside its folder"), ("7.png", "not there")):
        (folder / "generate.json").write_text(json.dumps({"pictures": [{"file": name}]}))
        with pytest.raises(ValueError, match=message):
            picture_sets.open_pictures(folder)
    (folder / "generate.json").write_text("[1]")
    with pytest.raises(ValueError, match="not as dalle2_jax.generate writes it"):
        picture_sets.open_pictures(folder)


def test_shards(tmp_path):
    members = [(f"{number:03d}.png", flat_png(number)) for number in range(4)]
    members += [(f"{number:03d}.txt", b"picture %d" % number) for number in range(4)]
    write_tar(tmp_path / "a.tar", [*members, ("9.txt", b"no picture")])
    for path in (tmp_path / "a.tar", tmp_path, tmp_path / "*.tar"):
        found = picture_sets.open_pictures(path)
        assert found.kind == "tar" and colours(found) == [colour_of(number) for number in range(4)]
        assert found.captions() == [f"picture {number}" for number in range(4)]
        assert found.refused == {"no_image": 1}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)
    save(tmp_path / "x.npz", images)
    found = picture_sets.open_pictures(tmp_path / "x.npz")
    assert (found.kind, found.count, found.texts) == ("npz", 5, ())
    np.testing.assert_array_equal([item.picture() for item in found.items()], images)
    picture_sets.write_npz(found, tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["arr_0"], images)


def test_npz_files_that_are_refused(tmp_path):
    for name, arrays, message in (
        ("objects", {"arr_0": np.array([{}])}, r"must be uint8 \[N, H, W, 3\]"),
        ("floats", {"arr_0": np.zeros((2, 4, 4, 3))}, r"not float64 \[2, 4, 4, 3\]"),
        ("other", {"mu": np.zeros(3)}, "has no array arr_0"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            picture_sets.open_pictures(tmp_path / f"{name}.npz")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = dict(descr="|u1", fortran_order=False, shape=(1, 10**6, 10**6, 3))
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match="huge.npz are 1000000 x 1000000, above 50000000"):
        picture_sets.open_pictures(tmp_path / "huge.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="has no array arr_0"):
        picture_sets.open_pictures(tmp_path / "cut.npz")


def test_what_is_no_set_of_pictures(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        picture_sets.open_pictures(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        picture_sets.open_pictures(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="neither a folder of pictures nor"):
        picture_sets.open_pictures(tmp_path / "x.txt")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="no readable picture; left out: 1 undecodable .such as bad.png"):
        picture_sets.open_pictures(tmp_path)
    found = picture_sets.Item("bad.png", b"not a picture")
    with pytest.raises(ValueError, match="bad.png cannot be read as a picture"):
        found.picture()


# What a folder holds, and what is left out of it


FORMATS = dict(png="PNG", jpg="JPEG", bmp="BMP", gif="GIF", tiff="TIFF", ppm="PPM")


def test_every_format_of_a_mixed_folder_is_measured(tmp_path):
    """Six formats, in upper case too, and a picture whose name does not say what it is."""
    endings = [*FORMATS, *(end.upper() for end in FORMATS)]
    for number, end in enumerate(endings):
        picture = Image.new("RGB", (8, 8), colour_of(number))
        picture.save(tmp_path / f"{number:02d}.{end}", FORMATS[end.lower()])
    (tmp_path / f"{len(endings):02d}").write_bytes(flat_png(len(endings)))
    (tmp_path / "captions.csv").write_text("file,caption\n")
    found = picture_sets.open_pictures(tmp_path)
    assert found.describe() == f"{tmp_path.name}: 13 pictures of 13 files" and not found.refused
    assert colours(found) == [colour_of(number) for number in range(13)]
    assert found.summary() == dict(name=tmp_path.name, kind="folder", pictures=13, of=13, left_out={})


def test_what_is_left_out_of_a_folder_is_counted_by_reason(folder):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "cut.png").write_bytes(encode(noise_picture((8, 8)))[:100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "below" / ".trash").mkdir()
    (folder / "below" / ".trash" / "x.png").write_bytes(flat_png(0))
    told = []
    found = picture_sets.open_pictures(folder, lambda *said: told.append(said))
    assert found.count == 5 and sorted(colours(found)) == sorted(colour_of(i) for i in range(5))
    assert len(found.captions()) == 5  # those of the pictures that are measured
    left = dict(hidden=2, no_picture=1, other_format=1, undecodable=1, empty=1, unreadable=1, animated=1)
    assert found.refused == left and told[-1] == ("set", 9, 9)
    said = found.describe()
    assert said.startswith("set: 5 pictures of 13 files; left out: ")
    for part in (
        "1 animated (such as moving.gif: 2 frames)",
        "phone.heic: save it as PNG",
        "such as clip.mp4",
    ):
        assert part in said
    assert found.summary()["left_out"]["animated"] == {"count": 1, "example": "moving.gif: 2 frames"}


def test_pictures_beside_a_tar_are_measured_and_the_tar_is_named(folder):
    write_tar(folder / "old.tar", [("0.png", flat_png(7)), ("0.txt", b"old")])
    found = picture_sets.open_pictures(folder)
    assert found.count == 5 and found.refused == {"hidden": 1, "shard": 1}
    assert "such as old.tar: give" in found.describe()
    shards = picture_sets.open_pictures(folder / "*.tar")
    assert shards.describe() == "*.tar: 1 picture of 1 sample" and shards.captions() == ["old"]


def test_bad_pictures_of_shards_are_left_out(tmp_path):
    members = [("0.png", flat_png(0)), ("1.png", encode(noise_picture((8, 8)))[:100]), ("2.png", flat_png(2))]
    members += [("0.txt", b"zero"), ("2.txt", "grün".encode("latin-1"))]
    write_tar(tmp_path / "a.tar", members)
    found = picture_sets.open_pictures(tmp_path)
    assert colours(found) == [colour_of(0), colour_of(2)] and found.refused == {"undecodable": 1}
    with pytest.raises(ValueError, match=r"1 of 2 have none, such as sample 2 \(invalid_utf8"):
        found.captions()


def test_folders_that_are_linked_in_circles_are_gone_through_once(tmp_path):
    for name in ("set", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(flat_png(len(name)))
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "set")
    assert picture_sets.open_pictures(tmp_path / "set").count == 2


def test_captions_with_a_byte_order_mark_and_in_other_encodings(folder):
    (folder / "0.txt").write_bytes("\ufeffpicture 0\r\n".encode())
    (folder / "1.txt").write_bytes("picture 1".encode("utf-16"))
    assert sorted(picture_sets.open_pictures(folder).captions()) == [f"picture {i}" for i in range(5)]
    (folder / "2.txt").write_bytes("grün".encode("latin-1"))
    found = picture_sets.open_pictures(folder)
    assert found.count == 5  # its picture is a good one
    with pytest.raises(
        ValueError, match=r"1 of 5 have none, such as 2.png \(2.txt: line 1 holds the byte 0xfc"
    ):
        found.captions()


def test_pictures_of_two_sizes_are_no_npz(tmp_path):
    (tmp_path / "a.png").write_bytes(flat_png(0))
    (tmp_path / "b.png").write_bytes(flat_png(1, (9, 8)))
    found = picture_sets.open_pictures(tmp_path)
    with pytest.raises(ValueError, match="b.png is 9x8, the first picture 8x8"):
        picture_sets.write_npz(found, tmp_path / "x.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    picture_sets.write_npz(picture_sets.mapped(found, lambda picture: picture[:8, :8]), tmp_path / "x.npz")
    assert picture_sets.open_pictures(tmp_path / "x.npz").count == 2


def test_scenes_are_unseen_and_repeatable():
    config = scenes.preset("quickstart")
    found = picture_sets.scene_pictures(config, 32, 6, seed=1)
    images = [item.picture() for item in found.items()]
    assert found.count == len(found.captions()) == 6 and images[0].shape == (32, 32, 3)
    np.testing.assert_array_equal(images, [item.picture() for item in found.items()])
    expected = scenes.render(scenes.sample_scene(config, "test_relations", 1, 1), 32)
    np.testing.assert_array_equal(images[5], expected)
    assert found.captions() != picture_sets.scene_pictures(config, 32, 6, seed=2).captions()


# Protocols


@pytest.mark.parametrize("name", presets.PRESETS)
def test_protocols_make_their_size(name):
    picture = np.asarray(noise_picture((640, 480)))
    side = {"t2ibench": 299, "mlperf": 512}.get(name, 256)
    made = presets.PRESETS[name].square(picture)
    if name in ("ttur", "clean", "pytorch_fid"):
        assert made is picture
    else:
        assert made.shape == (side, side, 3) and made.dtype == np.uint8
        np.testing.assert_array_equal(presets.PRESETS[name].square(made), made)  # a drawn one stays


def test_protocols_differ_where_they_say():
    """In a picture whose left and right quarters are black only the squashed one keeps them."""
    picture = np.full((480, 960, 3), 255, np.uint8)
    picture[:, :200] = picture[:, -200:] = 0
    edge = {name: int(preset.square(picture)[100, 2, 0]) for name, preset in presets.PRESETS.items()}
    assert edge["mlperf"] == 0 and all(
        edge[n] == 255 for n in ("imagen", "openai", "karlo", "gigagan", "t2ibench")
    )
    noise = np.asarray(noise_picture((600, 600)))
    made = {
        name: presets.PRESETS[name].square(noise).astype(float) for name in ("imagen", "openai", "gigagan")
    }
    assert np.abs(made["imagen"] - made["openai"]).mean() > 1
    assert np.abs(made["imagen"] - made["gigagan"]).mean() > 1
    central = Image.fromarray(picture).crop((240, 0, 720, 480)).resize((256, 256), Image.BICUBIC)
    np.testing.assert_array_equal(presets.PRESETS["imagen"].square(picture), np.asarray(central))


def test_drawing_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Stopped among the pictures of a batch: those that are there stay, the rest is drawn as it would be."""
    monkeypatch.setattr(drawing, "DRAWN_AT_A_TIME", 3)
    drawn = []

    class Model:
        name = "letters"
        engine = types.SimpleNamespace(stages={"clip": None}, weights_sha256=lambda name: "ab")

        def settings(self, **asked):
            return asked

        def text_to_image(self, captions, numbers, **_):
            drawn.append(list(captions))
            assert list(numbers) == [0] * len(captions)  # no caption comes twice
            return types.SimpleNamespace(
                images=np.stack([np.full((8, 8, 3), len(caption), np.uint8) for caption in captions])
            )

    texts = ["a" * (i + 1) for i in range(8)]
    save, left = drawing.grid.save_png, [4]

    def save_few(path, image, extra):
        if not left[0]:
            path.write_bytes(b"half of a pic")
            raise KeyboardInterrupt
        left[0] -= 1
        save(path, image, extra)

    monkeypatch.setattr(drawing.grid, "save_png", save_few)
    with pytest.raises(KeyboardInterrupt):
        drawing.drawn_pictures(Model(), texts, tmp_path)
    monkeypatch.setattr(drawing.grid, "save_png", save)
    found = drawing.drawn_pictures(Model(), texts, tmp_path)
    assert [item.picture().max() for item in found.items()] == [len(text) for text in texts]
    assert drawn == [texts[:3], texts[3:6], texts[3:6], texts[6:]]  # the second batch, cut in two, twice
    assert not list(tmp_path.glob(".*partial"))
    with pytest.raises(ValueError, match="of another plan"):
        drawing.drawn_pictures(Model(), texts, tmp_path, seed=1)

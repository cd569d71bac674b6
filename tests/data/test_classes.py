"""Data without captions, by class: folders, tfds with a label, tar shards with .cls."""

import json
import os
import sys

import numpy as np
import pytest

from dalle2_jax.data import classes, examples, pipeline, prepared
from dalle2_jax.data.bad_records import TooManyBadRecords
from dalle2_jax.data.records import BadRecord
from tests.data import shards_for_tests as made

PETS = {"dog": [3, 104, 5], "cat": [0, 1], "2 foxes": [6, 7, 8]}
NAMES = ("2 foxes", "cat", "dog")


def dataset(source, path, fields=("image", "label"), split="train", **settings):
    """A dataset of 8 x 8 pictures."""
    settings = dict(num_classes=3 * ("label" in fields), image_size=8) | settings
    return pipeline.make_dataset(source=source, path=str(path), split=split, fields=fields, **settings)


def seen(data) -> dict[int, int]:
    """{number of a picture, by its colour: its label} of an epoch."""
    found = {}
    for batch in data.batches(3, repeat=False):
        for picture, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            red, green, _ = picture[0, 0].tolist()
            found[red // 16 + green] = label
    return found


@pytest.fixture
def pets(tmp_path):
    made.write_class_folder(tmp_path / "pets" / "train", PETS)
    made.write_class_folder(tmp_path / "pets" / "val", {"dog": [20], "cat": [21]})
    return tmp_path / "pets"


@pytest.fixture
def no_tensorflow(monkeypatch):
    """As where TensorFlow is not installed."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def expected(by_class: dict[str, list[int]]) -> dict[int, int]:
    return {number: NAMES.index(name) for name, numbers in by_class.items() for number in numbers}


@pytest.mark.parametrize("split", ["validation", "val", "valid"])
def test_folders_are_classes_in_the_order_of_their_names(pets, split):
    data = dataset("folder", pets)
    assert data.classes == NAMES and data.num_records == 8
    assert seen(data) == expected(PETS)
    held_out = dataset("folder", pets, split=split, classes=data.classes)  # has no foxes
    assert seen(held_out) == {20: 2, 21: 1}
    assert data.labels([0, 7]) == ["2 foxes", "dog"]
    assert dataset("folder", pets, ("image",)).labels([7]) == ["dog/below/104.png"]


def test_a_folder_without_splits_and_a_stage_without_classes(pets):
    whole = dataset("folder", pets / "train", split="")
    assert whole.fingerprint == dataset("folder", pets / "train", split="validation").fingerprint
    assert seen(whole) == expected(PETS)
    pictures = dataset("folder", pets, ("image",))
    for alone, batch in zip(pictures.batches(5), whole.batches(5), strict=False):
        np.testing.assert_array_equal(alone["image"], batch["image"])
        if alone["index"][0] == 0:
            break


def test_a_folder_resumes_at_any_step_and_its_fingerprint_tells_a_change(pets):
    data = dataset("folder", pets, flip=True)
    batches = data.batches(3)
    whole = [next(batches) for _ in range(6)]
    for start in (1, 4):
        for one, other in zip(data.batches(3, start_step=start), whole[start:], strict=False):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    (pets / "train/cat/000.png").rename(pets / "train/cat/009.png")
    assert dataset("folder", pets).fingerprint != data.fingerprint


def test_what_is_no_picture_is_counted(pets, caplog):
    train = pets / "train"
    (train / "cat/notes.md").write_text("x")
    (train / "cat/.hidden.png").write_bytes(made.flat_png(9))
    (train / "cat/broken.PNG").write_bytes(b"<html>")
    (train / "cat/empty.jpeg").write_bytes(b"")
    os.symlink(train / "nothing.png", train / "cat/link.png")
    for name in (".git", "empty"):
        (train / name).mkdir()
    data = dataset("folder", pets)
    assert seen(data).keys() >= expected(PETS).keys() and data.classes == NAMES
    counted = dict(other_extension=1, hidden_file=1, undecodable=1, empty=1, unreadable=1)
    assert data.bad_records() == counted
    (train / "dog/003.png").unlink()  # while a run reads
    with pytest.raises(BadRecord, match="unreadable: dog/003.png"):
        data.source.read(data.num_records - 3)
    with pytest.raises(TooManyBadRecords, match="cannot be used"):
        list(dataset("folder", pets, max_bad_fraction=0).batches(3, repeat=False))


def test_mirrored_pictures_are_not_of_a_class_that_names_a_side(tmp_path):
    picture = made.noise_picture((8, 8))
    for name in ("turn_left", "straight"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png")
    mirrored = dict.fromkeys((0, 1), False)
    batches = dataset("folder", tmp_path, split="", num_classes=2, flip=True).batches(2)
    for _ in range(12):
        batch = next(batches)
        for one, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            mirrored[label] |= not np.array_equal(one, picture)
    assert mirrored == {0: True, 1: False}


def test_tar_shards_with_labels(tmp_path):
    members = []
    for number in range(9):
        image, caption, about = made.sample(number)
        members += [image, (f"{number:09d}.cls", b" %d\n" % (number % 3 - (number == 8)))]
        members += [caption, about] if number < 3 else []
    members += [("alone.cls", b"1"), ("000000000.seg.cls", b"1")]
    made.write_tar(tmp_path / "0.tar", members)
    data = dataset("tar", tmp_path, split="", num_classes=0)
    assert data.classes == ("0", "1", "2") and data.source.read(1).captions == {"en": ("caption 1",)}
    assert seen(data) == {number: number % 3 - (number == 8) for number in range(9)}
    assert data.bad_records() == dict(other_extension=1, part_of_another=1)
    named = dataset("tar", tmp_path, split="", classes=("cat", "dog", "fox"))
    assert seen(named) == seen(data) and named.labels([4]) == ["dog"]
    few = dataset("tar", tmp_path, ("image",), split="")  # the same records, with labels or without
    assert few.num_records == 9


@pytest.mark.parametrize("stored", [b"cat", b"", b"1.5", b"-2", b"1" * 40, None])
def test_a_label_that_is_none_loses_its_record_where_labels_are_read(tmp_path, stored):
    members = [(f"{number}.png", made.flat_png(number)) for number in range(4)]
    members += [(f"{number}.cls", b"%d" % number) for number in range(3)]
    members += [] if stored is None else [("3.cls", stored)]
    made.write_tar(tmp_path / "0.tar", members)
    data = dataset("tar", tmp_path, split="")
    assert set(seen(data)) == {0, 1, 2} and data.bad_records() == {"no_label": 1}
    pictures = dataset("tar", tmp_path, ("image",), split="")
    assert len(next(pictures.batches(4))["image"]) == 4 and not pictures.bad_records()


@pytest.mark.parametrize("names", [(), ("cat", "dog", "fox")])
def test_a_tfds_folder_with_labels(tmp_path, names, no_tensorflow):
    made.write_labelled_tfds(tmp_path / "photos/1.0.0", {"train": [*range(7)], "test": [8, 9]}, names)
    options = dict(data_dir=str(tmp_path))
    data = dataset("tfds", "photos", **options)
    assert data.classes == (names or ("0", "1", "2"))
    assert seen(data) == {number: number % 3 for number in range(7)}
    assert seen(dataset("tfds", "photos", split="test", classes=data.classes, **options)) == {8: 2, 9: 0}
    pictures = dataset("tfds", "photos", ("image",), flip=True, **options)
    assert next(pictures.batches(7))["image"].shape == (7, 8, 8, 3)
    with pytest.raises(ValueError, match=r"no captions in photos: .*data.caption_field.*model.text=None"):
        dataset("tfds", "photos", ("tokens",), tokenizer=made.WordTokenizer(), **options)
    with pytest.raises(ValueError, match="no label field 'lable'; did you mean 'label'"):
        dataset("tfds", "photos", label_field="lable", **options)


def test_which_label_of_tfds_is_read(tmp_path):
    label = {"pythonClassName": "a.ClassLabel", "classLabel": {"numClasses": "2"}}
    several = {"pythonClassName": "a.Sequence", "sequence": {"feature": label}}

    def read(wanted="", **features):
        content = {"pythonClassName": "a.FeaturesDict", "featuresDict": {"features": features}}
        return prepared._labels(content, str(tmp_path), wanted, "x")

    assert read(coarse=label) == ("coarse", ("0", "1"))
    assert read(coarse=label, label=label)[0] == "label"
    assert read(coarse=label, fine=label) == read(labels=several) == ("", ())
    assert read("fine", coarse=label, fine=label) == ("fine", ("0", "1"))


def test_what_tensorflow_datasets_writes_is_read(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="reads what tensorflow-datasets writes")

    class Photos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "id": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, label in enumerate([1, 0, -1, 1]):
                image = np.full((8, 8, 3), made.colour_of(number), np.uint8)
                yield number, {"image": image, "id": f"{number}", "label": label}

    Photos(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    data = dataset("tfds", "photos", num_classes=2, data_dir=str(tmp_path))
    assert data.classes == ("cat", "dog") and seen(data) == {0: 1, 1: 0, 2: -1, 3: 1}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("number", [0, 127, 300, 2**40, -1])
def test_whole_numbers_of_a_proto(number, packed):
    example = examples.Example(made.labelled_example({"id": [b"x"]}, number, packed))
    assert example.integers("label") == [number] and example.values("label") == []
    assert example.integers("id") == example.integers("none") == []
    assert example.values("id") == [b"x"]


class Source:
    def __init__(self, *names, num_classes=0):
        self.classes, self.num_classes = names, num_classes or len(names)


@pytest.mark.parametrize(
    "source, given, num_classes, names, numbers",
    [
        (Source("a", "b"), (), 2, ("a", "b"), [0, 1]),
        (Source("a", "b"), ("b", "c", "a"), 3, ("b", "c", "a"), [2, 0]),  # by name: a part of the classes
        (Source("n1", "n2"), ("fish", "bird"), 2, ("fish", "bird"), [0, 1]),  # renamed
        (Source(num_classes=2), (), 3, ("0", "1", "2"), [0, 1]),
        (Source(num_classes=2), ("fish", "bird", "fox"), 3, ("fish", "bird", "fox"), [0, 1]),
        (Source(), ("fish", "bird"), 2, ("fish", "bird"), None),
    ],
)
def test_the_names_of_classes_and_of_labels(source, given, num_classes, names, numbers):
    assert classes.names(source, given, num_classes) == names
    found = classes.of_labels(source, names)
    assert (found if found is None else found.tolist()) == numbers


@pytest.mark.parametrize(
    "source, given, num_classes, message",
    [
        (Source(), (), 2, "field label needs data.classes.*data.source=folder.*KEY.cls"),
        (Source("a", "b", "c"), (), 2, "have 3 classes .*set --config.model.num_classes=3"),
        (Source("a", "b"), (), 1000, "set --config.model.num_classes=2"),
        (Source(num_classes=12), (), 10, "set --config.model.num_classes=12"),
        (Source("a", "d"), ("a", "b", "c"), 3, "does not name: 'd'"),
        (Source("n1", "n2"), ("a", "b", "c"), 3, "'n1', 'n2', data.classes has 3 names: give 2"),
        (Source(num_classes=12), ("a", "b"), 2, "the label 11, data.classes has 2 names"),
        (Source("a"), (), 0, "one class"),
    ],
)
def test_classes_that_do_not_fit_are_refused(source, given, num_classes, message):
    with pytest.raises(ValueError, match=message):
        classes.names(source, given, num_classes)


def test_folders_that_are_refused(pets):
    def refused(path, message, **settings):
        with pytest.raises(ValueError, match=message):
            dataset("folder", path, **settings)

    refused(pets, "has no split 'test'; There is: train, val", split="test")
    refused(pets, "has no split ''; There is: train, val", split="")
    refused(pets.parent / "pest", "is no folder; did you mean 'pets'")
    refused("", "data.path is empty")
    (pets.parent / "flat").mkdir()
    refused(pets.parent / "flat", "holds no picture")
    (pets.parent / "flat/1.png").write_bytes(made.flat_png(1))
    refused(pets.parent / "flat", "its 1 pictures lie in no such folder: move them into one, .*flat/all")
    tokens = dict(fields=("image", "tokens"), tokenizer=made.WordTokenizer())
    refused(pets, "no captions in .*pets", **tokens)


def test_data_with_captions_and_without_labels(tmp_path):
    made.write_samples(tmp_path / "0.tar", range(4))
    with pytest.raises(ValueError, match="field label needs data.classes"):
        dataset("tar", tmp_path, split="")
    data = dataset("tar", tmp_path, split="", classes=("caption 1", "caption 2", "caption 4"))
    assert seen(data) == {0: -1, 1: 0, 2: 1, 3: -1}
    bare = [(f"{number}.png", made.flat_png(number)) for number in range(4)]
    made.write_tar(tmp_path / "0.tar", bare)
    with pytest.raises(ValueError, match="no captions in"):
        dataset("tar", tmp_path, split="", classes=("a", "b", "c"))


def test_a_caption_that_is_a_name_names_that_class():
    assert [pipeline.label_of(name, ("a", "A", "cat")) for name in ("a", "A", "Cat")] == [0, 1, 2]


def test_embeddings_beside_labels(pets):
    folder = pets.parent / "rows"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb/img_emb_0.npy", np.zeros((8, 4), np.float32))
    lines = "".join(json.dumps({"caption": f"row {row}"}) + "\n" for row in range(8))
    (folder / "metadata/metadata_0.jsonl").write_text(lines)
    data = dataset("folder", pets, ("image", "image_embed", "label"), embeddings=str(folder))
    assert seen(data) == expected(PETS)

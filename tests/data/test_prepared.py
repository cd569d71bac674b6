"""Folders in the files of tensorflow-datasets: written once, read without it, the same as its own."""

import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax.data import examples, pipeline, prepared, scenes, scenes_builder
from tests.data import shards_for_tests as made

TEXT, IMAGE = {"pythonClassName": "a.Text", "text": {}}, {"pythonClassName": "a.Image", "image": {}}
SPLITS = {"train": [4, 3, 4], "val": [5]}


def dictionary(**features):
    """What features.json says of a dictionary of features."""
    return {"pythonClassName": "a.FeaturesDict", "featuresDict": {"features": features}}


def sequence(feature):
    return {"pythonClassName": "a.Sequence", "sequence": {"feature": feature, "length": "-1"}}


def write_folder(folder, features=None, **info):
    """A prepared dataset `pets` of 16 records, whose pictures are their number."""
    folder.mkdir(parents=True)
    number, splits = 0, []
    for split, lengths in SPLITS.items():
        for shard, length in enumerate(lengths):
            path = folder / f"pets-{split}.tfrecord-{shard:05d}-of-{len(lengths):05d}"
            with open(path, "wb") as file:
                for _ in range(length):
                    example = {"image": [b"%d" % number], "caption": [b"pet %d" % number]}
                    file.write(examples.tfrecord(examples.serialize(example)))
                    number += 1
        splits.append({"name": split, "shardLengths": [str(length) for length in lengths]})
    content = {"name": "pets", "version": "1.0.0", "splits": splits} | info
    (folder / "dataset_info.json").write_text(json.dumps(content))
    features = features or dictionary(image=IMAGE, caption=TEXT)
    (folder / "features.json").write_text(json.dumps(features))


@pytest.fixture
def no_tensorflow(monkeypatch):
    """As where TensorFlow is not installed."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


def numbers(source):
    """The numbers of the records of a source."""
    return [int(source.read(index).image) for index in range(len(source))]


@pytest.mark.parametrize("without", [False, True])
def test_scenes_are_prepared_once_by_whoever_comes_first(tmp_path, monkeypatch, request, without):
    if without:
        request.getfixturevalue("no_tensorflow")
    prepared_by = []
    original = scenes_builder.write

    def counting(*args):
        prepared_by.append(threading.get_ident())
        time.sleep(0.3)
        return original(*args)

    monkeypatch.setattr(scenes_builder, "write", counting)
    monkeypatch.setenv("DALLE2_JAX_CACHE", str(tmp_path))
    opened, errors = [], []

    def open_it():
        try:
            opened.append(made.open_source("scenes", "debug_64", "train"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(opened) == 2 and len(prepared_by) == 1
    assert opened[0].fingerprint == opened[1].fingerprint and not opened[0].refused
    config = scenes.preset(scenes_builder.CONFIGS["debug_64"].preset)
    data = pipeline.make_dataset(
        source="scenes", path="debug_64", split="train", fields=("image",), image_size=64
    )
    assert data.num_records == scenes_builder.CONFIGS["debug_64"].num_examples
    batch = next(data.batches(4))
    for row, index in enumerate(batch["index"].tolist()):
        picture = scenes.render(scenes.sample_scene(config, "train", index), 64)
        np.testing.assert_array_equal(batch["image"][row], picture)
    record = data.source.read(3)
    assert list(record.captions["en"]) == scenes.captions(scenes.sample_scene(config, "train", 3), "en")
    assert list(record.captions["zh"]) == scenes.captions(scenes.sample_scene(config, "train", 3), "zh")
    part = made.open_source("scenes", "debug_64", "train[10:14]")
    assert len(part) == 4 and part.read(1).image == data.source.read(11).image
    with pytest.raises(ValueError, match=r"did you mean 'validation'"):
        made.open_source("scenes", "debug_64", "validaton")
    with pytest.raises(ValueError, match=r"did you mean 'debug_64'"):
        made.open_source("scenes", "debug64", "train")
    through_tfds = made.open_source("tfds", "scenes/debug_64", "train", data_dir=str(tmp_path / "tfds"))
    assert through_tfds.read(5) == opened[0].read(5)
    with pytest.raises(ValueError, match="tfds knows no dataset 'coco_caption'|is not prepared in"):
        made.open_source("tfds", "coco_caption", "train", data_dir=str(tmp_path / "tfds"))
    file = next((tmp_path / "tfds" / "scenes").rglob("*validation*.tfrecord*"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="where its manifest has"):
        made.open_source("scenes", "debug_64", "validation")


def test_drawing_scenes_that_fails_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    original = scenes_builder.write

    def full_disk(name, folder):
        original(name, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes_builder, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepared.open_scenes("debug_64", "train", str(tmp_path))
    assert os.listdir(tmp_path / "scenes" / "debug_64") == []
    monkeypatch.setattr(scenes_builder, "write", original)
    assert len(prepared.open_scenes("debug_64", "train", str(tmp_path))) == 64


def test_scenes_are_read_in_the_wordings_of_a_field(tmp_path):
    every, plain = (
        prepared.open_scenes("debug_64", "train", str(tmp_path), field).read(1).captions
        for field in ("", "caption")
    )
    text = scenes.caption(scenes.sample_scene(scenes.preset("quickstart"), "train", 1))
    assert plain == {"en": (text,)} and set(every["en"]) > {text} and every["zh"]


def test_scenes_are_the_files_that_tensorflow_datasets_writes(tmp_path):
    """The same names, sizes and records, and the same description to the byte."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="compares with tensorflow-datasets")
    import tensorflow as tf

    config = scenes_builder.CONFIGS["debug_64"]

    class Scenes(tfds.core.GeneratorBasedBuilder):
        """What it would be as a builder."""

        VERSION = tfds.core.Version(scenes_builder.VERSION)
        BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name="debug_64", description="preset 'quickstart' at 64 x 64")
        ]

        def _info(self):
            text = tfds.features.Text()
            texts = dict.fromkeys(("captions", "captions_zh"), tfds.features.Sequence(text))
            image = tfds.features.Image(shape=(64, 64, 3), encoding_format="png")
            features = dict.fromkeys(("caption", "caption_zh", "scene"), text) | texts | {"image": image}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in scenes.SPLITS}

        def _generate_examples(self, split):
            for index, example in enumerate(scenes_builder.examples_of(config, split)):
                example = {
                    name: values if name.startswith("captions") else values[0]
                    for name, values in example.items()
                }
                yield index, example | {"image": io.BytesIO(example["image"])}

    builder = Scenes(config="debug_64", data_dir=str(tmp_path / "theirs"), file_format="tfrecord")
    builder.download_and_prepare()
    theirs = os.fspath(builder.data_dir)
    ours = prepared._prepare_scenes("debug_64", str(tmp_path / "ours"))
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    for name in os.listdir(ours):
        ours_path, theirs_path = os.path.join(ours, name), os.path.join(theirs, name)
        if ".tfrecord" in name:  # in a record the order of the fields is anybody's
            pair = [list(tf.data.TFRecordDataset(p).as_numpy_iterator()) for p in (ours_path, theirs_path)]
            read = [[{f: e.values(f) for f in e} for e in map(examples.Example, raw)] for raw in pair]
            assert read[0] == read[1] and len(read[0]) == 64
            assert os.path.getsize(ours_path) == os.path.getsize(theirs_path)
    infos, features = (
        [Path(folder, name).read_text("utf-8") for folder in (ours, theirs)]
        for name in ("dataset_info.json", "features.json")
    )
    assert features[0] == features[1]
    assert infos[0] == infos[1].replace(__name__, "dalle2_jax.data.scenes_builder")  # where the builder is
    opened = [prepared._open_folder(folder, "train", "", "", "scenes") for folder in (ours, theirs)]
    assert opened[0].fingerprint == opened[1].fingerprint
    read = tfds.builder_from_directory(ours).as_dataset(split="test_pairs[:3]").as_numpy_iterator()
    scene = scenes.sample_scene(scenes.preset("quickstart"), "test_pairs", 0)
    np.testing.assert_array_equal(next(read)["image"], scenes.render(scene, 64))
    num_shards = tfds.core.utils.shard_utils.ShardConfig.calculate_number_shards
    for mebibytes, count in ((1, 9), (127, 9), (128, 9), (300, 3), (700, 9), (70_000, 5000)):
        num_bytes = mebibytes << 20
        assert scenes_builder._num_shards(num_bytes, count) == num_shards(num_bytes - 16 * count, count)


def test_scenes_of_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_builder, "_MIN_SHARD_BYTES", 30_000)
    several = prepared.open_scenes("debug_64", "train", str(tmp_path / "several"))
    monkeypatch.undo()
    one = prepared.open_scenes("debug_64", "train", str(tmp_path / "one"))
    assert [file[0] for file in several.files] == [
        f"scenes-train.tfrecord-{n:05d}-of-00004" for n in range(4)
    ]
    assert [file[2] for file in several.files] == [16] * 4 and len(one.files) == 1
    assert [several.read(n).image for n in range(64)] == [one.read(n).image for n in range(64)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(11)),
        ("val", range(11, 16)),
        ("all", range(16)),
        ("train[2:5]", range(2, 5)),
        ("train[-3:]", range(8, 11)),
        ("train[:90%]", range(10)),
        ("train[40%:-27.3%]", range(4, 8)),
        ("train[:-1]+val[1:2]", [*range(10), 12]),
        ("val + train[7:8]", [*range(11, 16), 7]),
        ("train[1shard:]", range(4, 11)),
        ("train[1shard]", range(4, 7)),
        ("train[10:20%]", range(1, 2)),
    ],
)
def test_splits_and_their_slices(tmp_path, split, expected, no_tensorflow):
    write_folder(tmp_path / "pets" / "1.0.0")
    source = made.open_source("tfds", "pets", split, data_dir=str(tmp_path))
    assert numbers(source) == list(expected)
    assert source.read(0).captions == {"en": (f"pet {expected[0]}",)}


def test_slices_are_those_of_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="compares with tensorflow-datasets")
    folder = tmp_path / "pets" / "1.0.0"
    write_folder(folder)
    features = tfds.features.FeaturesDict({"image": tfds.features.Text(), "caption": tfds.features.Text()})
    features.save_config(folder)
    builder = tfds.builder_from_directory(folder)
    (folder / "features.json").write_text(json.dumps(dictionary(image=IMAGE, caption=TEXT)))
    for split in (
        *("train", "all", "train[2:5]", "train[:33%]", "train[55.5%:]", "train[5:5]+val", "train[10:20%]"),
        *("train[-50%:]+val[:-1]", "val[2shard:]+train[-2shard:]", "train[:2shard]", "train[1shard]"),
    ):
        theirs = [int(one["image"]) for one in builder.as_dataset(split=split).as_numpy_iterator()]
        assert numbers(prepared._open_folder(str(folder), split, "", "", "pets")) == theirs, split


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", "has no split 'trian'; did you mean 'train'"),
        ("train[", "has no split"),
        ("train[3]", "has two ends"),
        ("train[a:]", "is not understood"),
        ("train[1.5:]", "is not understood"),
        ("train[:12]", "more than its 11 records"),
        ("train[4:4]", "holds no record"),
    ],
)
def test_splits_that_are_refused(tmp_path, split, message, no_tensorflow):
    write_folder(tmp_path / "pets" / "1.0.0")
    with pytest.raises(ValueError, match=message):
        made.open_source("tfds", "pets", split, data_dir=str(tmp_path))


def test_what_is_prepared_is_found_and_what_is_not_is_said(tmp_path, no_tensorflow, monkeypatch):
    for folder in ("pets/9.0.0", "pets/10.0.0", "pets/11.0.0", "pets/small/1.0.0", "zoo/2014/1.0.0"):
        write_folder(tmp_path / folder)
    os.remove(tmp_path / "pets/11.0.0/dataset_info.json")  # not prepared to the end
    (tmp_path / "zoo/.config").mkdir()
    (tmp_path / "zoo/.config/metadata.json").write_text('{"defaultConfigName": "2014"}')
    for path, folder in {
        "pets": "pets/10.0.0",
        "pets:9.0.0": "pets/9.0.0",
        "pets/small": "pets/small/1.0.0",
        "zoo": "zoo/2014/1.0.0",
        "zoo/2014:1.0.0": "zoo/2014/1.0.0",
    }.items():
        assert prepared._find_prepared(path, str(tmp_path)) == str(tmp_path / folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(made.open_source("tfds", "pets", "val")) == 5
    for path in ("pets:8.0.0", "pets/large", "../pets", "pets/../zoo", "coco_captions"):
        with pytest.raises(
            ValueError, match="is not prepared in .*install tensorflow.*tfds build.*data.data_dir"
        ):
            made.open_source("tfds", path, "train")


def test_folders_that_are_refused(tmp_path, no_tensorflow):
    def opened():
        return made.open_source("tfds", "pets", "train", data_dir=str(tmp_path))

    folder = tmp_path / "pets" / "1.0.0"
    write_folder(folder, fileFormat="array_record")
    with pytest.raises(ValueError, match="stored as array_record; prepare it as TFRecord"):
        opened()
    for name, content in {
        "features.json": "{",
        "dataset_info.json": "[" * 100_000,
    }.items():
        shutil.rmtree(folder)
        write_folder(folder)
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read .*prepare it again"):
            opened()
    shutil.rmtree(folder)
    write_folder(folder)
    outside = tmp_path / "outside.tfrecord"
    shutil.copy(folder / "pets-val.tfrecord-00000-of-00001", outside)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0] |= {"filepathTemplate": "../../outside.tfrecord", "shardLengths": ["5"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(FileNotFoundError):  # a manifest names files of its own folder alone
        opened()


def test_fields_are_detected_or_given():
    nested = sequence(dictionary(id={"pythonClassName": "a.Tensor", "tensor": {}}, text=TEXT))
    coco = dictionary(**{"image": IMAGE, "image/filename": TEXT, "captions": nested})
    assert prepared._fields(coco, "", "", "coco_captions") == ("image", {"captions/text": "en"})
    two = dictionary(image=IMAGE, other=IMAGE, title=TEXT)
    assert prepared._fields(two, "other", "title", "x") == ("other", {"title": "en"})
    with pytest.raises(ValueError, match="give data.image_field"):
        prepared._fields(two, "", "title", "x")
    assert prepared._fields(two, "image", "", "x") == ("image", {})  # a stage may read none
    with pytest.raises(ValueError, match="did you mean 'title'"):
        prepared._fields(two, "image", "titel", "x")


def test_fields_as_older_versions_of_tensorflow_datasets_wrote_them():
    text = {"type": "a.Text", "content": {}}
    nested = {"type": "a.FeaturesDict", "content": {"text": text}}
    captions = {"type": "a.Sequence", "content": {"feature": nested, "length": None}}
    features = {"image": {"type": "a.Image", "content": {"shape": [None, None, 3]}}, "captions": captions}
    assert prepared._fields({"type": "a.FeaturesDict", "content": features}, "", "", "coco") == (
        "image",
        {"captions/text": "en"},
    )


def test_fields_of_tensorflow_datasets_are_read(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="reads what tensorflow-datasets writes")
    text, image = tfds.features.Text(), tfds.features.Image(shape=(None, None, 3))
    captions = tfds.features.Sequence({"id": np.int64, "text": text})
    coco = tfds.features.FeaturesDict({"image": image, "image/filename": text, "captions": captions})
    coco.save_config(tmp_path)
    written = json.loads((tmp_path / "features.json").read_text())
    assert prepared._fields(written, "", "", "coco") == ("image", {"captions/text": "en"})

"""Parquet files with pictures, as Hugging Face's datasets writes them."""

import json

import numpy as np
import pytest

from dalle2_jax.data import parquet, pipeline
from tests.data import shards_for_tests as made

pyarrow = pytest.importorskip("pyarrow", reason="reads parquet")
pytest.importorskip("pyarrow.parquet")


def write(path, numbers, classes=(), row_group_size=3, **columns):
    """Rows of a picture {bytes, path}, a caption and a label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": [{"bytes": made.flat_png(number), "path": f"{number}.png"} for number in numbers],
        "text": [f"caption {number}" for number in numbers],
        "label": [number % 3 - 1 for number in numbers],
    } | columns
    made_of = pyarrow.table({name: values for name, values in table.items() if values is not None})
    if classes:
        feature = {"_type": "ClassLabel", "names": list(classes)}
        about = {"info": {"features": {"label": feature, "image": {"_type": "Image"}}}}
        made_of = made_of.replace_schema_metadata({"huggingface": json.dumps(about)})
    pyarrow.parquet.write_table(made_of, path, row_group_size=row_group_size)


def dataset(path, fields=("image", "tokens"), split="train", **settings):
    settings = dict(source="parquet", image_size=8, tokenizer=made.WordTokenizer()) | settings
    return pipeline.make_dataset(path=str(path), split=split, fields=fields, **settings)


def seen(data) -> dict[int, int]:
    """{number of a picture, by its colour: the number that ends its caption} of an epoch."""
    found = {}
    for batch in data.batches(4, repeat=False):
        for picture, tokens in zip(batch["image"], batch["tokens"], strict=True):
            red, green, _ = picture[0, 0].tolist()
            found[red // 16 + green] = int(tokens[0])
    return found


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", range(8))
    write(tmp_path / "train-00001-of-00002.parquet", range(8, 13))
    write(tmp_path / "valid-00000-of-00001.parquet", [20, 21])
    return tmp_path


def test_records_order_and_resuming(shards):
    data = dataset(shards)
    assert seen(data) == {number: number for number in range(13)}
    assert seen(dataset(shards, split="validation")) == {20: 20, 21: 21}
    assert data.key(9) == "train-00001-of-00002.parquet:9.png" and data.labels([9]) == ["caption 9"]
    batches = data.batches(4)
    whole = [next(batches) for _ in range(8)]
    for start in (1, 5):
        for one, other in zip(dataset(shards).batches(4, start), whole[start:], strict=False):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_row_groups_are_read_once_while_they_are_kept(shards, monkeypatch):
    read = []
    group = parquet.ParquetSource._group

    def counted(self, file, number, column):
        read.append((file, number, column))
        return group(self, file, number, column)

    monkeypatch.setattr(parquet.ParquetSource, "_group", counted)
    data = dataset(shards, group=3)
    seen(data), seen(data)
    assert len(read) == len(set(read)) == 5 * 3  # the picture, its path, the caption of each row group
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    few = dataset(shards)
    assert seen(few).items() > seen(data).items() and len(few.source._cache._values) == 1


def test_labels_and_names_of_classes(tmp_path):
    write(tmp_path / "0.parquet", range(6), ("cat", "dog"))
    named = dataset(tmp_path, ("image", "label"), split="", num_classes=2)
    assert named.classes == ("cat", "dog")
    assert [named.source.read(n).label for n in range(3)] == [-1, 0, 1]
    write(tmp_path / "0.parquet", range(3), label=[4, None, 1])
    plain = dataset(tmp_path, ("image", "label"), split="")
    assert len(plain.classes) == 5 and [plain.source.read(n).label for n in range(3)] == [4, None, 1]
    write(tmp_path / "0.parquet", range(3), label=None)
    assert dataset(tmp_path, split="").source.num_classes == 0


def test_columns_by_name_and_by_setting(tmp_path):
    lists = [[f"a {n}", f"b {n}"] for n in range(3)]
    pictures = [made.flat_png(n) for n in range(3)]
    write(tmp_path / "0.parquet", range(3), image=None, photo=pictures, text=lists, caption_zh=["c 9"] * 3)
    source = dataset(tmp_path, split="").source
    assert source.read(1).captions == {"en": ("a 1", "b 1"), "zh": ("c 9",)}
    assert source.read(1).key == "0.parquet:1" and source.read(1).image == pictures[1]
    assert dataset(tmp_path, split="", caption_field="caption_zh", language="zh").labels([0]) == ["c 9"]
    for message, settings in (
        ("no column 'phto' .data.image_field.; did you mean 'photo'", dict(image_field="phto")),
        ("column 'text' holds no pictures.*paths.*photo: binary", dict(image_field="text")),
        ("no column 'alt' .data.caption_field.; There is: caption_zh", dict(caption_field="alt")),
        ("column 'text' holds no whole numbers", dict(label_field="text")),
    ):
        with pytest.raises(ValueError, match=message):
            dataset(tmp_path, split="", **settings)
    write(tmp_path / "0.parquet", range(3), image=["0.png"] * 3)
    with pytest.raises(ValueError, match="no column holds pictures.*image: string"):
        dataset(tmp_path, split="")


def test_bad_records_and_damaged_files(shards, monkeypatch):
    images = [
        {"bytes": b"<html>", "path": "x"},
        {"bytes": None, "path": "y"},
        None,
        {"bytes": b"", "path": None},
    ]
    images += [{"bytes": made.flat_png(0), "path": None}]
    write(shards / "train-00001-of-00002.parquet", range(5), image=images)
    data = dataset(shards)
    assert len(seen(data)) == 8 and data.bad_records() == {"undecodable": 1, "no_image": 3}
    (shards / "train-00002.parquet").write_bytes((shards / "train-00001-of-00002.parquet").read_bytes()[:200])
    (shards / "train-00003.parquet").write_bytes(b"<!doctype html>")
    with pytest.raises(ValueError, match="00002.parquet is cut: .*\n.*00003.parquet is a web page"):
        dataset(shards)
    allowed = dataset(shards, allow_damaged="train-00002.parquet,train-00003.parquet")
    assert allowed.num_records == 13
    write(shards / "train-00001-of-00002.parquet", range(2), text=None)
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has no column 'text', which"):
        seen(dataset(shards, allow_damaged="train-00002.parquet,train-00003.parquet"))
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="row groups of about 100 rows"):
        dataset(shards, split="valid").source.read(0)

"""Folders of pictures with captions: Hugging Face's metadata, KEY.txt beside KEY.jpg, splits."""

import json

import numpy as np
import pytest

from dalle2_jax.data import pipeline
from dalle2_jax.data.find import find_files
from tests.data import shards_for_tests as made


def dataset(path, fields=("image", "tokens"), split="train", **settings):
    settings = dict(source="folder", image_size=8, tokenizer=made.WordTokenizer()) | settings
    return pipeline.make_dataset(path=str(path), split=split, fields=fields, **settings)


def seen(data) -> dict[int, int]:
    """{number of a picture, by its colour: the number that ends its caption} of an epoch."""
    found = {}
    for batch in data.batches(3, repeat=False):
        for picture, tokens in zip(batch["image"], batch["tokens"], strict=True):
            red, green, _ = picture[0, 0].tolist()
            found[red // 16 + green] = int(tokens[0])
    return found


def write(folder, numbers, texts=False, below=""):
    """FOLDER/BELOW/NUMBER.png, with NUMBER.txt if `texts`."""
    (folder / below).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / below / f"{number}.png").write_bytes(made.flat_png(number))
        if texts:
            (folder / below / f"{number}.txt").write_text(f"caption {number}\n")


def write_metadata(path, rows: list[dict]):
    names = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        path.write_text("\ufeff" + "".join(",".join(f'"{x}"' for x in line) + "\r\n" for line in lines))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_hugging_face(tmp_path, kind):
    write(tmp_path / "train", range(5))
    write(tmp_path / "train", [5, 6], below="more")
    rows = [dict(file_name=f"{n}.png", text=f'a "b", caption {n}'.replace('"', "")) for n in range(4)]
    rows += [dict(file_name="more/5.png", text="caption 5"), dict(file_name="../7.png", text="caption 7")]
    write_metadata(tmp_path / f"train/metadata.{kind}", rows)
    data = dataset(tmp_path)
    assert seen(data) == {n: n for n in (0, 1, 2, 3, 5)} and data.source.num_classes == 0
    assert data.bad_records() == {"not_in_metadata": 2, "no_image": 1}
    assert data.labels([4]) == ["caption 5"] and data.key(4) == "more/5.png"
    before = data.fingerprint
    write_metadata(tmp_path / f"train/metadata.{kind}", [*rows, dict(file_name="4.png", text="caption 4")])
    assert dataset(tmp_path).fingerprint != before and len(seen(dataset(tmp_path))) == 6


def test_fields_of_metadata(tmp_path):
    write(tmp_path, range(3))
    rows = [dict(file_name=f"{n}.png", prompt=f"x {n + 7}", caption_zh=[f"y {n}", "z 9"]) for n in range(3)]
    write_metadata(tmp_path / "metadata.jsonl", rows + [dict(file_name="./0.png", prompt="x 7")])
    assert seen(dataset(tmp_path, caption_field="prompt")) == {0: 7, 1: 8, 2: 9}
    chinese = dataset(tmp_path, language="zh")
    assert chinese.source.read(1).captions == {"zh": ("y 1", "z 9")}
    with pytest.raises(ValueError, match="no field 'promt'; did you mean 'prompt'. There is: caption_zh, fi"):
        dataset(tmp_path, caption_field="promt")
    with pytest.raises(ValueError, match="such captions; did you mean|There is: any, zh"):
        dataset(tmp_path)
    write_metadata(tmp_path / "metadata.jsonl", [dict(file_name="0.png", alt="x 1")])
    with pytest.raises(ValueError, match="fields: file_name, alt; .*data.caption_field"):
        dataset(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "metadata.jsonl",
            '{"file_name": "0.png"}\n{"image": "1.png"}',
            "line 2 has no file_name.*are image",
        ),
        ("metadata.jsonl", '{"file_name": "0.png"\n', "line 1 is no object in JSON"),
        ("metadata.jsonl", "[1]", "line 1 is no object in JSON"),
        ("metadata.csv", "image,text\n0.png,caption 0\n", "line 2 has no file_name.*are image, text"),
        ("metadata.csv", 'file_name,text\n0.png,"caption" 0\n', "line 2 is no row of a CSV"),
        ("metadata.csv", "file_name,text\nx.png,caption 0\n", "names no picture that is there"),
    ],
)
def test_metadata_that_is_refused(tmp_path, name, content, message):
    write(tmp_path, range(2))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path)


def test_texts_beside_pictures(tmp_path):
    write(tmp_path / "train", range(6), texts=True)
    write(tmp_path / "train", [6], texts=True, below="more")
    write(tmp_path / "valid", [9], texts=True)
    (tmp_path / "train/alone.txt").write_text("caption 1")
    (tmp_path / "train/2.txt").write_bytes(b"caption \xff")
    data = dataset(tmp_path)
    assert seen(data).items() >= {n: n for n in (0, 1, 3, 4, 5, 6)}.items() and not data.source.num_classes
    assert data.bad_records() == {"other_extension": 1, "invalid_utf8": 1}
    assert seen(dataset(tmp_path, split="validation")) == {9: 9}
    batches = data.batches(3)
    whole = [next(batches) for _ in range(5)]
    for one, other in zip(data.batches(3, start_step=2), whole[2:], strict=False):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    before = data.fingerprint
    (tmp_path / "train/3.txt").write_text("a longer caption 3")
    assert dataset(tmp_path).fingerprint != before
    with pytest.raises(ValueError, match="eval_split|no split 'test'; There is: train, valid; name it by"):
        dataset(tmp_path, split="test")


def test_texts_beside_pictures_of_classes(tmp_path):
    write(tmp_path, range(3), texts=True, below="cat")
    write(tmp_path, range(3, 5), texts=True, below="dog")
    data = dataset(tmp_path, ("image", "tokens", "label"), num_classes=2)
    assert data.classes == ("cat", "dog") and seen(data) == {n: n for n in range(5)}
    assert [data.source.read(n).label for n in (0, 4)] == [0, 1]


def test_names_of_classes_are_captions_where_that_is_set(tmp_path):
    write(tmp_path, range(3), below="picture_7")
    write(tmp_path, [3], below="9")
    with pytest.raises(ValueError, match="data.class_captions=True for folders by class"):
        dataset(tmp_path)
    write(tmp_path, [4], texts=True, below="9")
    data = dataset(tmp_path, class_captions=True)
    assert seen(data) == {0: 7, 1: 7, 2: 7, 3: 9, 4: 4}
    assert data.source.read(4).captions == {"en": ("picture 7",)}


def test_loose_pictures_without_captions(tmp_path):
    write(tmp_path, range(2))
    with pytest.raises(
        ValueError, match=r'move them into one, .*KEY.txt beside KEY.png.*"file_name": "1.png"'
    ):
        dataset(tmp_path)
    with pytest.raises(ValueError, match="a field of metadata.jsonl, and .* has no such file"):
        dataset(tmp_path, caption_field="alt")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_shards_of_validation_are_found_by_each_of_their_names(tmp_path, name):
    for shard in ("train-0.tar", f"{name}-0.tar", f"{name}-1.tar"):
        made.write_samples(tmp_path / shard, [0])
    (tmp_path / "below" / name).mkdir(parents=True)
    made.write_samples(tmp_path / "below" / name / "0.tar", [0])
    for split in ("validation", "val", "valid"):
        assert len(find_files(str(tmp_path), split, ".tar")) == 2
        assert len(find_files(str(tmp_path / "below"), split, ".tar")) == 1
    with pytest.raises(ValueError, match="--config.data.split=test: .* neither test-"):
        find_files(str(tmp_path), "test", ".tar")
    for shard in tmp_path.glob(f"{name}-*"):
        shard.unlink()
    with pytest.raises(ValueError, match="--config.data.eval_split=validation: .*There is: train"):
        find_files(str(tmp_path), "validation", ".tar")


def test_files_of_another_kind_name_their_source(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            find_files(str(tmp_path), "train", ".tar")

    write(tmp_path, [1], below="cat")
    refused("holds no .*--config.data.source=folder")
    (tmp_path / "0.parquet").write_bytes(b"")
    refused("--config.data.source=parquet")
    (tmp_path / "0.tar.gz").write_bytes(b"")
    refused(r"read uncompressed: gunzip .*/\*.gz")


def test_a_named_field_of_tar_shards(tmp_path):
    members = [member for number in range(3) for member in made.sample(number, alt=f"page {number + 5}")]
    made.write_tar(tmp_path / "0.tar", members)
    assert seen(dataset(tmp_path, source="tar", split="", caption_field="alt")) == {0: 5, 1: 6, 2: 7}
    with pytest.raises(ValueError, match="fields: .txt, caption, key, alt; .*data.caption_field"):
        dataset(tmp_path, source="tar", split="", caption_field="title")

"""Captions where they enter: byte-order marks, halves of surrogate pairs, and data that has no captions."""

import json

import numpy as np
import pytest

from dalle2_jax.data import shards
from dalle2_jax.data.records import BadRecord
from dalle2_jax.data.shards import clean_caption, encodable
from dalle2_jax.data.tokenizer import train_bpe
from dalle2_jax.generate import output
from dalle2_jax.generate.pipeline import Result
from dalle2_jax.runtime import grid
from tests.data import shards_for_tests as made

HALF = '{"caption": "\\ud83d a red circle"}'  # the file has the escape of half a pair


def tar_of(tmp_path, members, name="00000.tar"):
    """A tar of (ending, bytes) beside one picture each."""
    files = []
    for number, (ending, data) in enumerate(members):
        files += [(f"{number:03d}.png", made.flat_png(number)), (f"{number:03d}.{ending}", data)]
    made.write_tar(tmp_path / name, files)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a red star", "a red star"),
        ("\ud83d a red circle", "\ufffd a red circle"),
        ("a\ude00", "a\ufffd"),
        ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),  # two halves of a pair are its character
        ("\udced\udca0", "\ufffd\ufffd"),  # bytes of a command line that are no UTF-8
        ("猫 é", "猫 é"),
    ],
)
def test_halves_of_pairs_are_replaced(text, expected):
    assert encodable(text) == expected
    assert expected.encode() and clean_caption(f" \ufeff {text}\n") == expected


def test_captions_are_encodable_wherever_they_come_from(tmp_path):
    path = tar_of(
        tmp_path, [("json", HALF.encode()), ("json", b'{"text_zh": ["x\\udc00", "\\ud83d\\ude00"]}')]
    )
    source = made.open_source("tar", path, "")
    assert source.read(0).captions == {"en": ("\ufffd a red circle",)}
    assert source.read(1).captions == {"zh": ("x\ufffd", "\U0001f600")}
    for kind, rows in (("img_emb", np.zeros((2, 4), np.float16)), ("text_emb", np.ones((2, 4), np.float16))):
        (tmp_path / "rows" / kind).mkdir(parents=True)
        np.save(tmp_path / "rows" / kind / f"{kind}_0.npy", rows)
    (tmp_path / "rows" / "metadata").mkdir()
    (tmp_path / "rows" / "metadata" / "metadata_0.jsonl").write_text(f"{HALF}\n{HALF}\n")
    for opened in (
        made.open_source("embeddings", str(tmp_path / "rows"), ""),
        made.open_source("tar", path, "", embeddings=str(tmp_path / "rows")),
    ):
        assert opened.read(1, image=False).captions == {"en": ("\ufffd a red circle",)}


def test_what_enters_can_be_trained_on_tokenized_drawn_and_written(tmp_path):
    pipeline = pytest.importorskip("dalle2_jax.data.pipeline")
    path = tar_of(tmp_path, [("json", HALF.encode()), ("txt", b"a red\0 circle")])
    captions = list(pipeline.iterate_captions(source="tar", path=path, split=""))
    assert captions == ["\ufffd a red circle", "a red\0 circle"]
    tokenizer = train_bpe(captions, 300, 32)
    data = pipeline.make_dataset(
        source="tar", path=path, split="", fields=("image", "tokens"), image_size=8, tokenizer=tokenizer
    )
    (batch,) = data.batches(2, repeat=False, shuffle=False)
    assert [tokenizer.decode(row) for row in batch["tokens"]] == ["\ufffd a red circle", "a red circle"]
    assert data.bad_records() == {"unreadable_character": 1}  # noted, and the record is used
    examples = data.examples(range(2))
    picture = grid.labelled_grid(examples["image"], examples["captions"])
    grid.save_png(tmp_path / "grid.png", picture, {"captions": json.dumps(captions, ensure_ascii=False)})
    (tmp_path / "captions.json").write_text(json.dumps(captions, ensure_ascii=False), "utf-8")


def test_byte_order_marks_are_no_part_of_a_text(tmp_path):
    """A caption began with U+FEFF; a JSON file behind a mark was `invalid_json`."""
    members = [
        ("txt", "a red 猫".encode("utf-8-sig")),
        ("json", '{"caption": "a red 猫"}'.encode("utf-8-sig")),
    ]
    source = made.open_source("tar", tar_of(tmp_path, members), "")
    assert [source.read(row).captions for row in range(2)] == [{"en": ("a red 猫",)}] * 2


def test_without_captions_the_fields_that_are_there_are_named(tmp_path):
    pipeline = pytest.importorskip("dalle2_jax.data.pipeline")
    settings = dict(
        source="tar", split="", fields=("image", "tokens"), image_size=8, tokenizer=made.WordTokenizer()
    )
    named = b'{"alt": "a star", "url": "x"}'
    path = tar_of(tmp_path, [("json", named)] * 3)
    message = (
        r"no captions in .*00000.tar: none of 3 records .*; fields: alt, url; rename the field that holds"
    )
    with pytest.raises(ValueError, match=message):
        pipeline.make_dataset(path=path, **settings)
    with pytest.raises(ValueError, match=message):
        next(pipeline.iterate_captions(source="tar", path=path, split=""))
    pictures = tar_of(tmp_path, [("cls", b"3")] * 3, "00001.tar")
    with pytest.raises(ValueError, match="none of 3 records .*; put KEY.txt beside each KEY.jpg"):
        pipeline.make_dataset(path=pictures, **settings)
    # Where some have captions, those without are bad records, and say what they have.
    mixed = tar_of(
        tmp_path, [("txt", b"caption 0"), ("json", named), ("json", b'{"caption_zh": "3"}')], "00002.tar"
    )
    data = pipeline.make_dataset(path=mixed, **settings)
    (batch,) = data.batches(3, repeat=False, shuffle=False)
    assert batch["index"].tolist() == [0, 0, 0]
    details = {item["index"]: item["detail"] for item in data._bad.kept}
    assert details == {
        1: "language en; it has no caption; fields: alt, url",
        2: "language en; it has captions in zh; fields: caption_zh",
    }


def test_a_caption_late_in_the_data_is_enough(tmp_path):
    """The first records have none, others do: those are bad records, not a reason to refuse the data."""
    pipeline = pytest.importorskip("dalle2_jax.data.pipeline")
    path = tar_of(tmp_path, [("json", b"{}")] * 20 + [("txt", b"caption 20")] * 30)
    settings = dict(fields=("tokens",), tokenizer=made.WordTokenizer())
    assert pipeline.make_dataset(source="tar", path=path, split="", **settings).num_records == 50


def test_text_that_is_no_utf8_is_a_bad_record(tmp_path):
    source = made.open_source("tar", tar_of(tmp_path, [("txt", "猫".encode("utf-16")), ("txt", b"\xe9")]), "")
    with pytest.raises(BadRecord, match="invalid_utf8: it is UTF-16: save it as UTF-8"):
        source.read(0)
    with pytest.raises(BadRecord, match="invalid_utf8: .*0xe9"):
        source.read(1)


def test_pictures_of_captions_and_files_with_any_name_are_written(tmp_path):
    """Captions and file names of a command line may hold bytes that are no UTF-8."""
    images = np.zeros((1, 8, 8, 3), np.uint8)
    result = Result(("a \ud83d star",), (0,), 0, images[:, 0, 0, :1], images, images, {}, {})
    assert result.captions == ("a \ufffd star",)
    (path,) = output.write_pictures(tmp_path, result, "model", command="edit", given=["pi\udce9.png"])
    assert path.exists() and (tmp_path / "grid.png").exists()
    assert json.loads((tmp_path / "edit.json").read_text("utf-8"))["pictures"][0]["given"] == ["pi\ufffd.png"]


def test_lists_of_prompts_and_classes_are_clean(tmp_path):
    from dalle2_jax.evaluate import picture_sets, prompts
    from dalle2_jax.evaluate.metrics import zero_shot

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "\\ud83d a red star"}\n')
    assert prompts.read_prompts(tmp_path / "prompts.jsonl") == [{"prompt": "\ufffd a red star"}]
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfred star\nblue ring\n")
    assert zero_shot.read_names(tmp_path / "classes.txt") == ["red star", "blue ring"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(made.flat_png(1))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa red star\n")
    assert picture_sets.open_pictures(folder).captions() == ["a red star"]
    (folder / "generate.json").write_text('{"pictures": [{"file": "a.png", "caption": "\\udc00 star"}]}')
    assert picture_sets.open_pictures(folder).captions() == ["\ufffd star"]


def test_the_fields_of_a_message_are_few_and_short(tmp_path):
    fields = {f"{'x' * 3000}{n}\ud83d": 1 for n in range(99)}
    source = made.open_source("tar", tar_of(tmp_path, [("json", json.dumps(fields).encode())]), "")
    from dalle2_jax.data.captions import _named

    said = _named(source.read(0).fields)
    assert len(said) < 600 and said.endswith(", ...") and said.encode()
    assert shards.language_of("caption_zh") == "zh"

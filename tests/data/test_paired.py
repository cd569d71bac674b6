"""Rows of embedding folders meet their own records: files by number, captions by row, keys compared."""

import json
import logging
import shutil

import numpy as np
import pytest

from dalle2_jax.data import embeddings
from dalle2_jax.data.records import BadRecord
from tests.data import shards_for_tests as made


def save_rows(folder, kind, name, first, count):
    """Rows [count, 4] whose values are `first` and what follows."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    np.save(folder / kind / name, np.arange(first, first + count)[:, None] + np.zeros(4, np.float16))


def save_lines(folder, name, rows, start=b""):
    (folder / "metadata").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata" / name).write_bytes(start + lines.encode())


def save_folder(folder, parts, digits=1):
    """clip-retrieval's folder: `parts` holds the metadata of each part, row by row."""
    first = 0
    for part, rows in enumerate(parts):
        for kind in ("img_emb", "text_emb"):
            save_rows(folder, kind, f"{kind}_{part:0{digits}d}.npy", first, len(rows))
        save_lines(folder, f"metadata_{part:0{digits}d}.jsonl", rows)
        first += len(rows)
    return str(folder)


def numbered(numbers, **more):
    return [
        {"caption": f"caption {n}"} | {name: f"{text}{n}" for name, text in more.items()} for n in numbers
    ]


def paired(tmp_path, folder, count=6):
    made.write_samples(tmp_path / "00000.tar", range(count))
    return made.open_source("tar", str(tmp_path / "00000.tar"), "", embeddings=str(folder))


def test_two_columns_of_captions_are_those_of_their_row(tmp_path):
    """Column by column in the place of row by row, record 3 had the caption of record 0."""
    rows = [{"caption": f"own {n}", "text": f"alt {n}", "caption_zh": f"zh {n}"} for n in range(6)]
    folder = save_folder(tmp_path / "rows", [rows[:3], rows[3:]])
    source, alone = paired(tmp_path, folder), made.open_source("embeddings", folder, "")
    for n in range(6):
        # text_emb is of `caption`: its tokens, and not those of `text`, belong to it.
        embedded = {"en": (f"own {n}",), "zh": (f"zh {n}",)}
        assert source.read(n).captions == alone.read(n, image=False).captions == embedded
    shutil.rmtree(tmp_path / "rows" / "text_emb")
    alone = made.open_source("embeddings", folder, "")
    for n in range(6):
        both = {"en": (f"own {n}", f"alt {n}"), "zh": (f"zh {n}",)}
        assert alone.read(n, image=False).captions == both


def test_two_columns_of_captions_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="metadata as parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="metadata as parquet needs pyarrow")
    folder = tmp_path / "rows"
    for part in range(2):
        own = range(3 * part, 3 * part + 3)
        for kind in ("img_emb", "text_emb"):
            save_rows(folder, kind, f"{kind}_{part}.npy", 3 * part, 3)
        columns = {"caption": [f"own {n}" for n in own]} | (
            {"text": [f"alt {n}" for n in own]} if part else {}
        )
        (folder / "metadata").mkdir(exist_ok=True)
        table = pyarrow.table(columns)
        parquet.write_table(table, folder / "metadata" / f"metadata_{part}.parquet", row_group_size=2)
    source = paired(tmp_path, folder)
    assert source.read(2).captions == {"en": ("own 2",)}  # of a file without the second column
    assert source.read(3).captions == {"en": ("own 3",)}
    assert source.read(5).embeds["text_embed"].tolist() == [5] * 4


def test_parquet_captions_that_are_no_utf8_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="metadata as parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="metadata as parquet needs pyarrow")
    save_rows(tmp_path, "text_emb", "text_emb_0.npy", 0, 3)
    (tmp_path / "metadata").mkdir()
    stored = pyarrow.array([b"a red star", b"\xff\xfe", b"\xed\xa0\xbd half"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"caption": stored}), tmp_path / "metadata" / "metadata_0.parquet")
    source = made.open_source("embeddings", str(tmp_path), "")
    found = [source.read(row, image=False).captions for row in range(3)]
    assert found == [{"en": ("a red star",)}, {}, {}]


def test_a_field_that_begins_in_a_later_row_or_file_stays_in_its_row(tmp_path):
    parts = [
        [{"caption": "a"}, {"caption_zh": "b", "caption": "c"}],
        [{"text": "d"}, {"url": "x"}, {"caption": "e"}],
    ]
    source = made.open_source("embeddings", save_folder(tmp_path, parts), "")
    found = [source.read(row, image=False).captions for row in range(5)]
    assert found == [{"en": ("a",)}, {"en": ("c",), "zh": ("b",)}, {"en": ("d",)}, {}, {"en": ("e",)}]
    assert source.read(3, image=False).fields == ("caption", "caption_zh", "text", "url")


def test_files_are_matched_by_their_numbers(tmp_path):
    """Twelve parts, of which each kind writes its numbers otherwise: in another order by name."""
    for part in range(12):
        save_rows(tmp_path, "img_emb", f"img_emb_{part:04d}.npy", 2 * part, 2)
        save_rows(tmp_path, "text_emb", f"text_emb_{part}.npy", 2 * part, 2)
        save_lines(tmp_path, f"metadata_{part:02d}.jsonl", numbered(range(2 * part, 2 * part + 2)))
    source = made.open_source("embeddings", str(tmp_path), "")
    for row in range(24):
        record = source.read(row, image=False)
        assert record.captions == {"en": (f"caption {row}",)}
        assert record.embeds["image_embed"][0] == record.embeds["text_embed"][0] == row


def many_columns():
    """Rows with more columns of captions than any data set has languages."""
    return [{f"caption_{first}{second}": "x" for first in "abc" for second in "abcdefghijklmnopqrstuvw"}] * 2


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda f: (f / "img_emb/img_emb_1.npy").unlink(), "img_emb has no file beside text_emb/text_emb_1"),
        (lambda f: (f / "text_emb/text_emb_1.npy").unlink(), "text_emb has no file beside img_emb/img_emb_1"),
        (
            lambda f: (f / "metadata/metadata_1.jsonl").unlink(),
            "metadata has no file beside img_emb/img_emb_1",
        ),
        (
            lambda f: save_lines(f, "metadata_7.jsonl", numbered([1])),
            "img_emb has no file beside metadata/meta",
        ),
        (lambda f: save_lines(f, "metadata_01.jsonl", numbered([1])), "have one number"),
        (lambda f: (f / "metadata/metadata_1.parquet").touch(), "metadata_1.parquet have one number"),
        (
            lambda f: save_rows(f, "text_emb", "text_emb_1.npy", 0, 3),
            "emb_1.npy has 2 rows, .*text_emb_1.npy 3",
        ),
        # As many rows in all, but not in each file.
        (
            lambda f: [save_lines(f, f"metadata_{p}.jsonl", numbered(range(n))) for p, n in ((0, 1), (1, 3))],
            "metadata_0.jsonl has 1 rows, where there are embeddings for 2",
        ),
        (lambda f: save_lines(f, "metadata_0.jsonl", many_columns()), "more than 64 columns of captions"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, spoil, complaint):
    folder = tmp_path / "rows"
    save_folder(folder, [numbered(range(2)), numbered(range(2, 4)), numbered(range(4, 6))])
    assert len(paired(tmp_path, folder)) == 6
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        paired(tmp_path, folder)
    with pytest.raises(ValueError, match=complaint):
        made.open_source("embeddings", str(folder), "")


def test_metadata_may_begin_with_a_byte_order_mark_and_have_blank_lines(tmp_path):
    save_rows(tmp_path, "img_emb", "img_emb_0.npy", 0, 2)
    save_lines(tmp_path, "metadata_0.jsonl", numbered(range(2)), start=b"\xef\xbb\xbf")
    with (tmp_path / "metadata" / "metadata_0.jsonl").open("a") as file:
        file.write("\n\n")
    source = made.open_source("embeddings", str(tmp_path), "")
    assert [source.read(row, image=False).captions["en"] for row in (0, 1)] == [
        ("caption 0",),
        ("caption 1",),
    ]


def test_rows_of_other_records_are_refused_by_the_keys_of_clip_retrieval(tmp_path):
    """Without embed.json: `key` as img2dataset writes it, or image_path with folders and an ending."""
    for name, column, ending in (("a", "key", ""), ("b", "image_path", ".png")):
        rows = [{"caption": "x", column: f"{n:09d}{ending}"} for n in range(6)]
        rows = rows if column == "key" else [row | {column: "some/folder/" + row[column]} for row in rows]
        right = paired(tmp_path, save_folder(tmp_path / name, [rows]))
        assert right.read(3).embeds["image_embed"][0] == 3
        moved = save_folder(tmp_path / f"{name}_moved", [rows[:3] + rows[4:] + rows[3:4]])
        with pytest.raises(
            ValueError, match=r"row 3 of .* is of record '.*000000004.*', not '00000.tar:000000003'"
        ):
            paired(tmp_path, moved)


def test_a_row_of_another_record_that_no_sample_met_is_a_bad_record(tmp_path):
    count = 300
    keys = [f"{n:09d}" for n in range(count)]
    keys[101], keys[102] = keys[102], keys[101]
    rows = [{"caption": f"said of {n}", "key": key} for n, key in enumerate(keys)]
    source = paired(tmp_path, save_folder(tmp_path / "rows", [rows]), count)
    assert source.read(100).captions == {"en": ("said of 100",)}
    with pytest.raises(
        BadRecord, match="other_record: 00000.tar:000000101: its row of embeddings is of '000000102'"
    ):
        source.read(101)


def test_captions_that_stand_in_other_rows_are_refused(tmp_path):
    rows = numbered(range(6))
    with pytest.raises(
        ValueError, match=r"the caption of record 3 \(00000.tar:000000003\) stands in row 4, and so"
    ):
        paired(tmp_path, save_folder(tmp_path / "moved", [rows[:3] + [{"caption": "more"}] + rows[3:5]]))


def test_keys_of_another_kind_are_no_matter_where_captions_agree(tmp_path):
    folder = save_folder(tmp_path / "rows", [numbered(range(6), key="product ")])
    assert paired(tmp_path, folder).read(5).captions == {"en": ("caption 5",)}
    folder = save_folder(
        tmp_path / "others", [[row | {"caption": "x"} for row in numbered(range(6), key="product ")]]
    )
    with pytest.raises(ValueError, match="row 0 of .* is of record 'product 0'"):
        paired(tmp_path, folder)


def test_what_nothing_confirms_is_told(tmp_path, caplog):
    """Rows whose captions were written anew, without keys: they are taken in order, with a warning."""
    caplog.set_level(logging.WARNING)
    source = paired(tmp_path, save_folder(tmp_path / "rows", [[{"caption": f"0: {n}"} for n in range(6)]]))
    assert source.read(4).captions == {"en": ("0: 4",)}
    assert "row 0 says '0: 0', its record 'caption 0'" in caplog.text
    caplog.clear()
    paired(tmp_path, save_folder(tmp_path / "same", [numbered(range(6))]))
    assert not caplog.text


def test_a_pass_over_embeddings_of_unknown_records_is_refused(tmp_path):
    """embed.json was removed: parts that are there would have counted as done, of whatever data set."""
    folder = embeddings.epath.Path(tmp_path)
    save_folder(tmp_path, [numbered(range(3))])
    with pytest.raises(ValueError, match="holds embeddings, but no embed.json says of which records"):
        embeddings.keep_plan(folder, {"records": 3})
    assert not (tmp_path / "embed.json").exists()


def test_parts_that_are_not_of_the_plan_are_told_before_it_is_called_complete(tmp_path):
    save_folder(tmp_path, [numbered(range(3)), numbered(range(3, 6))], digits=5)
    (tmp_path / "embed.json").write_text(json.dumps({"records": 3, "rows_per_shard": 3}))
    with pytest.raises(ValueError, match="6 embeddings of 3 records"):
        embeddings.finish(embeddings.epath.Path(tmp_path))
    assert "left_out" not in json.loads((tmp_path / "embed.json").read_text())

"""Sources are random access, refuse what is unsafe, count what is lost, and say what exists."""

import json
import os
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest

from dalle2_jax.data import examples, metadata, records, shards
from dalle2_jax.data import tar as tars
from dalle2_jax.data.records import BadRecord
from tests.data import shards_for_tests as made


def open_tar(path, split="", **settings):
    return made.open_source("tar", str(path), split, **settings)


def test_tar_records_are_what_tarfile_reads(tmp_path):
    made.write_samples(tmp_path / "00000.tar", range(5))
    made.write_tar(
        tmp_path / "00001.tar", made.sample(5, "a bridge", caption_zh="桥", captions=["a bridge", "an arch"])
    )
    source = open_tar(tmp_path)
    assert len(source) == 6 and not source.refused
    with tarfile.open(tmp_path / "00000.tar") as tar:
        for index in range(5):
            record = source.read(index)
            assert record.key == f"00000.tar:{index:09d}"
            assert record.image == tar.extractfile(f"{index:09d}.png").read()
            assert record.captions == {"en": (f"caption {index}",)}
    assert source.read(5).captions == {"en": ("a bridge", "an arch"), "zh": ("桥",)}
    assert source.read(5, image=False).image is None and source.read(5, captions=False).captions == {}


def test_long_names_of_both_extensions_are_read(tmp_path):
    for name, tar_format in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            for member, data in made.sample(7):
                info = tarfile.TarInfo("folder/" * 30 + member)
                info.size = len(data)
                tar.addfile(info, made.io.BytesIO(data))
        source = open_tar(path)
        assert len(source) == 1 and source.read(0).captions == {"en": ("caption 7",)}
        assert source.read(0).key == source.read(0, image=False).key == f"{name}.tar:000000007"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_letters_are_keys(tmp_path, tar_format):
    """Spaces, signs, other scripts, bytes that are no UTF-8, and names beyond the 100 bytes of a header."""
    names = ["photo 1 (clean)", "фото_1", 'a:b*c?d"$(e)', "图 1", "latin \udce9 1", "latin \udcea 1"]
    names += [] if tar_format == tarfile.USTAR_FORMAT else ["long " * 30 + end for end in "ab"]
    members = [(f"{name}.{end}", text) for name in names for end, text in (("png", b"p"), ("txt", b"words"))]
    made.write_tar(tmp_path / "00000.tar", members, tar_format)
    source = open_tar(tmp_path)
    assert len(source) == len(names) and not source.refused and not source.passed
    keys = [source.read(index).key for index in range(len(names))]
    assert keys == [source.read(index, image=False).key for index in range(len(names))]
    escaped = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]
    assert keys == [f"00000.tar:{name}" for name in escaped] and len(set(keys)) == len(names)
    assert all(source.read(index).captions == {"en": ("words",)} for index in range(len(names)))
    "".join(keys).encode()  # as parquet and JSON ask for


def test_a_ustar_prefix_is_no_part_of_the_key(tmp_path):
    name = "folder/" * 20 + "v1.5"
    made.write_tar(tmp_path / "00000.tar", [(f"{name}.png", b"p"), (f"{name}.txt", b"words")])
    assert open_tar(tmp_path).read(0).key == "00000.tar:v1.5"


def test_a_key_ends_at_the_last_dot_before_a_known_extension(tmp_path):
    members = [(f"v1.{number}.{end}", b"words") for number in range(4) for end in ("png", "txt")]
    members += [(f"img..{number}.JPG", b"p") for number in range(2)]
    made.write_tar(tmp_path / "00000.tar", members)
    source = open_tar(tmp_path)
    assert [source.read(index).key[10:] for index in range(6)] == [
        *(f"v1.{number}" for number in range(4)),
        *(f"img..{number}" for number in range(2)),
    ]
    assert source.read(3).captions == {"en": ("words",)} and not source.refused and not source.passed


def test_what_lies_beside_samples_changes_no_set_that_was_read_before(tmp_path):
    """Masks, further captions, other files: passed over with a reason and an example, in any order."""
    plain = [made.sample(number) for number in range(12)]
    beside = [
        ("seg.png", b"p"), ("seg.json", b"{}"), ("0.txt", b"other words"), ("png.json", b"{}"),
        ("depth.v2.png", b"p"), ("npy", b"1"), ("cls", b"1"), ("jpg.bak", b"1"),
    ]  # fmt: skip
    mixed = []
    for number, members in enumerate(plain):
        extra = [(f"{number:09d}.{end}", data) for end, data in beside]
        mixed += [*extra, *members] if number % 2 else [*members, *extra]
    mixed += [("._000000001.png", b"1"), ("README", b"1"), ("set.info/", b"")]
    (tmp_path / "plain").mkdir()
    (tmp_path / "mixed").mkdir()
    made.write_tar(tmp_path / "plain" / "00000.tar", [member for members in plain for member in members])
    made.write_tar(tmp_path / "mixed" / "00000.tar", mixed[:-1])
    one, other = open_tar(tmp_path / "plain"), open_tar(tmp_path / "mixed")
    assert len(one) == len(other) and not other.refused
    for index in range(12):
        assert one.read(index).key == other.read(index).key
        assert one.read(index).captions == other.read(index).captions
        assert (one.read(index).label, other.read(index).label) == (None, 1)  # KEY.cls
    # KEY.seg and KEY.png are one sample each of the parts; KEY.0 and KEY.depth.v2 too.
    assert other.passed == {"part_of_another": 12 * 4, "other_extension": 12 * 2 + 1, "hidden_file": 1}
    assert other.examples["part_of_another"] == "00000.tar: 000000000.seg"
    assert other.examples["other_extension"] == "00000.tar: 000000000.npy"


def test_a_picture_with_a_caption_of_its_own_is_a_record_beside_a_shorter_key(tmp_path):
    members = [(f"{key}.{end}", b"words") for key in ("v1", "v1.3", "v1.4") for end in ("png", "txt")]
    members += [("w.png", b"p"), ("w.json", b"{}"), ("w.2.png", b"p"), ("w.2.json", b"{}")]
    made.write_tar(tmp_path / "00000.tar", members)
    source = open_tar(tmp_path)
    keys = [source.read(index).key[10:] for index in range(len(source))]
    assert keys == ["v1", "v1.3", "v1.4", "w", "w.2"] and not source.passed


@pytest.mark.parametrize("where", ["in a member", "in a header", "between members", "before the end marks"])
def test_truncated_tar(tmp_path, where):
    path = tmp_path / "00000.tar"
    made.write_samples(path, range(10))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    third = members[9]  # the picture of sample 3
    end = members[-1].offset_data + (members[-1].size + 511) // 512 * 512
    cut = {
        "in a member": third.offset_data + third.size // 2,
        "in a header": third.offset + 100,
        "between members": third.offset,
        "before the end marks": end,
    }[where]
    os.truncate(path, cut)
    with pytest.raises(ValueError, match=r"00000.tar is cut: it ends early; \d+ records can be read"):
        open_tar(path)
    source = open_tar(path, allow_damaged="00000.tar")
    assert source.passed == {"truncated_archive": 1} and not source.refused
    assert len(source) == (10 if where == "before the end marks" else 3)
    assert source.read(2).captions == {"en": ("caption 2",)}


def test_damaged_tar_header_is_an_error_unless_allowed(tmp_path):
    path = tmp_path / "00000.tar"
    made.write_samples(path, range(4))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    with open(path, "r+b") as file:
        file.seek(offset + 3)
        file.write(b"X")
    with pytest.raises(ValueError, match="00000.tar has a damaged header.* 2 records can be read"):
        open_tar(path)
    source = open_tar(path, allow_damaged="00000.tar")
    assert source.passed == {"damaged_archive": 1} and len(source) == 2


def test_fewer_samples_than_the_manifest(tmp_path):
    made.write_samples(tmp_path / "00000.tar", range(4))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 9}))
    assert open_tar(tmp_path).refused == {"missing_from_shard": 5}


def test_tar_traversal_links_and_devices_are_refused(tmp_path):
    def special(name, kind, target=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    outside = tmp_path / "outside.png"
    folder = tmp_path / "data"
    folder.mkdir()
    faults = [
        ("../outside.png", made.flat_png(1)),
        ("/etc/outside.png", made.flat_png(1)),
        ("a/../../b.png", made.flat_png(1)),
        ("a\x1b[2Jb.png", made.flat_png(1)),
        ("a\nb.png", made.flat_png(1)),
        special("s.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("h.png", tarfile.LNKTYPE, "000000000.png"),
        special("c.png", tarfile.CHRTYPE),
        special("f.png", tarfile.FIFOTYPE),
        special("folder", tarfile.DIRTYPE),
    ]
    made.write_tar(folder / "00000.tar", [*faults, *made.sample(3)])
    source = open_tar(folder)
    assert source.refused == {"unsafe_name": 5, "not_a_regular_file": 4}
    assert source.examples["unsafe_name"] == "00000.tar: ../outside.png"
    assert len(source) == 1 and source.read(0).key == "00000.tar:000000003"
    assert not outside.exists() and os.listdir(folder) == ["00000.tar"]


def test_tar_huge_member(tmp_path):
    path = tmp_path / "00000.tar"
    huge = tarfile.TarInfo("000000000.png")
    huge.size = records.MAX_MEMBER_BYTES + 1
    with open(path, "wb") as file:  # sparse: the member's bytes are a hole
        file.write(huge.tobuf())
        file.seek(512 + (huge.size + 511) // 512 * 512)
        for name, data in made.sample(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.write(info.tobuf() + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    source = open_tar(path)
    assert source.refused == {"member_too_large": 1}
    assert len(source) == 1 and source.read(0).captions == {"en": ("caption 1",)}


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_tar_header_that_is_larger_than_any_name_is_not_read(tmp_path, kind):
    """A pax header or a long name: what is before it is kept, and no more than the limit is taken."""
    path = tmp_path / "00000.tar"
    made.write_samples(path, range(2))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in (tars.MAX_HEADER_BYTES, tars.MAX_HEADER_BYTES + 1, records.MAX_MEMBER_BYTES):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, size
        with open(path, "r+b") as file:  # sparse
            file.truncate(end)
            file.seek(end)
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.seek(end + 512 + (size + 511) // 512 * 512)
            for name, data in made.sample(2):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.write(member.tobuf() + data + bytes(-len(data) % 512))
            file.write(bytes(1024))
        tracemalloc.start()
        index = tars.index_tar(str(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        small = size == tars.MAX_HEADER_BYTES
        assert index.damage == ("" if small else "header_too_large") and not index.refused
        assert len(index.rows) == (3 if small else 2)
        assert peak < 8 * tars.MAX_HEADER_BYTES


def test_a_tar_with_more_members_than_any_shard_has(tmp_path, monkeypatch):
    """A file of a gigabyte of empty members is read no further than the limit."""
    path = tmp_path / "00000.tar"
    made.write_samples(path, range(4))
    monkeypatch.setattr(tars, "MAX_MEMBERS", 6)
    with pytest.raises(ValueError, match="00000.tar has more members than any shard has; 2 records"):
        open_tar(path)
    source = open_tar(path, allow_damaged="00000.tar")
    assert source.passed == {"too_many_members": 1} and len(source) == 2
    monkeypatch.setattr(tars, "MAX_MEMBERS", 13)  # twelve and the end
    assert not open_tar(path).passed


def test_texts_above_a_mebibyte_are_bad_records(tmp_path):
    """JSON takes many times its size as objects, and the caption beside it is no caption."""
    limit = records.MAX_TEXT_BYTES
    members = []
    for number, text in enumerate([b"x" * limit, b"x" * (limit + 1)]):
        members += [(f"{number}.png", made.flat_png(number)), (f"{number}.txt", text)]
    for number, size in ((2, limit), (3, limit + 1)):
        data = b'{"caption": "a", "of": [' + b"[]," * ((size - 40) // 3) + b"[]]}"
        members += [(f"{number}.png", made.flat_png(number)), (f"{number}.json", data.ljust(size))]
    made.write_tar(tmp_path / "00000.tar", members)
    source = open_tar(tmp_path)
    assert len(source.read(0).captions["en"][0]) == limit and source.read(2).captions == {"en": ("a",)}
    for index in (1, 3):
        tracemalloc.start()
        with pytest.raises(BadRecord, match=f"text_too_large: {limit + 1} bytes"):
            source.read(index)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit // 2
        assert source.read(index, captions=False).image == made.flat_png(index)


def test_a_manifest_above_a_mebibyte_is_not_read(tmp_path):
    made.write_samples(tmp_path / "00000.tar", range(4))
    stats = tmp_path / "00000_stats.json"
    for size, refused in ((records.MAX_TEXT_BYTES, {"missing_from_shard": 5}), (64 << 20, {})):
        with open(stats, "w") as file:
            file.write('{"successes": 9' + " " * (size - 16) + "}")
        tracemalloc.start()
        found = open_tar(tmp_path).refused
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == refused and peak < 4 * records.MAX_TEXT_BYTES


@pytest.mark.parametrize("count", ["1e999", "NaN", "1" + 400 * "0", "[9]", "[" * 100_000])
def test_a_manifest_that_counts_nothing_is_none(tmp_path, count):
    made.write_samples(tmp_path / "00000.tar", range(4))
    (tmp_path / "00000_stats.json").write_text(f'{{"successes": {count}}}')
    assert open_tar(tmp_path).refused == {}


def test_negative_pax_size_does_not_loop(tmp_path):
    path = tmp_path / "00000.tar"
    info = tarfile.TarInfo("000000001.png")
    info.pax_headers = {"size": "-1024"}
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="has a damaged header.* 0 records"):
        open_tar(path)


def test_compressed_tar_says_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="decompress it"):
        open_tar(tmp_path)


def write_tfrecord(path, numbers):
    """img2dataset's TFRecord variant; returns where each record begins."""
    starts, offset = [], 0
    with open(path, "wb") as file:
        for number in numbers:
            example = {
                "key": [b"%09d" % number],
                "png": [made.flat_png(number)],
                "txt": [b"caption %d" % number],
                "caption_zh": [f"图 {number}".encode()],
            }
            frame = made.tfrecord_frame(examples.serialize(example))
            starts.append(offset)
            offset += file.write(frame)
    return starts


def test_tfrecord_equals_what_tensorflow_reads(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="compares with TensorFlow")
    path = tmp_path / "00000.tfrecord"
    write_tfrecord(path, range(6))
    source = made.open_source("tfrecord", str(tmp_path), "")
    raw = [
        bytes(item) for item in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    ]  # checks our checksums too
    assert len(source) == len(raw) == 6
    for index in range(6):
        record = source.read(index)
        assert record.image == made.flat_png(index) and record.key == f"{index:09d}"
        assert record.captions == {"en": (f"caption {index}",), "zh": (f"图 {index}",)}


@pytest.mark.parametrize("inside", [True, False])
def test_truncated_tfrecord(tmp_path, inside):
    path = tmp_path / "00000.tfrecord"
    starts = write_tfrecord(path, range(6))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 6}))
    os.truncate(path, starts[4] + (20 if inside else 0))
    said = "is cut: it ends early" if inside else "holds fewer records than its _stats.json counts"
    with pytest.raises(ValueError, match=f"00000.tfrecord {said}.*; 4 records can be read"):
        made.open_source("tfrecord", str(tmp_path), "")
    source = made.open_source("tfrecord", str(tmp_path), "", allow_damaged="00000.tfrecord")
    assert len(source) == 4 and not source.refused
    # A cut on a boundary shows only in the manifest.
    assert source.passed == (
        {"truncated_archive": 1, "missing_from_shard": 2} if inside else {"missing_from_shard": 2}
    )


def test_a_flipped_bit_in_a_tfrecord_loses_that_record_alone(tmp_path):
    """Wherever in a record it lies: in the picture, in a caption, in the name of a field, in the checksum."""
    path = tmp_path / "00000.tfrecord"
    starts = write_tfrecord(path, range(6))
    whole = path.read_bytes()
    picture, caption = whole.index(made.flat_png(2)), whole.index(b"caption 2")
    assert starts[2] < picture < starts[3] and starts[2] < caption < starts[3]
    for place in (picture + 40, caption, whole.index(b"txt", starts[2]), starts[2] + 12, starts[3] - 1):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        source = made.open_source("tfrecord", str(tmp_path), "")
        with pytest.raises(BadRecord, match=f"checksum_differs: the record at byte {starts[2]}"):
            source.read(2)
        assert [source.read(index).captions["en"] for index in (1, 3)] == [("caption 1",), ("caption 3",)]


def test_a_flipped_bit_in_a_tfrecords_header_loses_the_rest_of_the_file(tmp_path):
    path = tmp_path / "00000.tfrecord"
    starts = write_tfrecord(path, range(6))
    data = bytearray(path.read_bytes())
    data[starts[4]] ^= 1  # a length: nothing says where the next record begins
    path.write_bytes(data)
    with pytest.raises(ValueError, match="00000.tfrecord has a damaged header.*; 4 records can be read"):
        made.open_source("tfrecord", str(tmp_path), "")
    source = made.open_source("tfrecord", str(tmp_path), "", allow_damaged="00000.tfrecord")
    assert len(source) == 4 and source.passed == {"damaged_archive": 1}


def test_a_tfrecord_that_is_no_example(tmp_path):
    path = tmp_path / "00000.tfrecord"
    write_tfrecord(path, range(2))
    path.write_bytes(path.read_bytes() + made.tfrecord_frame(b"\xff no protocol buffer"))
    with pytest.raises(BadRecord, match="invalid_proto"):
        made.open_source("tfrecord", str(tmp_path), "").read(2)


@pytest.mark.parametrize("size", [0, 1, 9, 255, 256, 257, 768, 1000, 70_000])
def test_crc32c_of_any_size(size):
    """Against the definition, bit by bit; 32 zeros have that of RFC 3720, B.4."""

    def by_bits(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    def masked(crc: int) -> int:
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    assert by_bits(bytes(32)) == 0x8A9136AA and records.masked_crc32c(bytes(32)) == masked(0x8A9136AA)
    data = np.random.default_rng(size).bytes(size)
    assert records.masked_crc32c(data) == masked(by_bits(data))


def test_crc32c_takes_little_memory():
    data = bytes(16 << 20)
    tracemalloc.start()
    records.masked_crc32c(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def write_embeddings(folder, rows=(5, 3), dim=4, text_rows=None):
    """Shards of embeddings whose values tell their record, and jsonl metadata; 12 shards sort numerically."""
    first = 0
    for shard, count in enumerate(rows):
        for name, shift in (("img_emb", 0), ("text_emb", 1000)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            count_here = (text_rows or rows)[shard] if name == "text_emb" else count
            values = np.arange(first, first + count_here)[:, None] + shift + np.zeros(dim)
            np.save(folder / name / f"{name}_{shard}.npy", values.astype(np.float16))
        (folder / "metadata").mkdir(exist_ok=True)
        lines = [json.dumps({"caption": f"caption {first + i}", "caption_zh": None}) for i in range(count)]
        (folder / "metadata" / f"metadata_{shard}.jsonl").write_text("\n".join(lines) + "\n")
        first += count


def test_embeddings_are_read_in_numeric_order(tmp_path):
    write_embeddings(tmp_path, rows=(2,) * 12)
    source = made.open_source("embeddings", str(tmp_path), "")
    assert len(source) == 24 and source.embed_dims == {"image_embed": 4, "text_embed": 4}
    for index in (0, 5, 23):
        record = source.read(index, image=False)
        assert record.captions == {"en": (f"caption {index}",)}
        np.testing.assert_array_equal(record.embeds["image_embed"], np.full(4, index, np.float32))
        np.testing.assert_array_equal(record.embeds["text_embed"], np.full(4, index + 1000, np.float32))


def test_parquet_metadata(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="metadata as parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="metadata as parquet needs pyarrow")

    write_embeddings(tmp_path, rows=(3,))
    os.remove(tmp_path / "metadata" / "metadata_0.jsonl")
    table = pyarrow.table({"url": ["u"] * 3, "caption": ["a", "b", None]})
    parquet.write_table(table, tmp_path / "metadata" / "metadata_0.parquet")
    source = made.open_source("embeddings", str(tmp_path), "")
    assert source.read(1, image=False).captions == {"en": ("b",)}
    assert source.read(2, image=False).captions == {}


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow", reason="metadata as parquet needs pyarrow")
    return pytest.importorskip("pyarrow.parquet", reason="metadata as parquet needs pyarrow")


def write_metadata(folder, parquet, columns, **options):
    """FOLDER/metadata/metadata_0.parquet in the place of the jsonl."""
    import pyarrow

    (folder / "metadata" / "metadata_0.jsonl").unlink(missing_ok=True)
    path = folder / "metadata" / "metadata_0.parquet"
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_is_read_by_row_groups_and_texts_alone(tmp_path, parquet):
    write_embeddings(tmp_path, rows=(7,))
    captions = ["a", "b", None, "a", "x" * (records.MAX_TEXT_BYTES + 1), "x" * records.MAX_TEXT_BYTES, "c"]
    columns = {"caption": captions, "caption_zh": list(range(7)), "url": ["u"] * 7}
    for options in (dict(row_group_size=3), dict(use_dictionary=False), {}):
        write_metadata(tmp_path, parquet, columns, **options)
        source = made.open_source("embeddings", str(tmp_path), "")
        found = [source.read(index, image=False).captions.get("en") for index in range(7)]
        assert found == [None if t is None or t == captions[4] else (t,) for t in captions]
        assert "zh" not in source.read(0, image=False).captions


def test_a_small_parquet_does_not_become_huge(tmp_path, parquet, monkeypatch):
    """A text that many rows share is held once; millions of empty rows and compressed texts are refused."""
    import pyarrow

    write_embeddings(tmp_path, rows=(2000,))
    text = "x" * records.MAX_TEXT_BYTES
    shared = pyarrow.DictionaryArray.from_arrays(np.zeros(2000, np.int32), [text])
    path = write_metadata(tmp_path, parquet, {"caption": shared})
    assert path.stat().st_size < 200_000  # two gigabytes of captions
    source, peak = arrow_peak(lambda: made.open_source("embeddings", str(tmp_path), ""))
    assert source.read(1999, image=False).captions == {"en": (text,)} and peak < 40 << 20

    path = write_metadata(tmp_path, parquet, {"caption": pyarrow.nulls(20_000_000, pyarrow.string())})
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="20000000 rows or more, where there are embeddings for 2000"):
        made.open_source("embeddings", str(tmp_path), "")

    monkeypatch.setattr(metadata, "MAX_COLUMN_BYTES", 16 << 20)
    texts = [str(i) + text[:-9] for i in range(20)] + [""] * 1980
    options = dict(use_dictionary=False, compression="zstd")
    path = write_metadata(tmp_path, parquet, {"caption": texts}, **options)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="more than 16 MiB in a row group: write .* smaller row groups"):
        made.open_source("embeddings", str(tmp_path), "")
    write_metadata(tmp_path, parquet, {"caption": texts}, row_group_size=15, **options)
    assert len(made.open_source("embeddings", str(tmp_path), "")) == 2000


@pytest.mark.parametrize("kind", ["list", "struct", "map", "two of a name", "list beside text", "bomb"])
def test_parquet_captions_that_are_no_column_of_texts_are_refused(tmp_path, parquet, kind):
    import pyarrow

    write_embeddings(tmp_path, rows=(2,))
    texts, lists = pyarrow.array(["a", "b"]), pyarrow.array([["a"], ["b"]])
    maps = pyarrow.array([[("a", "b")]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.string()))
    columns = {
        "list": [lists],
        "struct": [pyarrow.array([{"caption": "a"}] * 2)],
        "map": [maps],
        "two of a name": [texts, texts],
        "list beside text": [texts, lists],
        "bomb": [
            pyarrow.ListArray.from_arrays([0, 0, 8_000_000], pyarrow.nulls(8_000_000, pyarrow.string()))
        ],
    }[kind]
    table = pyarrow.Table.from_arrays([texts, *columns], ["url", *["caption"] * len(columns)])
    path = tmp_path / "metadata" / "metadata_0.parquet"
    parquet.write_table(table, path)
    (tmp_path / "metadata" / "metadata_0.jsonl").unlink()
    assert path.stat().st_size < 2000

    def opened():
        with pytest.raises(ValueError, match="metadata_0.parquet: 'caption' must be one column of texts"):
            made.open_source("embeddings", str(tmp_path), "")

    _, peak = arrow_peak(opened)
    assert peak < 4 << 20


def arrow_peak(function):
    """(what it returns, the most bytes that Python and Arrow held at once meanwhile)."""
    import pyarrow

    pool, before = pyarrow.default_memory_pool(), pyarrow.default_memory_pool().max_memory()
    tracemalloc.start()
    found = function()
    peak = tracemalloc.get_traced_memory()[1] + pool.max_memory() - before
    tracemalloc.stop()
    return found, peak


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"caption": "a"}', '{"caption": "' + "x" * (1 << 20) + '"}'], "line 2 is not an object .* 1 MiB"),
        (['{"caption": "a"}', "[1]"], "line 2 is not an object"),
        (["[" * 100_000], "line 1 is not an object"),
        (['{"caption": "a"}'] * 3, "3 rows or more, where there are embeddings for 2"),
    ],
)
def test_lines_of_metadata_that_are_refused(tmp_path, lines, complaint):
    write_embeddings(tmp_path, rows=(2,))
    (tmp_path / "metadata" / "metadata_0.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=complaint):
        made.open_source("embeddings", str(tmp_path), "")


@pytest.mark.parametrize("text", ["[1]", "{", '{"left_out": {}, "of": "' + "x" * (1 << 20) + '"}'])
def test_a_plan_that_is_no_object_of_a_mebibyte_is_refused(tmp_path, text):
    write_embeddings(tmp_path, rows=(2,))
    (tmp_path / "embed.json").write_text(text)
    with pytest.raises(ValueError, match="embed.json is not an object in JSON of at most 1 MiB"):
        made.open_source("embeddings", str(tmp_path), "")


class Payload:
    """Unpickling this would create the canary file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (self.canary, "w"))


def test_npy_with_pickle_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    write_embeddings(tmp_path / "emb", rows=(1,))
    np.save(
        tmp_path / "emb" / "img_emb" / "img_emb_0.npy",
        np.array([Payload(str(canary))], object),
        allow_pickle=True,
    )
    with pytest.raises(ValueError, match="no plain array of numbers"):
        made.open_source("embeddings", str(tmp_path / "emb"), "")
    assert not canary.exists()
    np.load(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", allow_pickle=True)  # the payload was live
    assert canary.exists()


def test_embedding_shard_mismatch(tmp_path):
    write_embeddings(tmp_path / "a", rows=(5, 3), text_rows=(5, 2))
    with pytest.raises(ValueError, match="differ in rows"):
        made.open_source("embeddings", str(tmp_path / "a"), "")
    write_embeddings(tmp_path / "b", rows=(5, 3))
    made.write_samples(tmp_path / "00000.tar", range(9))
    with pytest.raises(ValueError, match="8 embeddings, the dataset 9 records"):
        made.open_source("tar", str(tmp_path / "00000.tar"), "", embeddings=str(tmp_path / "b"))
    made.write_samples(tmp_path / "00000.tar", range(8))
    source = made.open_source("tar", str(tmp_path / "00000.tar"), "", embeddings=str(tmp_path / "b"))
    assert source.read(6).embeds["image_embed"][0] == 6 and source.read(6).captions == {"en": ("caption 6",)}
    metadata = tmp_path / "b" / "metadata" / "metadata_1.jsonl"
    metadata.write_text(metadata.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="metadata_1.jsonl has 1 rows, where there are embeddings for 3"):
        made.open_source("embeddings", str(tmp_path / "b"), "")


def test_embedding_that_is_not_finite_is_a_bad_record(tmp_path):
    write_embeddings(tmp_path, rows=(4,))
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.array([[0.0], [np.nan], [1.0], [2.0]], np.float32))
    source = made.open_source("embeddings", str(tmp_path), "")
    assert source.read(0, image=False).embeds["image_embed"] == 0
    with pytest.raises(BadRecord, match="embedding_not_finite"):
        source.read(1, image=False)


def test_embeddings_of_older_versions_belong_to_records_with_long_names(tmp_path):
    """Their keys are the first 100 bytes of a name, after its last slash and before its first dot."""
    pyarrow = pytest.importorskip("pyarrow", reason="metadata as parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="metadata as parquet needs pyarrow")
    members = [(f"{'x' * 120}{number}.png", made.flat_png(number)) for number in range(4)]
    made.write_tar(tmp_path / "00000.tar", members, tarfile.GNU_FORMAT)
    source, folder = open_tar(tmp_path / "00000.tar"), tmp_path / "rows"
    assert source.read(3).key == f"00000.tar:{'x' * 120}3"
    write_embeddings(folder, rows=(4,))
    (folder / "metadata" / "metadata_0.jsonl").unlink()
    (folder / "embed.json").write_text(json.dumps({"fingerprint": source.fingerprint, "left_out": {}}))
    for key, fits in ((f"00000.tar:{'x' * 100}", True), (f"00000.tar:{'y' * 100}", False)):
        table = pyarrow.table({"key": [key] * 4, "caption": ["a"] * 4})
        parquet.write_table(table, folder / "metadata" / "metadata_0.parquet")
        if fits:
            assert len(open_tar(tmp_path / "00000.tar", embeddings=str(folder))) == 4
        else:
            with pytest.raises(ValueError, match="row 0 of .* is of record"):
                open_tar(tmp_path / "00000.tar", embeddings=str(folder))


def test_bad_captions(tmp_path):
    cases = [b"\xff\xfe not text", b"", b"   \n", b"ok"]
    members = []
    for number, text in enumerate(cases):
        members += [(f"{number:03d}.png", made.flat_png(number)), (f"{number:03d}.txt", text)]
    members += [("100.png", made.flat_png(1)), ("100.json", b"{not json"), ("101.png", made.flat_png(2))]
    members += [("102.txt", b"no picture")]
    made.write_tar(tmp_path / "00000.tar", members)
    source = open_tar(tmp_path)
    assert len(source) == 6 and source.refused == {"no_image": 1}
    with pytest.raises(BadRecord, match="invalid_utf8"):
        source.read(0)
    assert [source.read(index).captions for index in (1, 2, 3, 5)] == [{}, {}, {"en": ("ok",)}, {}]
    with pytest.raises(BadRecord, match="invalid_json"):
        source.read(4)


def test_fingerprint_follows_content_not_place(tmp_path):
    prints = []
    for folder, numbers in (("a", range(4)), ("b", range(4)), ("c", range(5))):
        (tmp_path / folder).mkdir()
        made.write_samples(tmp_path / folder / "00000.tar", numbers)
        prints.append(open_tar(tmp_path / folder).fingerprint)
    assert prints[0] == prints[1] != prints[2]
    os.rename(tmp_path / "a" / "00000.tar", tmp_path / "a" / "00001.tar")
    assert open_tar(tmp_path / "a").fingerprint != prints[0]


def test_splits_and_misspellings(tmp_path):
    for name in ("train-00000", "train-00001", "val-00000"):
        made.write_samples(tmp_path / f"{name}.tar", range(2))
    assert len(open_tar(tmp_path, "train")) == 4 and len(open_tar(tmp_path, "")) == 6
    assert len(open_tar(tmp_path / "train-*1.tar")) == 2
    with pytest.raises(ValueError, match=r"did you mean 'train'\? There is: train, val"):
        open_tar(tmp_path, "trian")
    with pytest.raises(
        ValueError, match=r"no file matches .* holds: train-\*.tar \(2 files\), val-00000.tar"
    ):
        open_tar(tmp_path / "tra-*.tar")
    with pytest.raises(ValueError, match=f"does not exist; did you mean '{tmp_path.name}'"):
        open_tar(tmp_path.parent / (tmp_path.name + "x"))
    with pytest.raises(ValueError, match=r"holds no \*.tfrecord"):
        made.open_source("tfrecord", str(tmp_path), "")
    with pytest.raises(ValueError, match="did you mean 'tar'"):
        made.open_source("tarr", str(tmp_path), "")
    with pytest.raises(ValueError, match="ftp:// is unknown: there are gs://"):
        open_tar("ftp://bucket/data")


def test_indexes_of_many_files_are_cached_and_follow_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE2_JAX_CACHE", str(tmp_path / "cache"))
    scanned = []

    def index_file(path):
        scanned.append(path)
        return tars.index_tar(path)

    paths = [str(tmp_path / f"{number:05d}.tar") for number in range(20)]
    for number, path in enumerate(paths):
        made.write_tar(path, [*made.sample(number), ("x.npy", b"1"), ("y.txt", b"no picture")])
    os.truncate(paths[5], 1536 * 3 + 512)
    first = records.scan(paths, index_file)
    assert len(scanned) == 20
    again = records.scan(paths, index_file)
    assert len(scanned) == 20
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        assert vars(one).keys() == vars(other).keys()
        assert all(vars(one)[name] == vars(other)[name] for name in vars(one) if name != "rows")
    made.write_samples(paths[3], [3, 4])
    cached = sorted((tmp_path / "cache" / "index").iterdir())
    cached[0].write_bytes(cached[0].read_bytes()[:50])  # as a crash would leave it
    again = records.scan(paths, index_file)
    assert again[5].damage == "truncated_archive" and again[6].passed == {"other_extension": 1}
    assert again[6].examples == {"other_extension": "x.npy", "no_image": "y"}
    rows = [len(index.rows) for index in again]
    assert rows == [2 if number == 3 else 1 for number in range(20)]
    assert len(scanned) in (21, 22) and paths[3] in scanned[20:]


def test_files_are_read_by_many_threads_with_few_descriptors(tmp_path):
    paths = []
    for number in range(12):
        paths.append(str(tmp_path / str(number)))
        with open(paths[-1], "wb") as file:
            file.write(bytes([number]) * 100)
    files = records.Files(paths, limit=2)
    wrong = []

    def read():
        for step in range(300):
            number = step * 7 % 12
            if files.read(number, 10, 50) != bytes([number]) * 50:
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(files._open) <= 2 + len(threads)
    with pytest.raises(BadRecord, match="truncated"):
        files.read(0, 90, 50)


def test_caption_fields_by_name():
    names = [
        "caption",
        "caption_zh",
        "captions/text",
        "txt",
        "text",
        "captions_fr",
        "uncaptioned",
        "text_embedding",
    ]
    assert [shards.language_of(name) for name in names] == ["en", "zh", "en", "en", "en", "fr", None, None]

"""Damaged files: one error that names each, says what is wrong with it, and how to go on without it."""

import gzip
import json
import os
import tarfile

import pytest

from dalle2_jax.data import bad_records, damage, pipeline, records
from tests.data import shards_for_tests as made

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4403200\n"
BEGINNINGS = {
    "git_lfs_pointer": POINTER,
    "empty_file": b"",
    "web_page": b"\n<!DOCTYPE html><html><body>404</body></html>" + b" " * 600,
    "compressed_archive": gzip.compress(b"x" * 99) + bytes(600),
    "not_an_archive": b"\x89PNG" + bytes(600),
    "no_records": bytes(10240),
}


def write_set(folder, damaged):
    """Two whole shards, and these files; returns the folder's path."""
    folder.mkdir(parents=True)
    for number in range(2):
        made.write_samples(folder / f"{number:05d}.tar", range(4 * number, 4 * number + 4))
    for number, data in enumerate(damaged, 2):
        (folder / f"{number:05d}.tar").write_bytes(data)
    return str(folder)


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_file_that_yields_nothing_is_an_error_that_says_why(tmp_path, kind):
    """Whatever the error budget: two of four shards are no eight bad records."""
    folder = write_set(tmp_path / "set", [BEGINNINGS[kind]] * 2)
    with pytest.raises(ValueError) as raised:
        made.open_source("tar", folder, "")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("2 of the 4 files under ")
    for line, name in zip(lines[1:3], ("00002.tar", "00003.tar"), strict=True):
        assert line.startswith(f"  {name} {damage.KINDS[kind]}") and line.endswith("; 0 records can be read")
    assert lines[3].endswith("--config.data.allow_damaged=00002.tar,00003.tar")
    with pytest.raises(ValueError, match=r"1 of the 4 .*\n  00003.tar .*\n.*=00002.tar,00003.tar$"):
        made.open_source("tar", folder, "", allow_damaged="00002.tar")
    for allowed in ("00002.tar,00003.tar", ("00002.tar", "set/00003.tar")):
        source = made.open_source("tar", folder, "", allow_damaged=allowed)
        assert len(source) == 8 and source.passed == {kind: 2} and not source.refused
    assert source.read(7).captions == {"en": ("caption 7",)}


def test_a_tfrecord_that_yields_nothing_is_an_error(tmp_path):
    for kind in ("git_lfs_pointer", "empty_file", "web_page", "compressed_archive", "not_an_archive"):
        (tmp_path / "00000.tfrecord").write_bytes(BEGINNINGS[kind])
        index = records.index_tfrecord(str(tmp_path / "00000.tfrecord"))
        assert index.damage == kind and not len(index.rows)
        with pytest.raises(ValueError, match="00000.tfrecord .*; 0 records can be read"):
            made.open_source("tfrecord", str(tmp_path), "")


def test_allowed_damage_is_reported_and_does_not_count_against_the_budget(tmp_path):
    folder = write_set(tmp_path / "set", [POINTER, POINTER])
    (tmp_path / "set" / "00003_stats.json").write_text('{"successes": 5000}')
    settings = dict(source="tar", path=folder, split="", fields=("image",), image_size=8, max_bad_fraction=0)
    with pytest.raises(ValueError, match="git-lfs pointer"):
        pipeline.make_dataset(**settings)
    data = pipeline.make_dataset(**settings, allow_damaged="00002.tar, 00003.tar")
    assert data.bad_records() == {"git_lfs_pointer": 2, "missing_from_shard": 5000}
    texts = pipeline.iterate_captions(
        source="tar", path=folder, split="", allow_damaged="00002.tar,00003.tar", max_bad_fraction=0
    )
    assert len(list(texts)) == 8


def test_a_shard_that_img2dataset_found_no_picture_for_is_whole(tmp_path):
    folder = write_set(tmp_path / "set", [bytes(10240)])
    (tmp_path / "set" / "00002_stats.json").write_text(json.dumps({"successes": 0}))
    assert made.open_source("tar", folder, "").passed == {}


def test_a_file_without_pictures_says_what_it_holds_instead(tmp_path):
    folder = write_set(tmp_path / "set", [])
    made.write_tar(tmp_path / "set" / "00002.tar", [(f"{number}.gif", b"GIF") for number in range(3)])
    with pytest.raises(ValueError, match="holds no record .other_extension x 3, such as '0.gif'.; 0 records"):
        made.open_source("tar", folder, "")


def test_archives_that_were_joined_are_not_read_in_part(tmp_path):
    folder = write_set(tmp_path / "set", [])
    first, second = (tmp_path / "set" / f"0000{number}.tar" for number in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match="00000.tar goes on behind its end mark.*; 4 records can be read"):
        made.open_source("tar", folder, "")
    with open(second, "ab") as file:
        file.write(b"garbage, as old tars end" * 99)  # no member: nothing is lost
    first.unlink()
    assert len(made.open_source("tar", folder, "")) == 4


def test_a_link_to_nothing_is_damaged(tmp_path):
    """As git-annex leaves what it has not fetched."""
    folder = write_set(tmp_path / "set", [])
    os.symlink(tmp_path / "nowhere", tmp_path / "set" / "00002.tar")
    for path in (folder, folder + "/*.tar"):
        with pytest.raises(ValueError, match=r"00002.tar cannot be read \(No such file or directory\)"):
            made.open_source("tar", path, "")
        assert len(made.open_source("tar", path, "", allow_damaged="00002.tar")) == 8


def test_names_in_the_message_name_one_file_each(tmp_path):
    """Of files of one name in several folders; one with a comma and a space is one word for the shell."""
    for folder in ("a", "b", "a/c"):
        write_set(tmp_path / "set" / folder, [])
    for name in ("a/00000.tar", "a/c/00000.tar", "b/x, y.tar"):
        (tmp_path / "set" / name).write_bytes(b"")
    pattern = str(tmp_path / "set" / "**" / "*.tar")
    with pytest.raises(ValueError, match=r"=\S*'a/00000.tar,a/c/00000.tar,b/x, y.tar'$"):
        made.open_source("tar", pattern, "")
    allowed = "a/00000.tar,a/c/00000.tar,b/x, y.tar"
    source = made.open_source("tar", pattern, "", allow_damaged=allowed)
    assert len(source) == 16
    keys = [source.read(index).key for index in range(16)]
    assert len(set(keys)) == 16 and "b/00000.tar:000000000" in keys
    with pytest.raises(ValueError, match="2 of the 7 files"):
        made.open_source("tar", pattern, "", allow_damaged="a/00000.tar")


def test_many_damaged_files_are_all_in_the_setting(tmp_path):
    folder = write_set(tmp_path / "set", [b""] * 30)
    with pytest.raises(ValueError, match=r"(?s)30 of the 32 files.*and 10 more\n.*,00031.tar$"):
        made.open_source("tar", folder, "", allow_damaged="")


def test_the_budgets_message_has_an_example_of_what_indexing_lost(tmp_path):
    members = [(f"x{number}.txt", b"no picture") for number in range(9)]
    made.write_tar(tmp_path / "00000.tar", [*made.sample(1), *members])
    with pytest.raises(bad_records.TooManyBadRecords, match=r"00000.tar: x0 \(no_image\). Mend"):
        pipeline.make_dataset(source="tar", path=str(tmp_path), split="", fields=("image",), image_size=8)


def test_pictures_to_measure_know_no_damage_that_is_allowed(tmp_path):
    from dalle2_jax.evaluate import picture_sets

    folder = write_set(tmp_path / "set [v2]", [POINTER])
    with pytest.raises(ValueError, match=r"git-lfs pointer[^$]*\nMend them, or move them away$"):
        picture_sets.open_pictures(folder)
    os.remove(folder + "/00002.tar")
    assert picture_sets.open_pictures(folder + "/{00000..00001}.tar").count == 8


def test_gnu_tar_with_large_blocks_is_whole(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in made.sample(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, made.io.BytesIO(data))
    with open(tmp_path / "00000.tar", "ab") as file:
        file.truncate(1 << 20)  # as `tar --blocking-factor=2048` fills it
    assert len(made.open_source("tar", str(tmp_path), "")) == 1

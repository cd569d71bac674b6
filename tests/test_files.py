"""Files are there whole or not at all, whoever else writes them."""

import pytest

from dalle2_jax.runtime import files


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "a.json"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # whose `with` ended last
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path):
        raise KeyboardInterrupt  # before anything was written


TEXT = "a red star\r\nein grüner Kreis\n一个红色的圆"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_people_is_read_whatever_its_mark_says(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert files.read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "a star\nein grüner Kreis".encode("latin-1"),
            "a.txt: line 2 holds the byte 0xfc, which is not UTF-8",
        ),
        (TEXT.encode("utf-16-le"), "a.txt: line 2 holds"),
        (b"PK\3\4\0\0", "a.txt: line 1 holds a zero byte"),
        (b"\xff\xfea", "a.txt: line 1 holds the byte 0x61, which is not UTF-16: save the file as UTF-8"),
    ],
    ids=["latin-1", "no mark", "archive", "cut"],
)
def test_text_in_another_encoding_is_refused_with_file_and_line(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_text(tmp_path / "a.txt")

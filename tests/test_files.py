"""Files are there whole or not at all, whoever else writes them."""

import pytest

from dalle2_jax import files


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "a.json"
    with files.whole(path) as first, files.whole(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # whose `with` ended last
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), files.whole(path):
        raise KeyboardInterrupt  # before anything was written

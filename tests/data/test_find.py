"""What a path names: folders, splits, patterns with braces and **, names that look like patterns."""

import os

import pytest
from absl import logging

from dalle2_jax.data.find import find_files


def touch(root, *names):
    """Empty files below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def found(root, path, split="", suffix=".tar"):
    return [os.path.relpath(file, root) for file in find_files(os.path.join(root, path), split, suffix)]


def test_braces_count_and_list(tmp_path):
    touch(tmp_path, *(f"{number:05d}.tar" for number in range(13)), "a-1.tar", "b-1.tar", "b-2.tar")
    assert found(tmp_path, "{00000..00012}.tar") == [f"{number:05d}.tar" for number in range(13)]
    assert found(tmp_path, "{00000..00012..5}.tar") == ["00000.tar", "00005.tar", "00010.tar"]
    assert found(tmp_path, "{00002..00000}.tar") == ["00000.tar", "00001.tar", "00002.tar"]
    assert found(tmp_path, "{a-1,b-{1..2}}.tar") == ["a-1.tar", "b-1.tar", "b-2.tar"]
    assert found(tmp_path, "{a..b}-*.tar") == ["a-1.tar", "b-1.tar", "b-2.tar"]
    assert found(tmp_path.parent, tmp_path.name + "/{0000{0..1},a-1}.tar") == [
        f"{tmp_path.name}/{name}.tar" for name in ("00000", "00001", "a-1")
    ]
    with pytest.raises(ValueError, match=r"2 of the 4 names that .* are not there: 00013.tar, 00014.tar$"):
        found(tmp_path, "{00011..00014}.tar")
    with pytest.raises(ValueError, match=r"1 of the 2 names .*: c-\*.tar$"):
        found(tmp_path, "{a,c}-*.tar")
    with pytest.raises(ValueError, match="more than 1000000 files"):
        found(tmp_path, "{0..9999999999999}.tar")


def test_braces_name_folders_and_their_splits(tmp_path):
    touch(tmp_path, "a/train-0.tar", "a/val-0.tar", "b/train/0.tar", "b/val/0.tar")
    assert found(tmp_path, "{a,b}", "train") == ["a/train-0.tar", "b/train/0.tar"]


def test_two_stars_read_every_level(tmp_path):
    touch(tmp_path, "top.tar", "a/00000.tar", "a/b/00000.tar", "a/b/c/d.tar", ".git/x.tar", "a/x.txt")
    every = ["a/00000.tar", "a/b/00000.tar", "a/b/c/d.tar", "top.tar"]
    assert found(tmp_path, "**/*.tar") == every
    assert found(tmp_path, "**/0*.tar") == ["a/00000.tar", "a/b/00000.tar"]
    assert found(tmp_path, "a/**/b/**/*.tar") == ["a/b/00000.tar", "a/b/c/d.tar"]
    assert found(tmp_path, "**") == sorted([*every, "a/x.txt"])
    assert found(tmp_path, "*/*.tar") == ["a/00000.tar"]
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    assert found(tmp_path, "**/*.tar") == every


@pytest.mark.parametrize("name", ["set [v2]", "what?", "a*", "{1..3}", "[]", "{a,b}"])
def test_a_name_that_exists_is_taken_as_it_is_written(tmp_path, name):
    touch(
        tmp_path,
        f"{name}/00000.tar",
        f"{name}/00001.tar",
        f"deep/x/{name}/[1].tar",
        "set v/no.tar",
        "ab/n.tar",
    )
    both = [f"{name}/00000.tar", f"{name}/00001.tar"]
    assert found(tmp_path, name) == found(tmp_path, name + "/*.tar") == both
    assert found(tmp_path, name + "/{00000..00001}.tar") == found(tmp_path, name + "/**/*.tar") == both
    if "{" not in name:  # braces are written out before folders are looked for
        assert found(tmp_path, f"deep/*/{name}/*.tar") == [f"deep/x/{name}/[1].tar"]
    assert found(tmp_path, f"deep/x/{name}/[1].tar") == [f"deep/x/{name}/[1].tar"]
    assert found(tmp_path, f"{name}/0000[1].tar") == both[1:]


def test_relative_paths(tmp_path, monkeypatch):
    touch(tmp_path, "in/0.tar", "in/a/1.tar", "2.tar")
    monkeypatch.chdir(tmp_path)
    assert find_files("*.tar", "", ".tar") == ["2.tar"]
    assert find_files("in/{0..0}.tar", "", ".tar") == ["in/0.tar"]
    assert find_files("**/*.tar", "", ".tar") == ["2.tar", "in/0.tar", "in/a/1.tar"]
    assert find_files("i*/**/*.tar", "", ".tar") == ["in/0.tar", "in/a/1.tar"]


@pytest.mark.parametrize(
    ("path", "split", "complaint"),
    [
        ("part-*.tra", "", r"no file matches .*; .* holds: folder/, part-\*.tar \(3 files\)$"),
        ("part-00000.tra", "", r"does not exist; .* holds: folder/, part-\*.tar \(3 files\)$"),
        ("folde", "", r"does not exist; did you mean 'folder'\? .* holds: folder/"),
        (
            "folder",
            "",
            r"folder itself holds no \*.tar; 2 lie in folders below it: .*/\*\*/\*.tar names",
        ),
        ("numbers", "train", r"neither train-\*.tar nor train/\*.tar; an empty split .* takes all 2 files$"),
        ("fold*", "", r"no file matches .*; it matches 1 folders: add /\*.tar"),
        ("parts", "train", r"did you mean 'train[AB]' or 'train[AB]'\? There is: trainA, trainB$"),
    ],
)
def test_no_suggestion_names_a_part_as_if_it_were_the_whole(tmp_path, path, split, complaint):
    touch(tmp_path / "set", "part-00000.tar", "part-00001.tar", "part-00002.tar")
    touch(tmp_path / "set", "folder/a/0.tar", "folder/b/c/1.tar")
    if path in ("numbers", "parts"):
        names = {"numbers": ("00000.tar", "00001.tar"), "parts": ("trainA.0.tar", "trainB.0.tar")}[path]
        touch(tmp_path / "set" / path, *names)
    with pytest.raises(ValueError, match=complaint) as raised:
        found(tmp_path / "set", path, split)
    assert "00000" not in str(raised.value).removeprefix(f"{tmp_path / 'set' / path} does not exist")


def test_what_is_not_read_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: told.append(message % values))
    touch(tmp_path, "top.tar", "a/0.tar", "a/b/0.tar", "train-0.tar", "train/0.tar", "a.target.json")
    assert find_files(str(tmp_path), "", ".tar") == [f"{tmp_path}/top.tar", f"{tmp_path}/train-0.tar"]
    assert len(told) == 1 and "3 *.tar in folders below it are not read" in told[0]
    assert f"{tmp_path}/**/*.tar reads every level" in told[0]
    told.clear()
    assert found(tmp_path, "", "train") == ["train/0.tar"]
    assert len(told) == 1 and "1 files *.tar of that split beside it are not" in told[0]
    told.clear()
    touch(tmp_path / "more", "0.tar", "1.tar.gz", "._0.tar", "2.tar.part", "3.tgz", "0_stats.json")
    assert found(tmp_path, "more") == ["more/0.tar"]
    assert len(told) == 1 and "4 files that do not end with .tar, or are hidden, are not read" in told[0]

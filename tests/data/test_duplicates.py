"""Near-duplicates of embedded pictures: every pair, the later record of each, and training without these."""

import numpy as np
import pytest
from etils import epath

pytest.importorskip("pyarrow", reason="metadata of embeddings need pyarrow")

from dalle2_jax.data import duplicates, embeddings  # noqa: E402
from tests.data import shards_for_tests as made  # noqa: E402

PLAN = dict(records=6, rows_per_shard=4, data=dict(language="en"))
KEYS = [f"train-00000.tar:{number}" for number in range(6)]


def unit(degrees):
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


@pytest.fixture
def folder(tmp_path):
    """Six rows: the angles 0, 90, 8, -, 16.5 and 91 degrees, of any norm; row 3 could not be read."""
    embeddings.keep_plan(epath.Path(tmp_path), PLAN)
    rows = np.array([unit(a) for a in (0, 90, 8, 0, 16.5, 91)], np.float32) * np.array([[1, 2, 3, 1, 1, 5]]).T
    rows[3] = np.nan
    parts = embeddings.Parts(epath.Path(tmp_path), PLAN)
    for part, chosen in enumerate((slice(0, 4), slice(4, 6))):
        arrays = {"img_emb": rows[chosen], "text_emb": rows[chosen]}
        captions = [f"a\tcaption {key[-1]}" for key in KEYS[chosen]]
        parts.write(part, arrays, KEYS[chosen], captions, [""] * len(captions))
    embeddings.finish(epath.Path(tmp_path))
    return tmp_path


def test_pairs_are_all_pairs():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(2100, 3)).astype(np.float32)  # three blocks
    found = duplicates.pairs(rows, 0.9999)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.argwhere(np.triu(units @ units.T >= 0.9999, 1))
    assert {pair[1:] for pair in found} == set(map(tuple, expected.tolist())) and len(found) > 50
    assert [pair[0] for pair in found] == sorted((pair[0] for pair in found), reverse=True)


def test_the_later_record_of_a_pair_is_left_out(folder):
    """A chain 0, 2, 4 of which 0 and 4 are no pair: 2 is left out for 0, and 4 stays."""
    assert duplicates.write(folder, np.cos(np.radians(10))) == (3, 2)
    head, *lines = (folder / "duplicates.tsv").read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    assert head.split("\t")[:3] == ["cosine", "key", "later_key"]
    assert [cell[1:3] for cell in cells] == [[KEYS[1], KEYS[5]], [KEYS[0], KEYS[2]], [KEYS[2], KEYS[4]]]
    assert cells[0][0] == f"{np.cos(np.radians(1)):.4f}" and cells[0][3] == "a caption 1"
    assert (folder / "leave_out.txt").read_text().split() == [KEYS[2], KEYS[5]]
    source = made.open_source("embeddings", str(folder), "", leave_out=str(folder / "leave_out.txt"))
    assert source.left_out == {2, 5}  # the keys of the records, though rows are called row:N
    assert duplicates.write(folder, 1.0) == (0, 0) and not (folder / "leave_out.txt").read_text()


def test_a_folder_without_keys_is_refused(folder):
    (folder / "metadata/metadata_00000.parquet").unlink()
    (folder / "metadata/metadata_00001.parquet").unlink()
    with pytest.raises(ValueError, match="no image embeddings with the keys of their records"):
        duplicates.write(folder, 0.9)

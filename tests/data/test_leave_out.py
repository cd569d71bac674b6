"""Records that data.leave_out names: never read, and all others keep their places."""

import types

import numpy as np
import pytest

from dalle2_jax.data import pipeline
from dalle2_jax.train import inputs
from tests.data import shards_for_tests as made

COUNT, LEFT = 23, (3, 7, 8, 22)
NEXT = {3: 4, 7: 9, 8: 9, 22: 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    made.write_samples(folder / "train-00000.tar", range(11))
    made.write_samples(folder / "train-00001.tar", range(11, COUNT))
    return folder


@pytest.fixture
def listed(shards, tmp_path):
    """A file with the keys of LEFT, with line ends of two kinds and an empty line."""
    every = list(made.open_source("tar", str(shards), "").keys())
    keys = [every[number] for number in LEFT]
    assert keys[0] == "train-00000.tar:000000003" and len(keys) == 4
    path = tmp_path / "leave_out.txt"
    path.write_bytes("\r\n".join(keys[:2]).encode() + b"\n\n" + "\n".join(keys[2:]).encode())
    return str(path)


def dataset(path, **settings):
    settings = dict(source="tar", path=str(path), split="", image_size=8) | settings
    return pipeline.make_dataset(fields=("image",), **settings)


def take(data, start=0, steps=14):
    batches = data.batches(5, start_step=start)
    found = [next(batches) for _ in range(steps - start)]
    batches.close()
    return np.concatenate([batch["index"] for batch in found]), np.concatenate([b["image"] for b in found])


def test_other_records_keep_their_places(shards, listed):
    """In each of three epochs; the next record stands where one is left out, as for a bad one."""
    plain, _ = take(dataset(shards))
    data = dataset(shards, leave_out=listed, max_bad_fraction=0.0)
    found, images = take(data)
    np.testing.assert_array_equal(found, [NEXT.get(number, number) for number in plain.tolist()])
    assert set(found.tolist()) == set(range(COUNT)) - set(LEFT)
    assert [tuple(image[0, 0]) for image in images] == [made.colour_of(number) for number in found.tolist()]
    assert data.bad_records() == {"left_out": len(LEFT)} and data.num_records == COUNT
    resumed, _ = take(dataset(shards, leave_out=listed), start=4)
    np.testing.assert_array_equal(resumed, found[20:])
    captions = list(pipeline.iterate_captions(source="tar", path=str(shards), split="", leave_out=listed))
    assert len(captions) == COUNT - len(LEFT) and "caption 7" not in captions


def test_another_file_is_another_dataset(shards, listed, tmp_path):
    """So that a run is not resumed with other records."""
    some = tmp_path / "some.txt"
    some.write_text("train-00000.tar:000000003\n")
    names = ("", listed, str(some))
    assert len({dataset(shards, leave_out=name).fingerprint for name in names}) == 3
    again = dataset(shards, leave_out=listed).fingerprint
    assert again == dataset(shards, leave_out=listed).fingerprint


def test_what_cannot_be_left_out_is_refused(shards, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("train-00000.tar:000000003\ntrain-00000.tar:3\n")
    with pytest.raises(ValueError, match=r"1 of 2 lines of .*keys.txt are keys of no record.*:3'"):
        dataset(shards, leave_out=str(path))
    path.write_text("\n".join(made.open_source("tar", str(shards), "").keys()))
    with pytest.raises(ValueError, match="leaves out all 23 records"):
        dataset(shards, leave_out=str(path))
    with pytest.raises(ValueError, match="give the file of each source, as leave_out in data.sources"):
        dataset("", leave_out=str(path), sources=[str(shards)])


def test_each_source_of_a_mixture_has_its_own_file(shards, listed, tmp_path):
    made.write_samples(tmp_path / "b.tar", range(100, 104))
    sources = [str(tmp_path / "b.tar"), {"path": str(shards), "leave_out": listed}]
    data = dataset("", sources=sources)
    assert data.source.left_out == {4 + number for number in LEFT}
    found, _ = take(data)
    assert not {4 + number for number in LEFT} & set(found.tolist())
    assert data.bad_records() == {f"{shards.name}/left_out": len(LEFT)}


def test_validation_reads_all_its_records(shards, listed, tmp_path):
    """The file names records of the training part alone."""
    made.write_samples(tmp_path / "b.tar", range(3))
    plan = types.SimpleNamespace(
        stage=types.SimpleNamespace(image_size=8, batch_spec=lambda size: {}), frozen_stages={}
    )
    data = dict(source="tar", path=str(shards), split="train", eval_split="train")
    for more in (dict(leave_out=listed), dict(sources=[dict(path=str(shards), leave_out=listed)])):
        config = dict(stage="decoder", seed=0, data=data | more)
        train, held_out = inputs.make_datasets(config, plan, {"image"}, None)
        assert len(train.source.left_out) == len(LEFT) and not held_out.source.left_out

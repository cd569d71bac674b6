"""Several sources with weights: shares, epochs of each, resuming, hosts, counts by source."""

import json
import re
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import clip
from dalle2_jax.data import order, pipeline
from dalle2_jax.data.bad_records import TooManyBadRecords
from dalle2_jax.models import models
from dalle2_jax.train import checks
from tests.data import shards_for_tests as made


def dataset(sources, fields=("tokens",), split="", **settings):
    settings = dict(source="tar", path="", image_size=8, tokenizer=made.WordTokenizer()) | settings
    return pipeline.make_dataset(sources=sources, split=split, fields=fields, **settings)


@pytest.fixture
def two(tmp_path):
    """Captions 0 ... 6, and 100 ... 119 as pictures of a folder."""
    made.write_samples(tmp_path / "a.tar", range(7))
    (tmp_path / "b").mkdir()
    for number in range(100, 120):
        (tmp_path / f"b/{number}.png").write_bytes(made.flat_png(number))
        (tmp_path / f"b/{number}.txt").write_text(f"caption {number}")
    return [str(tmp_path / "a.tar"), dict(source="folder", path=str(tmp_path / "b"))]


def numbers(data, steps, batch_size=6, **options):
    batches = data.batches(batch_size, **options)
    return [next(batches)["tokens"][:, 0].tolist() for _ in range(steps)]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 5), (1e-3, 1), (0.3, 0.3, 0.4)])
def test_each_source_has_its_share_of_any_stretch(weights):
    position = np.arange(20_000)
    source, within = order.assign(position, [(10, weight) for weight in weights])
    for number, weight in enumerate(weights):
        mine = source == number
        assert within[mine].tolist() == list(range(mine.sum()))
        expected = (position + 1) * weight / sum(weights)
        assert np.abs(np.cumsum(mine) - expected).max() < 2
    later = np.array([2**40, 2**40 + 1])
    assert order.assign(later, [(10, weight) for weight in weights])[1].max() < 2**40 + 1


def test_the_order_of_a_mixture(two):
    data = dataset(two)
    whole = numbers(data, 20)
    assert all(sum(number < 100 for number in batch) == 3 for batch in whole)
    flat = [number for batch in whole for number in batch]
    small, large = ([n for n in flat if (n < 100) == first] for first in (True, False))
    for begin in range(0, 56, 7):  # epochs of its own
        assert sorted(small[begin : begin + 7]) == list(range(7))
    assert sorted(large[:20]) == list(range(100, 120)) and large[:20] != large[20:40]
    assert small[:7] != small[7:14]
    assert numbers(dataset(two), 5, start_step=15) == whole[15:]
    halves = [numbers(data, 4, parts=(part,), num_parts=2) for part in (0, 1)]
    assert [one + other for one, other in zip(*halves, strict=True)] == whole[:4]
    weighted = numbers(dataset([dict(path=two[0], weight=2), two[1] | dict(weight=1)]), 6)
    assert all(sum(number < 100 for number in batch) == 4 for batch in weighted)
    together = dataset(two, group=2, seed=3)
    for batch in numbers(together, 8, batch_size=4):
        assert batch[0] + 1 == batch[1] or batch[2] + 1 == batch[3]


def test_the_flags_of_the_clip_recipe_read_two_datasets_alike(tmp_path, monkeypatch):
    """Those of the docstring of configs/clip.py."""
    for name, first in (("SHARDS_A", 0), ("SHARDS_B", 100)):
        (tmp_path / name).mkdir()
        made.write_samples(tmp_path / name / "0.tar", range(first, first + 8))
    (flag,) = re.findall(r'(--config\.data\.sources)="(.*)"', clip.__doc__)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", lock_config=False, accept_new_attributes=True, flag_values=values
    )
    monkeypatch.setattr(sys, "argv", ["train", f"--config={clip.__file__}:debug", "=".join(flag)])
    values(sys.argv)
    config = json.loads(json.dumps(models.to_plain(values["config"].value)))
    checks.check_names(config)
    monkeypatch.chdir(tmp_path)
    batches = numbers(dataset(config["data"]["sources"]), 4)
    assert all(sum(number < 100 for number in batch) == 3 for batch in batches)


def test_one_pass_and_one_source(two):
    every = [
        n for batch in dataset(two).batches(6, repeat=False, shuffle=False) for n in batch["tokens"][:, 0]
    ]
    assert every == [*range(7), *range(100, 120)]
    assert numbers(dataset(two[:1]), 5) == numbers(dataset((), path=two[0]), 5)


def test_losses_are_counted_by_source(two, tmp_path):
    members = [m for n in range(7) for m in made.sample(n, image=b"<html>" if n == 3 else None)]
    made.write_tar(tmp_path / "a.tar", [*members, ("x.md", b"")])
    (tmp_path / "b/110.txt").unlink()
    (tmp_path / "b/111.txt").write_text("caption \ufffd 111")
    data = dataset(two, ("image", "tokens"))
    seen = [number for batch in numbers(data, 20) for number in batch]
    assert set(seen) == {0, 1, 2, 4, 5, 6, *range(100, 120)} - {110}
    counts = data.bad_records()
    assert counts.pop("b/unreadable_character") >= 1
    assert counts == {"a.tar/undecodable": 1, "a.tar/other_extension": 1, "b/no_caption": 1}
    assert sum(number < 100 for number in seen) == 60  # a lost record is replaced by one of its source
    assert data.key(3).startswith("a.tar/a.tar:0") and data.key(7) == "b/100.png"
    with pytest.raises(TooManyBadRecords, match="b/no_caption|a.tar/undecodable"):
        numbers(dataset(two, ("image", "tokens"), max_bad_fraction=0), 20)


def test_sources_that_are_refused(two, tmp_path):
    def refused(message, sources, **settings):
        with pytest.raises(ValueError, match=message):
            dataset(sources, **settings)

    refused("no setting 'wieght'; did you mean 'weight'", [dict(path=two[0], wieght=1)])
    refused("no setting 'split'", [dict(path=two[0], split="train")])
    refused("needs a path and a weight above 0", [dict(path=two[0], weight=0)])
    refused("needs a path and a weight above 0", [dict(weight=1)])
    refused("give the folder of each source", two, embeddings="x")
    refused("data.source 'tra' is unknown", [dict(path=two[0], source="tra")])
    made.write_tar(tmp_path / "c.tar", [("0.png", made.flat_png(0)), ("1.png", made.flat_png(1))])
    refused("no captions in c.tar", [*two, str(tmp_path / "c.tar")])
    made.write_class_folder(tmp_path / "pets", {"cat": [0], "dog": [1]})
    pets = dict(source="folder", path=str(tmp_path / "pets"))
    refused("must have the same classes, or none", [two[0], pets], fields=("label",))


def test_names_of_sources_in_one_folder_name(two, tmp_path):
    (tmp_path / "x").mkdir()
    made.write_samples(tmp_path / "x/a.tar", range(3))
    data = dataset([two[0], str(tmp_path / "x/a.tar"), two[1]])
    assert list(data.source.sources) == ["a.tar#0", "a.tar#1", "b"] and data.num_records == 30
    assert data.fingerprint != dataset([str(tmp_path / "x/a.tar"), two[0], two[1]]).fingerprint

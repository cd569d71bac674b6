"""Batches are a pure function of (seed, step), full whatever the records, and fail aloud rather than hang."""

import collections
import hashlib
import os
import threading
import time

import numpy as np
import pytest

from dalle2_jax.data import captions, pipeline
from dalle2_jax.data.bad_records import BadRecords, TooManyBadRecords
from dalle2_jax.data.records import BadRecord
from tests.data import shards_for_tests as made

FIELDS = ("image", "tokens", "token_mask")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 samples in uneven shards; picture, caption and key of each tell its number."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate([range(0, 11), range(11, 12), range(12, 23)]):
        made.write_samples(folder / f"{shard:05d}.tar", numbers)
    return folder


def dataset(path, fields=FIELDS, **settings):
    """A dataset of 8 x 8 pictures over the shards in `path`, unless settings say otherwise."""
    settings = (
        dict(source="tar", path=str(path), split="", image_size=8, tokenizer=made.WordTokenizer()) | settings
    )
    return pipeline.make_dataset(fields=fields, **settings)


def take(batches, count):
    """The first `count` batches, after which the stream is closed."""
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def ids(batches):
    """The record numbers of batches, one list a batch."""
    return [batch["index"].tolist() for batch in batches]


def assert_same(one, other):
    """Two lists of batches are equal to the bit."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype
            np.testing.assert_array_equal(left[name], right[name])


def test_rows_belong_together_and_have_the_contract_types(shards):
    (batch,) = take(dataset(shards).batches(6), 1)
    assert set(batch) == {*FIELDS, "index"}
    assert batch["image"].shape == (6, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["tokens"].shape == (6, 4) and batch["tokens"].dtype == np.int32
    assert batch["token_mask"].dtype == bool and batch["index"].dtype == np.int64
    for row, number in enumerate(batch["index"].tolist()):
        assert batch["tokens"][row, 0] == number
        expected = np.broadcast_to(np.uint8(made.colour_of(number)), (8, 8, 3))
        np.testing.assert_array_equal(batch["image"][row], expected)


@pytest.mark.parametrize("process_count", [1, 2, 3, 4, 8])
def test_host_order_disjoint_and_complete(shards, process_count):
    """Hosts side by side see the batches of one host; one epoch holds every record once."""
    data = dataset(shards, ("tokens",))
    steps = 23  # 24 * 23 positions: 24 whole epochs
    whole = np.concatenate(ids(take(data.batches(24), steps)))
    hosts = [take(data.batches(24, parts=(i,), num_parts=process_count), steps) for i in range(process_count)]
    joined = np.concatenate([np.concatenate([h[step]["index"] for h in hosts]) for step in range(steps)])
    np.testing.assert_array_equal(joined, whole)
    epochs = whole.reshape(24, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 24  # each epoch in another order


def test_parts_of_a_batch_need_not_follow_each_other(shards):
    """As hosts have them whose devices lie scattered in the mesh; the last batch of a pass has 23 - 12."""
    data, hosts = dataset(shards, ("tokens",)), [(0, 3), (1, 4), (2, 5)]
    for repeat, steps in ((True, 5), (False, 2)):
        whole = take(data.batches(12, repeat=repeat), steps)
        read = [list(take(data.batches(12, parts=p, num_parts=6, repeat=repeat), steps)) for p in hosts]
        for step, batch in enumerate(whole):
            for parts, of_host in zip(hosts, read, strict=True):
                mine = np.isin(np.arange(len(batch["index"])) // 2, parts)
                np.testing.assert_array_equal(of_host[step]["index"], batch["index"][mine])


@pytest.mark.parametrize("process_count", [1, 2])
def test_any_step_can_be_the_first(shards, process_count):
    """Also within the batch that crosses the border between epochs (step 4 of 5 records each of 23)."""
    data = dataset(shards)
    batch_size = 10 if process_count == 2 else 5
    part = dict(parts=(process_count - 1,), num_parts=process_count)
    whole = take(data.batches(batch_size, **part), 12)
    for start in (1, 4, 5, 11):
        assert_same(take(data.batches(batch_size, start_step=start, **part), 12 - start), whole[start:])


def test_two_runs_are_bit_equal_and_seeds_differ(shards):
    settings = dict(fields=(*FIELDS, "low_res", "crop_yx"), low_res_size=4, crop_size=5, low_res_blur=0.5)
    runs = [take(dataset(shards, num_workers=workers, **settings).batches(7), 20) for workers in (1, 3)]
    assert_same(*runs)
    other = take(dataset(shards, seed=1, **settings).batches(7), 20)
    assert ids(other) != ids(runs[0])
    corners = [{tuple(c) for batch in run for c in batch["crop_yx"].tolist()} for run in (runs[0], other)]
    assert len(corners[0]) > 8
    large = dataset(shards, ("tokens",), seed=2**40 + 1)  # all bits of the seed count
    assert ids(take(large.batches(23), 1)) != ids(take(dataset(shards, ("tokens",), seed=1).batches(23), 1))


def test_one_pass_holds_every_record_once(shards):
    data = dataset(shards, ("tokens",))
    one_pass = list(data.batches(5, repeat=False))
    assert [len(batch["index"]) for batch in one_pass] == [5, 5, 5, 5, 3]
    assert sorted(np.concatenate(ids(one_pass))) == list(range(23))
    assert ids(one_pass)[:4] == ids(take(data.batches(5), 4))
    hosts = [list(data.batches(10, parts=(i,), num_parts=2, repeat=False)) for i in range(2)]
    assert [[len(b["index"]) for b in host] for host in hosts] == [[5, 5, 3], [5, 5]]
    assert sorted(np.concatenate([np.concatenate(ids(host)) for host in hosts])) == list(range(23))
    in_order = np.concatenate(ids(data.batches(5, repeat=False, shuffle=False)))
    np.testing.assert_array_equal(in_order, np.arange(23))
    assert ids(data.batches(5, start_step=3, repeat=False)) == ids(one_pass)[3:]
    assert list(data.batches(5, start_step=9, repeat=False)) == []


def test_a_group_stays_together_and_groups_are_shuffled(shards):
    data = dataset(shards, ("tokens",), group=3)  # of 23 records, 21 are in whole groups
    epochs = np.concatenate(ids(take(data.batches(21), 3))).reshape(3, 7, 3)
    for groups in epochs:
        np.testing.assert_array_equal(groups, groups[:, :1] + np.arange(3))
        assert sorted(groups[:, 0]) == list(range(0, 21, 3))
    assert len({tuple(groups[:, 0]) for groups in epochs}) == 3
    hosts = [take(data.batches(14, parts=(i,), num_parts=2), 3) for i in range(2)]
    whole = take(data.batches(14), 3)
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([h[step]["index"] for h in hosts]), batch["index"])
    with pytest.raises(ValueError, match="data.group=0"):
        dataset(shards, ("tokens",), group=0)


def test_tiny_datasets_and_large_batches(tmp_path):
    for count in (1, 2, 3):
        made.write_samples(tmp_path / "00000.tar", range(count))
        batches = take(dataset(tmp_path, ("tokens",)).batches(7), 4)
        seen = np.concatenate(ids(batches))[: count * (28 // count)].reshape(-1, count)
        assert all(sorted(epoch) == list(range(count)) for epoch in seen.tolist())


def bad_images():
    """{number of the sample: its damaged picture}, one of every kind."""
    jpeg = made.encode(made.noise_picture((32, 32)), "JPEG")
    return {
        2: jpeg[: len(jpeg) // 2],
        5: b"<html>404</html>",
        6: b"",
        11: bytes(16) + jpeg[16:],
        22: made.encode(made.noise_picture((43, 2))),
    }


def write_with_bad(path, bad, count=23):
    """Samples of which those in `bad` have other pictures."""
    members = [m for number in range(count) for m in made.sample(number, image=bad.get(number))]
    made.write_tar(path / "00000.tar", members)


def test_corrupt_pictures_are_replaced_by_the_next_and_counted(tmp_path):
    bad = bad_images()
    write_with_bad(tmp_path, bad)
    substitute = {2: 3, 5: 7, 6: 7, 11: 12, 22: 0}
    plain = take(dataset(tmp_path, ("tokens",)).batches(10), 7)  # no picture is asked for: none is bad
    expected = [[substitute.get(number, number) for number in batch] for batch in ids(plain)]
    assert any(number in substitute for number in np.concatenate(ids(plain)))
    runs = [dataset(tmp_path, num_workers=workers) for workers in (1, 3)]
    for data in runs:
        batches = take(data.batches(10), 7)
        assert ids(batches) == expected
        for batch in batches:
            np.testing.assert_array_equal(batch["tokens"][:, 0], batch["index"])
        assert data.bad_records() == {"undecodable": 3, "empty": 1, "too_long": 1}
        kept = {item["index"]: item for item in data._bad.kept}
        assert kept.keys() == bad.keys() and kept[5]["key"] == "00000.tar:000000005"
    late = take(dataset(tmp_path).batches(10, start_step=5), 2)
    assert_same(late, take(dataset(tmp_path).batches(10), 7)[5:])


def test_garbage_that_decodes_is_caught_by_its_sha256(tmp_path):
    good = made.encode(made.noise_picture((64, 64)), "JPEG")
    garbage = bytearray(good)
    garbage[len(good) // 2 : len(good) // 2 + 8] = bytes(8)
    digest = hashlib.sha256(good).hexdigest()
    made.write_tar(
        tmp_path / "00000.tar",
        [
            m
            for n, image in enumerate((good, bytes(garbage)))
            for m in made.sample(n, image=image, sha256=digest)
        ],
    )
    (unverified,) = dataset(tmp_path).batches(2, repeat=False, shuffle=False)
    assert unverified["index"].tolist() == [0, 1]  # the decoder did not notice
    assert not np.array_equal(unverified["image"][0], unverified["image"][1])
    verified = dataset(tmp_path, verify_sha256=True)
    (batch,) = verified.batches(2, repeat=False, shuffle=False)
    assert batch["index"].tolist() == [0, 0] and verified.bad_records() == {"sha256_differs": 1}


def test_bad_budget_exceeded(tmp_path):
    bad = dict.fromkeys(range(0, 120, 5), b"broken")  # 24 of 120
    write_with_bad(tmp_path, bad, count=120)
    with pytest.raises(TooManyBadRecords, match=r"max_bad_fraction=0.1: \{'undecodable'.*00000.tar:.*Mend"):
        take(dataset(tmp_path, max_bad_fraction=0.1).batches(20), 30)
    data = dataset(tmp_path, max_bad_fraction=0.25)
    take(data.batches(20), 30)
    assert data.bad_records() == {"undecodable": 24}
    with pytest.raises(TooManyBadRecords, match="1 of "):
        take(dataset(tmp_path, max_bad_fraction=0).batches(20), 30)
    few = {number: image for number, image in bad.items() if number < 40}  # 8: within the slack at any size
    write_with_bad(tmp_path, few, count=60)
    data = dataset(tmp_path, max_bad_fraction=1e-3)
    take(data.batches(20), 30)
    assert data.bad_records() == {"undecodable": 8}
    write_with_bad(tmp_path, dict.fromkeys(range(5), b"broken"), count=5)
    with pytest.raises(TooManyBadRecords, match="none of the 5 records"):
        next(dataset(tmp_path).batches(2))


def test_the_first_stop_is_what_every_thread_is_told():
    budget = BadRecords(20, 0, {})
    told = []
    for index in (3, 7, 3):  # as threads that read on while the first of them stops
        budget.count_read()
        with pytest.raises(TooManyBadRecords, match="1 of 1 records read") as stop:
            budget.add(index, f"key{index}", BadRecord("undecodable"))
        told.append(str(stop.value))
    assert len(set(told)) == 1 and budget.counts() == {"undecodable": 1} and len(budget.kept) == 1


def test_losses_of_indexing_count_against_the_budget(tmp_path):
    extra = [(f"x{number}.txt", b"no picture") for number in range(9)]
    made.write_tar(tmp_path / "00000.tar", [*made.sample(1), *extra])
    with pytest.raises(TooManyBadRecords, match="9 of 10 records of the dataset's files"):
        dataset(tmp_path)
    assert dataset(tmp_path, max_bad_fraction=0.95).bad_records() == {"no_image": 9}


def test_captions_missing_empty_long_and_not_utf8(tmp_path):
    members = []
    for number, text in enumerate([b"caption 0", b"", b"\xff\xfe 2", b"x" * 100_000 + b" 3", b"caption 4"]):
        members += [(f"{number:03d}.png", made.flat_png(number)), (f"{number:03d}.txt", text)]
    members += [("005.png", made.flat_png(5))]
    made.write_tar(tmp_path / "00000.tar", members)
    seen = []

    class Recording(made.WordTokenizer):
        def __call__(self, captions):
            seen.extend(captions)
            return np.zeros((len(captions), 4), np.int32), np.zeros((len(captions), 4), bool)

    data = dataset(tmp_path, tokenizer=Recording())
    (batch,) = data.batches(6, repeat=False, shuffle=False)
    assert batch["index"].tolist() == [0, 3, 3, 3, 4, 0]
    assert data.bad_records() == {"no_caption": 2, "invalid_utf8": 1, "caption_cut": 3}
    assert max(len(text.encode()) for text in seen) == captions.MAX_CAPTION_BYTES
    pictures = dataset(tmp_path, ("image",))  # captions do not matter to who does not read them
    (batch,) = pictures.batches(6, repeat=False, shuffle=False)
    assert batch["index"].tolist() == list(range(6)) and not pictures.bad_records()


def test_languages_and_the_choice_of_captions(tmp_path):
    members = [
        m
        for number in range(40)
        for m in made.sample(number, "1", captions=["1", "2"], caption_zh="3", image=b"")
    ]
    made.write_tar(tmp_path / "00000.tar", members)

    def tokens(language, epochs=1, **settings):
        data = dataset(tmp_path, ("tokens",), language=language, **settings)
        batches = take(data.batches(40), epochs)
        return np.stack([b["tokens"][np.argsort(b["index"]), 0] for b in batches])

    english, chinese, mixed = (tokens(language) for language in ("en", "zh", "any"))
    assert set(chinese.ravel()) == {3}
    assert 8 < (english == 1).sum() < 32 and set(english.ravel()) == {1, 2}
    assert 8 < (mixed == 3).sum() < 32 and set(mixed.ravel()) == {1, 2, 3}
    assert not np.array_equal(*tokens("en", epochs=2))  # another caption in another epoch
    np.testing.assert_array_equal(tokens("en", num_workers=1), english)
    with pytest.raises(ValueError, match="data.language 'fr'.*any, en, zh"):
        tokens("fr")
    texts = collections.Counter(
        pipeline.iterate_captions(source="tar", path=str(tmp_path), split="", language="any")
    )
    assert texts == {"1": 40, "2": 40, "3": 40}
    few = pipeline.iterate_captions(source="tar", path=str(tmp_path), split="", language="zh", limit=10)
    assert len(list(few)) == 10


def test_records_that_name_sides_are_never_mirrored(tmp_path):
    ramp = made.Image.fromarray(np.tile(np.arange(8, dtype=np.uint8)[None, :, None] * 30, (8, 1, 3)))
    members = []
    for number in range(40):
        zh = "左边" if number % 2 else "上面"
        members += made.sample(number, f"a bright thing {number}", made.encode(ramp), caption_zh=zh)
    made.write_tar(tmp_path / "00000.tar", members)
    mirrored = collections.Counter()
    for batch in take(dataset(tmp_path, flip=True).batches(40), 2):
        for row, number in enumerate(batch["index"].tolist()):
            mirrored[number % 2] += batch["image"][row, 0, 0, 0] > batch["image"][row, 0, -1, 0]
    assert mirrored[1] == 0 and 20 < mirrored[0] < 60  # of 80 each


def test_pictures_of_an_upsampler_batch_line_up(tmp_path):
    members = [
        m for n in range(6) for m in made.sample(n, image=made.encode(made.noise_picture((70, 50), n)))
    ]
    made.write_tar(tmp_path / "00000.tar", members)
    settings = dict(fields=("image", "low_res", "crop_yx"), image_size=32, low_res_size=8)
    window = take(dataset(tmp_path, crop_size=8, **settings).batches(6), 3)
    full = take(dataset(tmp_path, ("image", "low_res"), image_size=32, low_res_size=8).batches(6), 3)
    for some, whole in zip(window, full, strict=True):
        np.testing.assert_array_equal(some["low_res"], whole["low_res"])
        assert some["image"].shape == (6, 8, 8, 3) and whole["image"].shape == (6, 32, 32, 3)
        for row, (top, left) in enumerate(some["crop_yx"]):
            np.testing.assert_array_equal(
                some["image"][row], whole["image"][row, top : top + 8, left : left + 8]
            )


def test_embeddings_beside_pictures(shards, tmp_path):
    os.makedirs(tmp_path / "img_emb")
    np.save(
        tmp_path / "img_emb" / "img_emb_0.npy",
        np.arange(23, dtype=np.float16)[:, None] * np.ones((1, 3), np.float16),
    )
    data = dataset(shards, ("image", "image_embed"), embeddings=str(tmp_path))
    (batch,) = take(data.batches(5), 1)
    assert batch["image_embed"].dtype == np.float32 and batch["image_embed"].shape == (5, 3)
    np.testing.assert_array_equal(batch["image_embed"][:, 0], batch["index"])
    with pytest.raises(ValueError, match="'text_embed' is not in the dataset"):
        dataset(shards, ("text_embed",), embeddings=str(tmp_path))
    with pytest.raises(ValueError, match="holds no images"):
        pipeline.make_dataset(
            source="embeddings", path=str(tmp_path), split="", fields=("image",), image_size=8
        )


def test_other_exceptions_reach_the_consumer(shards):
    class Broken(made.WordTokenizer):
        calls = 0

        def __call__(self, captions):
            Broken.calls += 1
            if Broken.calls > 3:
                raise ZeroDivisionError("in a reading thread")
            return super().__call__(captions)

    batches = dataset(shards, tokenizer=Broken()).batches(4)
    outcome = []

    def consume():
        try:
            for _ in range(50):
                next(batches)
        except ZeroDivisionError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert outcome == ["in a reading thread"]  # neither swallowed nor hanging
    with pytest.raises(StopIteration):
        next(batches)


def test_files_that_vanish_or_shrink_while_training(tmp_path):
    made.write_samples(tmp_path / "00000.tar", range(23))
    data = dataset(tmp_path)
    os.truncate(tmp_path / "00000.tar", 1536 * 12)
    batches = data.batches(8)
    with pytest.raises(TooManyBadRecords, match="truncated"):
        take(batches, 10)
    os.remove(tmp_path / "00000.tar")
    with pytest.raises(FileNotFoundError):
        next(reopened(data).batches(8))


def reopened(data):
    """The same dataset with its files closed, as in another process."""
    for descriptor, _ in data.source._files._open.values():
        os.close(descriptor)
    data.source._files._open.clear()
    return data


def test_settings_that_cannot_be_stop_at_once(shards):
    for message, settings in {
        "did you mean 'image'": dict(fields=("imag",)),
        r"needs image_sizes\['clip.image'\]": dict(fields=("clip.image",)),
        "needs crop_size": dict(fields=("crop_yx",)),
        "need a tokenizer": dict(tokenizer=None),
        "must not exceed image_size 8": dict(fields=("image", "crop_yx"), crop_size=9),
        "is a probability": dict(low_res_blur=1.5),
        "did you mean 'light'": dict(low_res_bsr="ligth"),
        "set low_res_blur=0": dict(low_res_bsr="full", low_res_blur=1.0, low_res_size=4),
    }.items():
        with pytest.raises(ValueError, match=message):
            dataset(shards, **settings)
    with pytest.raises(ValueError, match="multiple of its 3 parts"):
        dataset(shards).batches(8, num_parts=3)
    with pytest.raises(TypeError, match="imagesize"):
        dataset(shards, imagesize=8)


def test_examples_are_what_is_stored(tmp_path):
    write_with_bad(tmp_path, {2: b"broken"})
    data = dataset(tmp_path, ("tokens",), image_size=8)
    found = data.examples([4, 2, 9])
    assert found["captions"] == ["caption 4", "caption 9"] and found["index"].tolist() == [4, 9]
    assert found["keys"] == ["00000.tar:000000004", "00000.tar:000000009"]
    assert found["image"].dtype == np.uint8 and found["image"][1, 0, 0].tolist() == list(made.colour_of(9))
    assert not data.bad_records()  # looking at examples changes nothing in training


def test_every_record_has_a_label_whatever_captions_it_has(tmp_path):
    """That of the language, else of another, else its key; as many as pictures, in their order."""
    members = []
    for number in range(5):
        picture, *texts = made.sample(number, caption=f"caption {number}", caption_zh="一颗星")
        members += [picture, *texts] if number < 2 else [picture]
    members += [("000000005.png", made.flat_png(5)), ("000000005.txt", b"\xff\xfe")]
    made.write_tar(tmp_path / "00000.tar", members)
    keys = [f"00000.tar:{number:09d}" for number in range(6)]
    for language, first in {"en": "caption 1", "zh": "一颗星", "fr": "caption 1", "any": "caption 1"}.items():
        data = dataset(tmp_path, ("image",), language=language, tokenizer=None)
        assert data.labels([1, 4, 2]) == [first, keys[4], keys[2]]
    assert data.labels([5])[0] in (keys[5], "record 5") and not data.bad_records()


def test_speed_is_reported(tmp_path, capsys):
    """Prints examples a second of one core's time; fails only where something is badly wrong."""
    pictures = [made.encode(made.noise_picture((64, 64), n)) for n in range(20)]
    made.write_tar(
        tmp_path / "00000.tar", [m for n, p in enumerate(pictures) for m in made.sample(n, image=p)]
    )
    for image_size in (16, 64):
        batches = dataset(tmp_path, image_size=image_size).batches(32)
        next(batches)
        wall, cpu = time.perf_counter(), time.process_time()
        take(batches, 30)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        with capsys.disabled():
            print(f"\n{image_size} px: {960 / wall:.0f} examples/s, {960 / cpu:.0f} a second of CPU time")
        assert 960 / cpu > 200


@pytest.mark.parametrize(
    "caption, label",
    [
        ("a red ring", 0),
        ("A Red Ring on black", 0),
        ("a red ring above a blue star", -1),
        ("two red rings", -1),
        ("there is a ring", 2),
        ("ring, red ring", 0),
        ("red", -1),
    ],
)
def test_a_label_is_the_one_class_that_a_caption_names(caption, label):
    assert pipeline.label_of(caption, ("red ring", "blue star", "ring")) == label


def test_labels_come_with_the_pictures_that_they_belong_to(shards):
    data = dataset(shards, ("image", "label"), image_size=8, classes=("caption 3", "caption 12"))
    batch = next(data.batches(23))
    assert batch["label"].dtype == np.int32
    named = {3: 0, 12: 1}
    assert batch["label"].tolist() == [named.get(int(i), -1) for i in batch["index"]]
    with pytest.raises(ValueError, match="field label needs data.classes"):
        dataset(shards, ("label",), classes=("a",))

"""Embedding a data set: rows beside their records, whatever is interrupted or damaged; training from them."""

import json
import os
import shutil
import threading
import types

import numpy as np
import pytest

parquet = pytest.importorskip("pyarrow.parquet", reason="metadata of embeddings need pyarrow")

from configs import decoder64, prior  # noqa: E402
from dalle2_jax import pipeline  # noqa: E402
from dalle2_jax.data import embeddings  # noqa: E402
from dalle2_jax.data import pipeline as data_pipeline  # noqa: E402
from dalle2_jax.embed import __main__ as command  # noqa: E402
from dalle2_jax.embed import embed  # noqa: E402
from dalle2_jax.models import models  # noqa: E402
from dalle2_jax.train import checks, inputs, loop  # noqa: E402
from dalle2_jax.train.plan import Plan  # noqa: E402
from tests.data import shards_for_tests as made  # noqa: E402
from tests.test_processes import run_processes  # noqa: E402
from tests.tiny_model import make_model  # noqa: E402
from tests.tiny_run import stored_state  # noqa: E402

COUNT, BAD = 21, 9
WORDS = ("a red star", "a blue ring", "a yellow circle", "a green cross", "a purple square")


def write_shards(folder, first: int = 0, bad: int | None = None):
    """Two tars of 21 noisy pictures with different captions; the picture of record `bad` is none."""
    os.makedirs(folder)
    for shard, numbers in enumerate((range(12), range(12, COUNT))):
        members = []
        for number in numbers:
            picture = made.encode(made.noise_picture((40, 32), first + number))
            image = b"<html>" if number == bad else picture
            members += made.sample(first + number, f"{WORDS[number % 5]} above {number}", image)
        made.write_tar(folder / f"train-{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("damaged") / "shards", bad=BAD)


def recipe(path, of=prior, **changes) -> dict:
    config = models.to_plain(of.get_config("debug"))
    config["data"].update(
        source="tar", path=os.fspath(path), split="train", eval_split="train", max_bad_fraction=0.1
    )
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return config


def run(path, model, out, **options):
    options = dict(splits=("train",), rows_per_shard=8, batch_size=8, dtype="float32") | options
    return embed.embed(recipe(path), os.fspath(model), os.fspath(out), **options)


@pytest.fixture(scope="module")
def whole(damaged, model, tmp_path_factory):
    """(folder, what was left out) of a pass without interruption."""
    out = tmp_path_factory.mktemp("whole")
    lost = run(damaged, model, out)
    embeddings.finish(embed.epath.Path(out) / "train")
    return out, lost


def stored(folder) -> dict[str, np.ndarray]:
    """All rows of the two tables."""
    names = ("img_emb", "text_emb")
    files = {name: sorted((folder / "train" / name).iterdir()) for name in names}
    return {name: np.concatenate([np.load(file) for file in found]) for name, found in files.items()}


def test_rows_are_those_of_their_records(whole, damaged, model):
    """Row by row what the model says of the picture and the caption; a damaged record has none."""
    out, lost = whole
    rows = stored(out)
    assert lost == {"train": {"undecodable": 1}}
    assert {name: value.shape for name, value in rows.items()} == dict.fromkeys(rows, (COUNT, 32))
    assert [len(np.load(file)) for file in sorted((out / "train" / "img_emb").iterdir())] == [8, 8, 5]
    unclip = pipeline.UnCLIP.load(os.fspath(model))
    source = made.open_source("tar", os.fspath(damaged), "train")
    for row in (0, 11, 12, 20):
        record = source.read(row)
        image = unclip.encode_image([np.asarray(made.Image.open(made.io.BytesIO(record.image)))])[0]
        (text, _), _ = unclip.encode_text([record.captions["en"][0]])
        np.testing.assert_allclose(rows["img_emb"][row], image, atol=2e-5)
        np.testing.assert_allclose(rows["text_emb"][row], text[0], atol=2e-5)
    assert np.isnan(rows["img_emb"][BAD]).all() and np.isnan(rows["text_emb"][BAD]).all()
    assert np.isfinite(np.delete(rows["img_emb"], BAD, 0)).all()
    table = parquet.read_table(out / "train" / "metadata" / "metadata_00001.parquet").to_pydict()
    assert table["left_out"] == ["", "undecodable"] + [""] * 6
    assert table["caption"][0] == "a green cross above 8" and table["key"][0].endswith("000000008")
    plan = json.loads((out / "train" / "embed.json").read_text())
    assert plan["left_out"] == {"undecodable": 1} and plan["records"] == COUNT
    assert (out / "tokenizer").is_dir()


def test_an_interrupted_pass_goes_on_with_what_is_missing(whole, damaged, model, tmp_path, monkeypatch):
    write, written = embeddings.Parts.write, []

    def stop_at_the_third(self, part, *args):
        if part == 2:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, *args)

    with monkeypatch.context() as patched:
        patched.setattr(embeddings.Parts, "write", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(damaged, model, tmp_path)
    folder = tmp_path / "train"
    os.remove(folder / "metadata" / "metadata_00000.parquet")  # as if killed before the last file of a shard
    assert written == [0, 1] and embeddings.missing_parts(embed.epath.Path(folder)) == 2
    with pytest.raises(ValueError, match="are not complete"):
        made.open_source("embeddings", os.fspath(tmp_path), "train")
    second = (folder / "img_emb" / "img_emb_00001.npy").stat().st_mtime_ns
    written.clear()
    monkeypatch.setattr(embeddings.Parts, "write", lambda *args: (written.append(args[1]), write(*args)))
    run(damaged, model, tmp_path)
    assert written == [0, 2] and (folder / "img_emb" / "img_emb_00001.npy").stat().st_mtime_ns == second
    for name, rows in stored(whole[0]).items():
        np.testing.assert_array_equal(stored(tmp_path)[name], rows)


def test_workers_share_the_shards(whole, damaged, model, tmp_path):
    lost = [run(damaged, model, tmp_path, worker=(i, 2)) for i in (1, 0)]
    assert lost == [{"train": {"undecodable": 1}}, {"train": {}}]
    for name, rows in stored(whole[0]).items():
        np.testing.assert_array_equal(stored(tmp_path)[name], rows)
    assert embed.parse_worker("3/8") == (3, 8)
    for text in ("8/8", "1", "a/b"):
        with pytest.raises(ValueError, match="must be I/N"):
            embed.parse_worker(text)


def test_a_folder_of_something_else_is_refused(whole, shards, damaged, model, tmp_path):
    out = whole[0]
    with pytest.raises(ValueError, match=r"(?s)holds other embeddings.*data: "):
        run(shards, model, out)
    with pytest.raises(ValueError, match=r"(?s)rows_per_shard: 8 there, 10 now"):
        run(damaged, model, out, rows_per_shard=10)
    other = make_model(tmp_path / "other", dtype="bfloat16")
    with pytest.raises(ValueError, match="clip_sha256: "):
        run(damaged, other, out)
    with pytest.raises(ValueError, match="must be one of float16, float32"):
        run(damaged, model, out, dtype="int8")


def test_processes_of_one_number_write_the_plan_at_once(tmp_path, monkeypatch):
    """Each has written its file before one of them gives it its name."""
    path, errors = embed.epath.Path(tmp_path / "rows"), []
    replace, both = type(path).replace, threading.Barrier(2, timeout=60)

    def replace_after_both_have_written(*arguments):
        both.wait()
        return replace(*arguments)

    def keep():
        try:
            embeddings.keep_plan(path, {"records": 3})
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(type(path), "replace", replace_after_both_have_written)
    threads = [threading.Thread(target=keep) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and both.n_waiting == 0
    assert [file.name for file in path.iterdir()] == ["embed.json"]
    assert json.loads((path / "embed.json").read_text()) == {"records": 3}


def test_a_data_set_that_has_lost_too_much_is_refused_in_a_line(shards, model, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    (folder / "train-00000_stats.json").write_text('{"successes": 1000}')
    settings = dict(splits=None, worker="", rows_per_shard=8, batch_size=8, dtype="float32", debug=False)
    settings["kind"] = None
    settings["duplicates"] = None
    settings |= dict(config=recipe(folder), clip=os.fspath(model), out=os.fspath(tmp_path / "rows"))
    monkeypatch.setattr(command, "FLAGS", types.SimpleNamespace(**settings))
    with pytest.raises(SystemExit) as ended:
        command.main(["embed"])
    assert ended.value.code == checks.FAILED
    assert "988 of 1009 records of the dataset's files cannot be used" in caplog.messages[-1]


def test_the_command_lists_near_duplicates(whole, damaged, model, tmp_path, monkeypatch, caplog):
    """At the end of a pass; at a cosine of -1 all pairs of the 20 readable records."""
    shutil.copytree(whole[0], tmp_path / "rows")
    settings = dict(splits=None, worker="", rows_per_shard=8, batch_size=8, dtype="float32", debug=False)
    settings["kind"] = None
    settings |= dict(config=recipe(damaged), clip=os.fspath(model), out=os.fspath(tmp_path / "rows"))
    monkeypatch.setattr(command, "FLAGS", types.SimpleNamespace(**settings, duplicates=-1.0))
    command.main(["embed"])
    lines = (tmp_path / "rows/train/duplicates.tsv").read_text().splitlines()
    left = (tmp_path / "rows/train/leave_out.txt").read_text().split()
    assert len(lines) == 1 + 190 and len(left) == 19 and not any(f"{BAD:09d}" in key for key in left)
    listed = os.fspath(tmp_path / "rows/train/leave_out.txt")
    source = made.open_source("tar", os.fspath(damaged), "train", leave_out=listed)
    assert source.left_out == set(range(1, COUNT)) - {BAD}
    monkeypatch.setattr(command, "FLAGS", types.SimpleNamespace(**settings | {"clip": None}, duplicates=0.9))
    with pytest.raises(SystemExit):
        command.main(["embed"])
    assert "--duplicates compares CLIP's embeddings: give --clip=MODEL" in caplog.messages[-1]


def test_embeddings_of_other_records_are_refused(whole, damaged, tmp_path):
    """As many records in files of the same names and sizes: the keys differ; other files: the fingerprint."""
    folder = os.fspath(whole[0])
    assert len(made.open_source("tar", os.fspath(damaged), "train", embeddings=folder)) == COUNT
    other = write_shards(tmp_path / "other", first=100)
    with pytest.raises(ValueError, match=r"row 0 of .* is of record '.*000000000', not '.*000000100'"):
        made.open_source("tar", os.fspath(other), "train", embeddings=folder)
    os.rename(other / "train-00001.tar", other / "train-00002.tar")
    with pytest.raises(ValueError, match="are of a dataset with fingerprint"):
        made.open_source("tar", os.fspath(other), "train", embeddings=folder)


def test_training_from_embeddings_is_training_with_clip(one_device, shards, model, tmp_path):
    """Two steps of the prior, with the frozen CLIP and from float32 rows: the same parameters to rounding.

    From rows alone and from rows beside the records to the bit.
    """
    run(shards, model, tmp_path / "rows")
    embeddings.finish(embed.epath.Path(tmp_path) / "rows" / "train")
    short = dict(num_steps=2, eval_every=100, sample_every=100, checkpoint_every=2)
    loop.train(recipe(shards, clip=os.fspath(model), **short), str(tmp_path / "frozen"))
    rows = dict(source="embeddings", path=os.fspath(tmp_path / "rows"))
    loop.train(recipe(shards, data=rows, **short), str(tmp_path / "from_rows"))
    beside = dict(embeddings=os.fspath(tmp_path / "rows"))
    loop.train(recipe(shards, data=beside, **short), str(tmp_path / "beside"))
    one, other, third = (stored_state(tmp_path / name, 2) for name in ("frozen", "from_rows", "beside"))
    moved = 0.0
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=2e-4, rtol=1e-3, err_msg=name)
        np.testing.assert_array_equal(third[name], other[name])
        moved = max(moved, np.abs(one[name]).max())
    assert moved > 0.1 and (tmp_path / "from_rows" / "tokenizer").is_dir()
    plan = tmp_path / "rows" / "train" / "embed.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"clip_sha256": 64 * "0"}))
    short["num_steps"] = 3
    for name, data in (("from_rows", rows), ("beside", beside)):
        with pytest.raises(ValueError, match="the CLIP has changed since step 2 .* is 000000000000 now"):
            loop.train(recipe(shards, data=data, **short), str(tmp_path / name))


def test_a_record_without_embeddings_is_counted_and_replaced(whole, damaged):
    settings = dict(source="tar", path=os.fspath(damaged), split="train", embeddings=os.fspath(whole[0]))
    data = data_pipeline.make_dataset(
        fields=("image", "image_embed"), image_size=8, max_bad_fraction=0.1, **settings
    )
    (batch,) = data.batches(COUNT, repeat=False, shuffle=False)
    assert data.bad_records() == {"embedding_not_finite": 1}
    expected = np.where(np.arange(COUNT) == BAD, BAD + 1, np.arange(COUNT))
    np.testing.assert_array_equal(batch["index"], expected)
    np.testing.assert_array_equal(batch["image_embed"], stored(whole[0])["img_emb"][expected])


def test_what_is_not_precomputed_is_asked_for():
    def fields(of, **changes):
        config = recipe("shards", of, **changes)
        return inputs.dataset_fields(config, Plan(config, models.build_stage(config), None))

    for of in (decoder64, prior):
        with pytest.raises(ValueError, match="beside pictures --config.data.embeddings=FOLDER"):
            fields(of)
    assert fields(decoder64, data=dict(embeddings="rows")) >= {"image", "image_embed", "tokens"}
    states = dict(text=dict(width=32, depth=1, num_heads=2, context_length=32, states_width=32))
    with pytest.raises(ValueError, match="text states, which are not precomputed"):
        fields(prior, data=dict(source="embeddings"), model=states)


@pytest.mark.slow
def test_two_processes_embed_as_one(whole, damaged, model, tmp_path):
    command = ["dalle2_jax.embed", "--config=configs/prior.py:debug", f"--clip={model}"]
    command += [f"--out={tmp_path / 'rows'}", "--rows_per_shard=8", "--batch_size=8", "--dtype=float32"]
    data = dict(source="tar", path=damaged, split="train", eval_split="train", max_bad_fraction=0.1)
    command += [f"--config.data.{name}={value}" for name, value in data.items()]
    texts = run_processes(command, 2, tmp_path / "log")
    for name, rows in stored(whole[0]).items():
        np.testing.assert_allclose(stored(tmp_path / "rows")[name], rows, atol=1e-5)
    plan = json.loads((tmp_path / "rows" / "train" / "embed.json").read_text())
    assert plan["left_out"] == {"undecodable": 1}
    assert "train is complete" in texts[0]
    assert "left out by this process: {'train': {'undecodable': 1}}" in texts[1]

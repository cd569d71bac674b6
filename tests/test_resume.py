"""What a resumption may differ in, and what it is told where it differs in more."""

import json
import shutil
import types
import unittest.mock

import numpy as np
import pytest
from etils import epath

from dalle2_jax.models import models
from dalle2_jax.train import checks, resume
from dalle2_jax.train.plan import Plan
from tests import tiny_run
from tests.data import shards_for_tests as made
from tests.tiny_run import assert_same, config, logged, status, steps_of, stored_state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 pictures, of which one cannot be read."""
    return tiny_run.shards(tmp_path_factory.mktemp("data"), unreadable=7)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of six steps, one checkpoint each."""
    return tiny_run.whole_run(data, 6, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def workdir(tmp_path):
    """A folder that was trained with the settings of `stored()`."""
    (tmp_path / "config.json").write_text(json.dumps(stored()))
    return epath.Path(tmp_path)


def stored(**optim) -> dict:
    return config("shards", 4) | dict(optim=dict(learning_rate=0.1, grad_clip=1.0) | optim)


def test_settings_that_are_free_change_no_step(data, whole, tmp_path, monkeypatch):
    assert status(config(data, 3), tmp_path, monkeypatch) == 0
    other = config(data, 6, log_every=2)
    other["data"] |= dict(
        num_workers=5, max_bad_fraction=0.5, eval_split="", data_dir=str(tmp_path / "other")
    )
    assert status(other, tmp_path, monkeypatch) == 0
    assert_same(stored_state(whole, 6), stored_state(tmp_path, 6))
    assert json.loads((tmp_path / "config.json").read_text())["data"]["num_workers"] == 5
    assert not (tmp_path / "changes.json").exists()


def test_a_run_whose_paths_are_written_with_a_tilde_goes_on(data, whole, tmp_path, monkeypatch):
    """By the same command, by the whole paths, and where config.json has a tilde, as older runs wrote it."""
    home = tmp_path / "home"
    shutil.copytree(data, home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for steps, folder, path in (
        (2, "~/run", "~/data"),
        (4, "~/run", "~/data"),
        (5, home / "run", home / "data"),
    ):
        assert status(config(path, steps), folder, monkeypatch) == 0
    kept = home / "run" / "config.json"
    settings = json.loads(kept.read_text())
    assert settings["data"]["path"] == str(home / "data")
    settings["data"]["path"] = "~/data"
    kept.write_text(json.dumps(settings))
    assert status(config("~/data", 6), "~/run", monkeypatch) == 0
    assert steps_of(home / "run") == list(range(1, 7)) and not (tmp_path / "~").exists()
    assert_same(stored_state(whole, 6), stored_state(home / "run", 6))


def test_the_budget_of_bad_records_may_be_raised_as_its_error_says(
    data, whole, tmp_path, monkeypatch, caplog
):
    strict = config(data, 6)
    strict["data"]["max_bad_fraction"] = 0.0
    shutil.copytree(whole, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    assert status(strict, tmp_path / "run", monkeypatch) == checks.FAILED
    assert "raise data.max_bad_fraction" in caplog.text
    assert status(config(data, 6), tmp_path / "run", monkeypatch) == 0
    assert_same(stored_state(whole, 6), stored_state(tmp_path / "run", 6))


def test_a_changed_setting_is_allowed_by_its_name_or_its_group(workdir):
    changed = stored(learning_rate=0.2)
    with pytest.raises(
        ValueError, match=r"--allow_changed=optim.learning_rate:\n  optim.learning_rate: 0.1 in"
    ):
        resume.Resumption(workdir, changed)
    for allowed in ("optim.learning_rate", "optim"):
        resume.Resumption(workdir, changed, [allowed])
    with pytest.raises(ValueError, match=r"--allow_changed=optim.grad_clip:") as error:
        resume.Resumption(workdir, stored(learning_rate=0.2, grad_clip=2.0), ["optim.learning_rate"])
    assert "learning_rate" not in str(error.value)


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (
            "optim.lerning_rate",
            r"config.optim.lerning_rate is not a setting; did you mean config.optim.learning",
        ),
        ("optim.grad_clip", "names optim.grad_clip, which is as it was in .* leave it out"),
        ("log_every", "names log_every, which is as it was in .* or may change without: leave it out"),
        ("model", "names model, which is as it was"),
    ],
)
def test_names_that_need_no_permission_are_refused(workdir, allowed, said):
    with pytest.raises(ValueError, match=said):
        resume.Resumption(
            workdir, stored(learning_rate=0.2) | dict(log_every=7), ["optim.learning_rate", allowed]
        )


def dataset(files: dict[str, tuple[int, int]]) -> dict:
    """What `describe` says of one with these files, name -> (size, records)."""
    entries = [(name, *entry) for name, entry in files.items()]
    count = sum(records for _, records in files.values())
    made = types.SimpleNamespace(files=entries, fingerprint=repr(sorted(entries)) * 12, num_records=count)
    return resume.describe(made)


def test_files_that_differ_are_listed(workdir):
    then = dataset({"a.tar": (10, 1), "b.tar": (20, 2), "c.tar": (30, 3)}) | {"step": 5}
    now = dataset({"b.tar": (20, 2), "c.tar": (33, 4), "d.tar": (40, 4)})
    resume.Resumption(workdir, stored()).compare(then, {n: v for n, v in then.items() if n != "step"})
    with pytest.raises(
        ValueError, match="since step 5 .* go on with what there is by --allow_changed=data"
    ) as error:
        resume.Resumption(workdir, stored()).compare(then, now)
    assert str(error.value).splitlines()[1:] == [
        "  removed: a.tar (10 bytes, 1 records)",
        "  added: d.tar (40 bytes, 4 records)",
        "  resized: c.tar (30 bytes, 3 records then, 33 bytes, 4 records now)",
    ]
    with pytest.raises(ValueError, match="names data, which is as it was"):
        resume.Resumption(workdir, stored(), ["data"]).compare(then, then)


@pytest.mark.parametrize("name", ["data", "clip", "frozen.tokenizer"])
def test_what_was_allowed_to_a_run_that_was_killed_before_it_saved_needs_no_flag(workdir, name):
    """It lies in changes.json: the very change, from the same step on."""
    settings = stored() | dict(frozen=dict(tokenizer="runs/tokenizer"))
    (workdir / "config.json").write_text(json.dumps(settings))

    def described(size):
        """`clip_sha256` is how older runs named their CLIP."""
        files = {"a.tar": (size if name == "data" else 10, 1)}
        sha256 = str(size) * 64 if name != "data" else "1" * 64
        frozen = {"frozen": {"tokenizer": sha256}} if name == "frozen.tokenizer" else {"clip_sha256": sha256}
        return dataset(files) | frozen

    old, new, third = described(1), described(2), described(3)
    meta = old | dict(step=5)
    allowed = resume.Resumption(workdir, settings, [name])
    allowed.compare(meta, new)
    allowed.note(5)
    before = (workdir / "changes.json").read_text()
    again = resume.Resumption(workdir, settings)
    again.compare(meta, new)
    again.note(5)
    assert (workdir / "changes.json").read_text() == before
    for then, now in ((meta, third), (meta | dict(step=6), new), (new | dict(step=6), old)):
        with pytest.raises(ValueError, match=f"--allow_changed={name}"):
            resume.Resumption(workdir, settings).compare(then, now)


def test_a_long_list_of_files_is_cut_and_a_very_long_one_is_not_kept(workdir, monkeypatch):
    then = dataset({f"{n:05d}.tar": (10, 1) for n in range(40)}) | {"step": 5}
    now = dataset({f"{n:05d}.tar": (10, 1) for n in range(27)})
    with pytest.raises(ValueError) as error:
        resume.Resumption(workdir, stored()).compare(then, now)
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == "  removed: 00027.tar (10 bytes, 1 records)" and lines[-1] == "  ... and 3 more"
    assert len(lines) == 11
    monkeypatch.setattr(resume, "MAX_FILES", 30)
    many = dataset({f"{n:05d}.tar": (10, 1) for n in range(40)}) | {"step": 5}
    assert "files" not in many
    with pytest.raises(
        ValueError, match=r"\n  40 files of 400 bytes then, 27 of 270 now; more than 30 are not"
    ):
        resume.Resumption(workdir, stored()).compare(many, now)
    older = {name: then[name] for name in ("step", "fingerprint")}  # a checkpoint of before
    with pytest.raises(ValueError, match=r"and \? records then(.|\n)*from before they were listed"):
        resume.Resumption(workdir, stored()).compare(older, now)


def test_a_dataset_that_changed_is_gone_on_with_by_permission(data, whole, tmp_path, monkeypatch, caplog):
    folder, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, folder)
    assert status(config(folder, 2), workdir, monkeypatch) == 0
    made.write_samples(folder / "00001.tar", range(3))
    assert status(config(folder, 4), workdir, monkeypatch) == checks.FAILED
    assert "--allow_changed=data\n  added: 00001.tar" in caplog.text
    with monkeypatch.context() as patched:
        killed = unittest.mock.Mock(side_effect=KeyboardInterrupt)
        patched.setattr(Plan, "jit_step", killed)
        with pytest.raises(KeyboardInterrupt):
            status(config(folder, 4), workdir, patched, ["data"])
    killed.assert_called_once()
    shutil.copytree(workdir, tmp_path / "without")
    assert status(config(folder, 3), tmp_path / "without", monkeypatch) == 0
    assert status(config(folder, 4), workdir, monkeypatch, ["data"]) == 0
    assert "changed from step 2 on, as allowed: data: " in caplog.text
    assert steps_of(workdir) == [1, 2, 3, 4]
    (entry,) = json.loads((workdir / "changes.json").read_text())["changes"]
    assert entry["step"] == 2 and entry["name"] == "data"
    assert status(config(folder, 5), workdir, monkeypatch, ["data"]) == 0  # the same command goes on
    assert status(config(folder, 6), workdir, monkeypatch) == 0
    (folder / "00001.tar").unlink()
    assert status(config(folder, 7), workdir, monkeypatch) == checks.FAILED
    assert "removed: 00001.tar" in caplog.messages[-1]


def test_another_frozen_clip_at_the_same_place_is_refused(data, tmp_path, monkeypatch, caplog):
    params = {"text": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    clip_stage = types.SimpleNamespace(image_size=8)
    monkeypatch.setattr(models, "load_stage", lambda path, name, **_: (clip_stage, {}, params))
    workdir, settings = tmp_path / "run", dict(clip="runs/clip")
    assert status(config(data, 2, **settings), workdir, monkeypatch) == 0
    params["text"]["kernel"] = params["text"]["kernel"].copy()
    params["text"]["kernel"][1, 2] += 1e-6
    assert status(config(data, 3, **settings), workdir, monkeypatch) == checks.FAILED
    assert "the CLIP has changed since step 2" in caplog.text and steps_of(workdir) == [1, 2]
    older = tmp_path / "older"
    shutil.copytree(workdir, older)
    path = older / "checkpoints" / "2" / "meta" / "metadata"
    contents = json.loads(path.read_text())
    assert len(contents["meta"].pop("frozen")["clip"]) == 64
    del contents["sha256"], contents["layout"]  # which checkpoints of then had not either
    path.write_text(json.dumps(contents))
    assert status(config(data, 3, **settings), older, monkeypatch) == 0  # it does not say which it was
    assert status(config(data, 3, **settings), workdir, monkeypatch, ["clip"]) == 0
    assert "changed from step 2 on, as allowed: clip: " in caplog.text
    assert status(config(data, 4, **settings), workdir, monkeypatch) == 0
    params["text"]["kernel"][1, 2] -= 1e-6
    assert status(config(data, 5, **settings), workdir, monkeypatch) == checks.FAILED
    assert logged(workdir, "train/loss").keys() == {1, 2, 3, 4}

"""Faults of machines, disks and data strike a whole run; docs/reliability.md says what is promised then.

Each test also asserts that its fault really struck. The run is that of `tiny_run`, the capstone's at the end
an upsampler's.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import json
import operator
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from dalle2_jax.models.stages import Op
from dalle2_jax.runtime import checkpoint
from dalle2_jax.train import checks, inputs, resume, stopping, validation
from tests import tiny_run
from tests.data import shards_for_tests as made
from tests.tiny_run import assert_same, config, logged, status, steps_of, stored_state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 pictures, of which one cannot be read."""
    return tiny_run.shards(tmp_path_factory.mktemp("data"), unreadable=7)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of eight steps, one checkpoint each."""
    return tiny_run.whole_run(data, 8, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


# Numbers


def test_a_streak_of_bad_steps_ends_with_status_3_and_harms_nothing(
    data, whole, workdir, monkeypatch, caplog
):
    """Pictures that are not numbers come from step 4 on."""
    with monkeypatch.context() as patched:
        struck = tiny_run.poison(patched, lambda step: step > 3)
        assert status(config(data, 30, log_every=4, checkpoint_every=3), workdir, patched) == 3
    assert len(struck) > 12
    assert "9 steps in a row had a loss or gradient that is not finite (step 12)" in caplog.text
    assert steps_of(workdir) == [3, 6, 9]
    for step in steps_of(workdir):
        before, after = stored_state(whole, 3), stored_state(workdir, step)
        assert_same(before, after)
    noted = json.loads((workdir / "bad_steps.json").read_text())
    assert noted["step"] == 12 and noted["scalars"]["train/loss"] == "nan"
    assert noted["records"] == {str(step): struck[step - 1] for step in range(5, 13)}  # the last eight
    # With the data mended the run goes on from there, and counts no more.
    assert status(config(data, 11, checkpoint_every=3), workdir, monkeypatch) == 0
    assert logged(workdir, "train/bad_steps")[11] == 0 and not any(
        (stored_state(workdir, 11)[name] == value).all() for name, value in before.items() if "kernel" in name
    )


def test_skipping_spikes_survives_an_interruption(data, tmp_path, monkeypatch):
    """The rule's memory is saved: five steps and three are eight, to the bit, also of that memory."""
    for name, lengths in (("whole", (8,)), ("parts", (5, 8))):
        for length in lengths:
            assert status(config(data, length, spike_sigma=6.0), tmp_path / name, monkeypatch) == 0
    one, other = (checkpoint.restore_subtree(tmp_path / name, "spikes", 8) for name in ("whole", "parts"))
    assert one["known"] == 8 and np.count_nonzero(one["loss"]) == np.count_nonzero(one["grad_norm"]) == 8
    assert_same(one, other)
    assert_same(stored_state(tmp_path / "whole", 8), stored_state(tmp_path / "parts", 8))
    assert logged(tmp_path / "parts", "train/spikes")[8] == 0


# Disks


@contextlib.contextmanager
def files_at_most(size: int):
    """No file may become larger than `size` bytes: what a full disk looks like, wherever one is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on(data, whole, workdir, monkeypatch, caplog):
    assert status(config(data, 2), workdir, monkeypatch) == 0
    before = stored_state(workdir, 2)
    caplog.clear()
    with files_at_most(20_000):
        assert status(config(data, 8), workdir, monkeypatch) == checks.FAILED
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and "a checkpoint could not be written" in errors[0]
    assert "File too large. Whole ones are those of steps 1, 2." in errors[0]
    assert steps_of(workdir) == [1, 2] == sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert_same(before, stored_state(workdir, 2))
    assert status(config(data, 8), workdir, monkeypatch) == 0
    assert_same(stored_state(whole, 8), stored_state(workdir, 8))


def test_a_disk_that_fills_before_a_line_of_the_log(data, whole, workdir, monkeypatch, caplog):
    assert status(config(data, 2), workdir, monkeypatch) == 0
    with (workdir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 0}\n' * 1000)
    size = (workdir / "metrics.jsonl").stat().st_size
    with files_at_most(size + 10):
        assert status(config(data, 8, checkpoint_every=8), workdir, monkeypatch) == checks.FAILED
    assert f"File too large: '{workdir / 'metrics.jsonl'}'" in caplog.text
    assert steps_of(workdir) == [1, 2]
    assert status(config(data, 8), workdir, monkeypatch) == 0
    assert_same(stored_state(whole, 8), stored_state(workdir, 8))
    assert sorted(logged(workdir, "train/loss")) == list(range(1, 9))  # the torn line costs no other


@contextlib.contextmanager
def without_the_rights_of_root():
    """This thread keeps to the permissions of files, also where root runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if not sys.platform.startswith("linux") or libc.capget(header, words):
        pytest.skip("root's rights cannot be laid down here")
    effective, override = words[0], 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    words[0] = effective & ~override
    assert libc.capset(header, words) == 0
    try:
        yield
    finally:
        words[0] = effective
        assert libc.capset(header, words) == 0


def test_a_workdir_that_is_read_only_stops_before_anything_is_read(data, workdir, monkeypatch, caplog):
    workdir.mkdir()
    workdir.chmod(0o555)
    try:
        with without_the_rights_of_root():
            with pytest.raises(PermissionError):
                (workdir / "file").write_text("")
            with monkeypatch.context() as patched:
                patched.setattr(inputs, "make_datasets", lambda *_: pytest.fail("data was read"))
                assert status(config(data, 2), workdir, patched) == checks.FAILED
    finally:
        workdir.chmod(0o755)
    assert f"the workdir {workdir} cannot be written: [Errno 13] Permission denied" in caplog.text


# Checkpoints


def damage(workdir, step: int) -> None:
    """Cuts the largest file of numbers of a checkpoint to half, and that of its copy from before merging."""
    for folder in (workdir / "checkpoints" / str(step) / "state").rglob("d"):
        largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)


def test_a_finished_run_with_a_damaged_checkpoint_does_its_last_steps_again(
    data, whole, workdir, monkeypatch, caplog
):
    shutil.copytree(whole, workdir)
    damage(workdir, 8)
    with pytest.raises(ValueError):
        stored_state(workdir, 8)
    assert status(config(data, 8), workdir, monkeypatch) == 0
    assert "checkpoints/8 cannot be read" in caplog.text and "moved the damaged checkpoint" in caplog.text
    assert_same(stored_state(whole, 8), stored_state(workdir, 8))
    for step in steps_of(workdir):
        damage(workdir, step)
    assert status(config(data, 8), workdir, monkeypatch) == checks.FAILED  # none is whole: it says so
    assert steps_of(workdir) == list(range(1, 9))


@pytest.mark.parametrize("name", ["meta/metadata", "state/_METADATA", "state"])
def test_a_checkpoint_of_another_user_is_refused_and_stays(data, whole, workdir, monkeypatch, caplog, name):
    shutil.copytree(whole, workdir)
    unreadable = workdir / "checkpoints" / "8" / name
    mode = unreadable.stat().st_mode
    unreadable.chmod(0)
    try:
        with without_the_rights_of_root():
            with pytest.raises(PermissionError):
                list(unreadable.iterdir()) if unreadable.is_dir() else unreadable.read_bytes()
            assert status(config(data, 9), workdir, monkeypatch) == checks.FAILED
    finally:
        unreadable.chmod(mode)
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and "checkpoints/8 cannot be read by this process: Permission denied" in errors[0]
    assert steps_of(workdir) == list(range(1, 9)) and not (workdir / "damaged").exists()
    assert status(config(data, 8), workdir, monkeypatch) == 0


@pytest.mark.parametrize("name", [None, "first_state", "validation.Validation", "metrics.Writer"])
def test_the_checkpointer_is_closed_once_whatever_fails(data, workdir, monkeypatch, name):
    """Its threads would go on otherwise. None: nothing fails."""
    struck, closed, close = [], [], checkpoint.Checkpointer.close

    def fail(*args, **options):
        struck.append(name)
        raise ValueError("no such colour")

    monkeypatch.setattr(checkpoint.Checkpointer, "close", lambda self: closed.append(close(self)))
    if name:
        monkeypatch.setattr(f"dalle2_jax.train.loop.{name}", fail)
    assert status(config(data, 1), workdir, monkeypatch) == (checks.FAILED if name else 0)
    assert len(closed) == 1 and struck == ([name] if name else [])


def test_what_else_lies_among_the_checkpoints_does_not_count(data, whole, workdir, monkeypatch):
    """An empty folder, a copy that stopped, a stray file and foreign names (R12)."""
    shutil.copytree(whole, workdir)
    folder = workdir / "checkpoints"
    (folder / "9").mkdir()
    shutil.copytree(folder / "8" / "meta", folder / "10" / "meta")
    shutil.copytree(folder / "8", folder / "8 (copy)")
    (folder / "11").write_text("")
    (folder / "notes").mkdir()
    assert status(config(data, 10), workdir, monkeypatch) == 0
    resumed = stored_state(workdir, 10)
    assert status(config(data, 10), whole.parent / "ten", monkeypatch) == 0
    assert_same(stored_state(whole.parent / "ten", 10), resumed)
    assert (folder / "8 (copy)").is_dir() and (folder / "notes").is_dir()


def test_a_workdir_of_version_0_1_goes_on(data, tmp_path, monkeypatch):
    """tests/workdir_0_1 was written before checkpoints had a number of their format and configs the setting
    `spike_sigma`. Its two steps saw these pictures, whose files another encoder may write otherwise."""
    from dalle2_jax.data import pipeline

    stored, workdir = tiny_run.ROOT / "tests" / "workdir_0_1", tmp_path / "run"
    shutil.copytree(stored, workdir)
    shutil.copytree(data, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    contents = json.loads((stored / "checkpoints" / "2" / "meta" / "metadata").read_text())
    settings = json.loads((stored / "config.json").read_text())
    assert "format" not in contents and "spike_sigma" not in settings
    fingerprint = property(lambda self: contents["meta"]["fingerprint"])
    monkeypatch.setattr(pipeline.Dataset, "fingerprint", fingerprint)
    before = stored_state(workdir, 2)
    new = dict(num_steps=4, checkpoint_every=1)
    assert status(settings | resume.SETTINGS_SINCE | new, workdir, monkeypatch) == 0
    assert steps_of(workdir) == [2, 3, 4] and sorted(logged(workdir, "train/loss")) == [3, 4]
    after = stored_state(workdir, 4)
    assert before.keys() == after.keys()
    assert logged(workdir, "train/bad_total") == {3: 0, 4: 0}  # which its checkpoint did not have
    assert all((before[name] != after[name]).any() for name in before if "kernel" in name)


# Data and settings


def test_a_changed_dataset_is_refused_and_the_old_one_goes_on(data, whole, tmp_path, monkeypatch, caplog):
    folder, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, folder)
    assert status(config(folder, 2), workdir, monkeypatch) == 0
    made.write_samples(folder / "00001.tar", range(3))
    assert status(config(folder, 4), workdir, monkeypatch) == checks.FAILED
    assert "the dataset has changed since step 2" in caplog.text
    assert "and 23 records then" in caplog.text and "and 26 now" in caplog.text
    assert re.search(r"\n  added: 00001.tar \(\d+ bytes, 3 records\)$", caplog.messages[-1])
    (folder / "00001.tar").unlink()
    (folder / "00000.tar").rename(folder / "other.tar")
    assert status(config(folder, 4), workdir, monkeypatch) == checks.FAILED
    size = (folder / "other.tar").stat().st_size
    shown = f"({size} bytes, 23 records)"
    assert f"\n  removed: 00000.tar {shown}\n  added: other.tar {shown}" in caplog.messages[-1]
    assert steps_of(workdir) == [1, 2]
    (folder / "other.tar").rename(folder / "00000.tar")
    assert status(config(folder, 8), workdir, monkeypatch) == 0
    assert_same(stored_state(whole, 8), stored_state(workdir, 8))


def test_settings_that_change_what_a_step_computes_are_refused_on_resume_and_others_not(data, tmp_path):
    workdir = epath.Path(tmp_path)
    stored = config(data, 4, cpu_products="float32")  # as a run fills it in
    stored["model"] = dict(channels=16, schedule="cosine", num_timesteps=1000, width=8)
    stored["model"] |= dict(remat="none", scan_blocks=False)
    parts = {part: dict(width=8, scan_blocks=False) for part in ("net", "text")}
    stored["model"] |= parts
    (workdir / "config.json").write_text(json.dumps(stored))
    resume.Resumption(workdir, stored)
    free = set(resume.FREE)
    for name, value in stored.items():
        changed = {**value, "other": 1} if isinstance(value, dict) else "other"
        if name in free:
            resume.Resumption(workdir, stored | {name: changed})
            continue
        with pytest.raises(ValueError, match=rf"  {name}(\.other)?: "):
            resume.Resumption(workdir, stored | {name: changed})
    for group in ("model", "data", "optim", "tokenizer"):
        for name in stored[group]:
            changed = stored | {group: stored[group] | {name: "other"}}
            if f"{group}.{name}" in free:
                resume.Resumption(workdir, changed)
                continue
            with pytest.raises(ValueError, match=rf"  {group}.{name}: .* in the workdir, 'other' now"):
                resume.Resumption(workdir, changed)
    for part, kept in parts.items():
        scanned = stored | {"model": stored["model"] | {part: kept | dict(scan_blocks=True)}}
        resume.Resumption(workdir, scanned)
        wider = stored | {"model": stored["model"] | {part: kept | dict(width=16)}}
        with pytest.raises(ValueError, match=rf"  model.{part}.width: 8 in the workdir, 16 now"):
            resume.Resumption(workdir, wider)
    for name in free:
        *groups, last = name.split(".")
        assert not groups or last in functools.reduce(operator.getitem, groups, stored)
    older = {name: value for name, value in stored.items() if name not in resume.SETTINGS_SINCE}
    older["optim"] = {name: x for name, x in stored["optim"].items() if name not in resume.OPTIM_SINCE}
    assert older["optim"] != stored["optim"]
    (workdir / "config.json").write_text(json.dumps(older))
    resume.Resumption(workdir, stored)  # what came later is as it was without
    with pytest.raises(ValueError, match="spike_sigma: 0.0 in the workdir, 6 now"):
        resume.Resumption(workdir, stored | dict(spike_sigma=6))


def test_slow_input_is_told(data, workdir, monkeypatch, caplog):
    from dalle2_jax.data import pipeline

    load, calls = pipeline.Dataset._load, []

    def slowly(self, *args):
        calls.append(args)
        time.sleep(0.1)
        return load(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.Dataset, "_load", slowly)
        assert status(config(data, 12, log_every=4, checkpoint_every=12), workdir, patched) == 0
    assert len(calls) >= 12
    assert logged(workdir, "speed/wait")[8] > 0.3
    (told,) = [r.getMessage() for r in caplog.records if "waiting for input" in r.getMessage()]
    assert "of the last 4 steps" in told and "data.num_workers" in told


# Samples


@dataclasses.dataclass(frozen=True)
class Drawing(tiny_run.Tiny):
    """`Tiny`, which also draws."""

    ops = {"sample": Op(("image",))}

    def sample(self, params, keys, batch):
        return batch["image"] * 0.5


def drawing(data, num_steps: int, **changes) -> dict:
    """The settings of a run that draws at each step."""
    return config(data, num_steps, **dict(sample_every=1, num_samples=8) | changes)


def sampled(workdir, step: int) -> list[str]:
    """The labels of the grid of that step."""
    from PIL import Image

    with Image.open(workdir / "samples" / f"samples_{step:08d}.png") as picture:
        return json.loads(picture.info["captions"])


@pytest.mark.parametrize("captions", ["none", "few", "another language"])
def test_samples_of_pictures_without_captions_are_drawn(captions, tmp_path, workdir, monkeypatch):
    members = []
    for number in range(23):
        picture, text, fields = made.sample(number)
        few = captions == "few" and number % 9 == 0
        members += [picture] if captions == "none" else [picture, (text[0], b"")] if few else [picture, text]
    (tmp_path / "data").mkdir()
    made.write_tar(tmp_path / "data" / "00000.tar", members)
    monkeypatch.setattr(tiny_run, "Tiny", Drawing)
    settings = drawing(tmp_path / "data", 2, num_samples=32, batch_size=32)
    settings["data"]["language"] = "zh" if captions == "another language" else "en"
    assert status(settings, workdir, monkeypatch) == 0
    assert steps_of(workdir) == [1, 2]
    keys, texts = ({word.format(i) for i in range(23)} for word in ("00000.tar:{:09d}", "caption {}"))
    expected = {"none": keys, "another language": texts}.get(captions)
    expected = expected or {f"00000.tar:{i:09d}" if i % 9 == 0 else f"caption {i}" for i in range(23)}
    assert len(sampled(workdir, 2)) == 32 and set(sampled(workdir, 2)) == expected


def test_a_grid_that_cannot_be_made_is_a_warning_and_the_run_goes_on(data, workdir, monkeypatch, caplog):
    monkeypatch.setattr(tiny_run, "Tiny", Drawing)
    struck = []

    def broken(images, labels):
        struck.append(labels)
        raise RuntimeError("the font is broken")

    with monkeypatch.context() as patched:
        patched.setattr(validation, "labelled_grid", broken)
        assert status(drawing(data, 3), workdir, patched) == 0
    assert len(struck) == 3 and steps_of(workdir) == [1, 2, 3] and not (workdir / "samples").exists()
    (told,) = [r for r in caplog.records if "no grid of samples could be made" in r.getMessage()]
    assert told.levelname == "WARNING" and "RuntimeError: the font is broken" in told.getMessage()
    assert status(drawing(data, 4), workdir, monkeypatch) == 0
    assert len(sampled(workdir, 4)) == 8


@pytest.mark.parametrize("fault", ["a full disk", "the sampler"])
def test_what_ends_a_run_at_its_samples_comes_after_the_checkpoint(data, workdir, monkeypatch, caplog, fault):
    """So that each attempt is a step further on; a checkpoint is committed before anything is drawn."""
    monkeypatch.setattr(tiny_run, "Tiny", Drawing)
    committed, begin = [], validation.Validation.__init__

    def begin_failing(self, *given):
        begin(self, *given)
        self._sample = fail

    def fail(*args, **options):
        committed.append(steps_of(workdir))
        if fault == "a full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise jax.errors.JaxRuntimeError("INTERNAL: the device failed")

    with monkeypatch.context() as patched:
        if fault == "a full disk":
            patched.setattr("dalle2_jax.runtime.metrics.save_png", fail)
        else:
            patched.setattr(validation.Validation, "__init__", begin_failing)
        for attempt in (1, 2):
            if fault == "a full disk":
                assert status(drawing(data, 5), workdir, patched) == checks.FAILED
                path = workdir / "samples" / f"samples_{attempt:08d}.png"
                assert f"No space left on device: '{path}'" in caplog.text
            else:
                with pytest.raises(jax.errors.JaxRuntimeError):
                    status(drawing(data, 5), workdir, patched)
            assert steps_of(workdir) == list(range(1, attempt + 1)) == committed[-1]
    assert status(drawing(data, 3), workdir, monkeypatch) == 0 and len(sampled(workdir, 3)) == 8


# Clocks


def test_a_clock_that_jumps_changes_nothing(data, whole, workdir, monkeypatch):
    """It jumps by days at each look for two steps, and is set back by ten years before the resumption."""
    now, told, years = time.time, [], 10 * 365 * 86400

    def jumping():
        if len(logged(workdir, "train/loss")) < 2:
            told.append(None)
            return now() + (-1) ** len(told) * 86400 * (len(told) % 7)
        return now()

    with monkeypatch.context() as patched:
        patched.setattr(time, "time", jumping)
        assert status(config(data, 4, checkpoint_every=4), workdir, patched) == 0
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() - years)
        damage(workdir, 4)
        assert status(config(data, 4), workdir, patched) == checks.FAILED  # no other checkpoint is whole
        shutil.copytree(whole / "checkpoints" / "2", workdir / "checkpoints" / "2")
        assert status(config(data, 8), workdir, patched) == 0
    assert len(told) > 20
    assert_same(stored_state(whole, 8), stored_state(workdir, 8))


# Machines


def wait_for(condition, process, workdir, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = open(f"{workdir}.log").read()
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_9_at_any_time_goes_on_from_the_last_committed_step(data, workdir):
    """Five runs without end, one checkpoint a step, are killed at a random time; a sixth equals one that was
    left alone."""
    chance, left, killed_at = random.Random(0), 0, []
    for _ in range(5):
        before = len(steps_of(workdir))
        process = tiny_run.start(workdir, data, num_steps=10**6)
        try:
            wait_for(lambda before=before: len(steps_of(workdir)) > before, process, workdir)
            time.sleep(chance.uniform(0, 0.2))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        killed_at.append(steps_of(workdir)[-1])
        left += any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
    assert left >= 1, "no kill came while a checkpoint was written"
    end = killed_at[-1] + 3
    for folder in (workdir, workdir.with_name("alone")):
        process = tiny_run.start(folder, data, num_steps=end, checkpoint_every=end)
        assert process.wait(timeout=120) == 0, open(f"{folder}.log").read()
    assert_same(stored_state(workdir.with_name("alone"), end), stored_state(workdir, end))
    losses = [logged(folder, "train/loss") for folder in (workdir, workdir.with_name("alone"))]
    assert losses[0] == losses[1] and len(losses[0]) == end
    said = open(f"{workdir}.log").read()
    assert [f"steps {step} -> " in said for step in killed_at] == [True] * 5
    assert not [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_on_other_devices_it_goes_on_with_the_same_batches(data, whole, workdir, processes, monkeypatch):
    """Four steps on eight devices that split the parameters, two on one or two others, two on eight: what
    eight steps on eight devices give, to 1e-5. A batch that came twice or never would show in the losses."""
    mesh = dict(data=2, fsdp=4, tensor=1)
    assert status(config(data, 4, mesh=mesh), workdir, monkeypatch) == 0
    started = tiny_run.start_together(processes, workdir, data, num_steps=6)
    try:
        assert [p.wait(timeout=120) for p in started] == [0] * processes, open(f"{workdir}.log").read()
    finally:
        for process in started:
            process.kill()
    assert f"mesh {dict(data=processes, fsdp=1, tensor=1)}, steps 4 -> 6" in open(f"{workdir}.log").read()
    assert status(config(data, 8), workdir, monkeypatch) == 0
    expected, found = (logged(folder, "train/loss") for folder in (whole, workdir))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 8
    expected, found = stored_state(whole, 8), stored_state(workdir, 8)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("ended", "code", "at"),
    [("by SIGTERM", 0, 6), ("by an error", checks.FAILED, 4), ("at its last step", 0, 5)],
)
def test_a_run_that_ends_while_it_is_profiled_leaves_the_profile_and_goes_on(
    data, whole, workdir, monkeypatch, ended, code, at
):
    """Steps 3 to 7 of eight are profiled; something comes with the batch of step 6."""
    profiled, struck = dict(profile_at=3, profile_steps=5), []

    def strike(step):
        if step == 6 and ended != "at its last step":
            struck.append(ended)
            if ended == "by an error":
                raise OSError("the data is gone")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # until the watching thread has heard
        return False

    with monkeypatch.context() as patched:
        tiny_run.poison(patched, strike)
        num_steps = 5 if ended == "at its last step" else 8
        assert status(config(data, num_steps, **profiled), workdir, patched) == code
    assert struck == ([ended] if num_steps == 8 else []) and steps_of(workdir)[-1] == at
    (profile,) = (workdir / "profile").rglob("*.xplane.pb")
    assert profile.stat().st_size > 0
    assert status(config(data, 8, **profiled), workdir, monkeypatch) == 0
    assert list((workdir / "profile").rglob("*.xplane.pb")) == [profile]  # its first step was done
    assert_same(stored_state(whole, 8), stored_state(workdir, 8))


def test_a_second_sigterm_ends_at_once_even_in_the_middle_of_a_computation(tmp_path):
    """The first one waits, here for a hash that takes a minute and does not let Python's handlers run.

    What comes in the same moment is no second one: Ctrl-C reaches training and a launcher that passes it on.
    """
    code = (
        "import hashlib; from dalle2_jax.train import stopping; stopping.Interrupted();"
        "print('ready', flush=True);"
        "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"
    )
    with open(tmp_path / "log", "w+") as log:
        process = tiny_run.launch([sys.executable, "-c", code], log.name, 1)
        try:
            while "ready" not in log.read():
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            while "again to stop at once" not in log.read():
                assert process.poll() is None
                time.sleep(0.01)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=stopping.SAME_MOMENT)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=2) == 128 + signal.SIGTERM
        finally:
            process.kill()


# All of them together


class Interrupted200:
    """A run of 200 steps of an upsampler's preset `debug` on two devices, a checkpoint each ten, and what
    strikes it. A strike waits for a moment, strikes, and asserts that the run felt it."""

    def __init__(self, folder, data, steps: int = 200):
        self.folder, self.workdir, self.data, self.steps = folder, folder / "run", data, steps
        self.chance = random.Random(5)

    def start(self, before=()):
        settings = dict(num_steps=self.steps, checkpoint_every=10, keep_checkpoints=0, log_every=1)
        settings |= dict(eval_every=10**6, sample_every=10**6) | {
            "data.source": "tar",
            "data.path": self.data,
            "data.split": "",
            "data.eval_split": "",
            "data.max_bad_fraction": 0.0,  # a record that cannot be used stops the run before it is replaced
        }
        command = [*before, sys.executable, "-m", "dalle2_jax.train"]
        command += ["--config=configs/upsampler256.py:debug"]
        command += [f"--workdir={self.workdir}", *(f"--config.{n}={v}" for n, v in settings.items())]
        return tiny_run.launch(command, f"{self.workdir}.log", devices=2)

    def said(self) -> str:
        with open(f"{self.workdir}.log") as log:
            return log.read()

    def run_for_a_while(self, process) -> None:
        """Until the run is 6 to 18 steps beyond its last checkpoint, and part of a step."""
        before, more = len(self.said().split("compiled the train step")), self.chance.randint(6, 18)
        committed = max(steps_of(self.workdir), default=0)

        def far_enough():
            compiled = len(self.said().split("compiled the train step")) > before
            return compiled and max(logged(self.workdir, "train/loss"), default=0) >= committed + more

        (self.workdir / "metrics.jsonl").unlink(missing_ok=True)  # so that its lines are this leg's
        wait_for(far_enough, process, self.workdir, seconds=300)
        time.sleep(self.chance.uniform(0, 0.2))

    def kill(self):
        process = self.start()
        self.run_for_a_while(process)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    def terminate(self):
        process = self.start()
        self.run_for_a_while(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert f"stopped at step {max(steps_of(self.workdir))}, saved" in self.said()

    def fill_the_disk(self):
        process = self.start()
        self.run_for_a_while(process)
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (150_000, hard))
        assert process.wait(timeout=300) == checks.FAILED
        assert "a checkpoint could not be written" in self.said().splitlines()[-1]

    def spoil_a_record(self):
        process, shard = self.start(), self.data / "00000.tar"
        whole = shard.read_bytes()
        self.run_for_a_while(process)
        with shard.open("r+b") as file:  # in place: the run has it open
            for at in range(0, len(whole), 4096):
                file.seek(at)
                file.write(bytes(2048))
        try:
            assert process.wait(timeout=300) == checks.FAILED
        finally:
            shard.write_bytes(whole)
        assert "above data.max_bad_fraction=0.0" in self.said().splitlines()[-1]

    def move_to_one_core(self):
        """The same devices, but fewer cores that compute them, as after a move to another machine."""
        process = self.start(before=("taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))))
        self.run_for_a_while(process)
        assert len(os.sched_getaffinity(process.pid)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0


@pytest.mark.slow
def test_ten_interruptions_change_nothing(tmp_path):
    """200 steps, interrupted ten times at random: parameters, average and optimizer are to the bit those of
    200 steps that nothing interrupted."""
    pictures = [made.encode(made.noise_picture((64, 64), n)) for n in range(60)]
    (tmp_path / "data").mkdir()
    members = [m for n, picture in enumerate(pictures) for m in made.sample(n, image=picture)]
    made.write_tar(tmp_path / "data" / "00000.tar", members)
    alone = Interrupted200(tmp_path / "alone", tmp_path / "data")
    struck = Interrupted200(tmp_path, tmp_path / "data")
    (tmp_path / "alone").mkdir()
    process = alone.start()
    assert process.wait(timeout=1200) == 0, alone.said()
    strikes = [struck.kill] * 3 + [struck.terminate] * 2 + [struck.fill_the_disk] * 2
    strikes += [struck.spoil_a_record] * 2
    strikes += [struck.move_to_one_core if shutil.which("taskset") else struck.terminate]
    struck.chance.shuffle(strikes)
    for strike in strikes:
        before = max(steps_of(struck.workdir), default=0)
        strike()
        print(strike.__name__, before, "->", max(steps_of(struck.workdir), default=0), flush=True)
    assert len(strikes) == 10 and 50 < max(steps_of(struck.workdir)) < 200
    process = struck.start()
    assert process.wait(timeout=1200) == 0, struck.said()
    one, other = stored_state(alone.workdir, 200), stored_state(struck.workdir, 200)
    assert len(one) > 100
    assert_same(one, other)

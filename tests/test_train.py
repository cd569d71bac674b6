"""The loop: exact resume, the same on other device counts, clear refusals, and an interruption that loses
nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import upsampler256
from dalle2_jax.models import models
from dalle2_jax.runtime import partition
from dalle2_jax.train import checks, lock, loop, validation
from dalle2_jax.train.run import started_from
from tests import tiny_run
from tests.tiny_run import ROOT, assert_same, logged, stored_state

pytestmark = pytest.mark.usefixtures("one_device")


def recipe(num_steps: int, **changes) -> dict:
    """The debug preset of the first upsampler (it needs no CLIP), of one level, for `num_steps` steps, one
    checkpoint a step."""
    config = upsampler256.get_config("debug")
    config.model.channel_mult = (1,)
    config.update(
        num_steps=num_steps, checkpoint_every=1, eval_every=100, sample_every=100, keep_checkpoints=10
    )
    config.update(**changes)
    return models.to_plain(config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(recipe(4), str(workdir))
    return workdir


def test_four_steps_equal_two_a_stop_and_two(four_steps, tmp_path):
    loop.train(recipe(2), str(tmp_path))
    between = stored_state(tmp_path, 2)
    loop.train(recipe(4), str(tmp_path))
    whole = stored_state(four_steps, 4)
    assert len(whole) > 100
    assert_same(whole, stored_state(tmp_path, 4))
    assert any((between[name] != whole[name]).any() for name in whole if "params" in name)
    # The loss of the third step is that of the third batch: the data went on where it was, not from the
    # start.
    assert logged(four_steps, "train/loss") == logged(tmp_path, "train/loss")


def test_a_finished_run_does_nothing(four_steps):
    before = sorted(path.name for path in (four_steps / "checkpoints").iterdir())
    loop.train(recipe(4), str(four_steps))
    assert sorted(path.name for path in (four_steps / "checkpoints").iterdir()) == before


def test_another_config_on_resume_is_refused_with_the_differences(four_steps):
    changed = recipe(4)
    changed["model"]["channels"] = 32
    changed["optim"]["learning_rate"] = 0.5
    with pytest.raises(ValueError, match=r"model.channels: 16 in the workdir, 32 now") as error:
        loop.train(changed, str(four_steps))
    assert "optim.learning_rate" in str(error.value)


@pytest.mark.slow  # test_faults.py has the setting, test_unet.py the gradients
def test_remat_is_free_and_changes_rounding_alone(four_steps, tmp_path):
    """Two steps with 'products', as if the config were one of version 0.1 with True, and two without."""
    shutil.copytree(four_steps, tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    changed = recipe(4)
    assert changed["model"]["remat"] == "products"
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["model"]["remat"] = True
    (tmp_path / "config.json").write_text(json.dumps(stored))
    changed["model"]["remat"] = "none"
    loop.train(changed, str(tmp_path))
    expected, found = stored_state(four_steps, 4), stored_state(tmp_path, 4)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_misspelt_settings_are_named_with_the_nearest(tmp_path):
    for names, message in (
        (("num_stepz",), r"config.num_stepz is not a setting; did you mean config.num_steps\?"),
        (("tokenizer", "vocab"), r"tokenizer.vocab is not a setting; did you mean tokenizer.vocab_size\?"),
        (("model", "channel"), r"model.channel is not a setting; did you mean model.channels\?"),
        (("optim", "beta"), "optim.beta is not a setting"),
        (("data", "paht"), r"data.paht is not a setting; did you mean data.path\?"),
        (("mesh", "fdsp"), r"mesh.fdsp is not a setting; did you mean mesh.fsdp\?"),
    ):
        config = recipe(1)
        place = config
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = 3
        with pytest.raises(ValueError, match=message):
            loop.train(config, str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"optim.warmup_steps=2 must be in \[0, num_steps=1\)"):
        loop.train(recipe(1, optim=dict(warmup_steps=2)), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert set(recipe(1)) == set(checks.SETTINGS)


def run_command(workdir, *overrides: str, devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-m",
        "dalle2_jax.train",
        "--config=configs/upsampler256.py:debug",
        "--config.model.channel_mult=(1,)",
        f"--workdir={workdir}",
    ]
    return subprocess.Popen(
        command + list(overrides),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow  # test_meshes.py compares stages on one device and several, test_faults.py whole runs
def test_one_device_trains_like_eight(four_steps, tmp_path):
    process = run_command(tmp_path, "--config.num_steps=4", "--config.checkpoint_every=4", devices=8)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    one, eight = logged(four_steps, "train/loss"), logged(tmp_path, "train/loss")
    assert one.keys() == eight.keys() == {1, 2, 3, 4}
    for step in one:
        assert one[step] == pytest.approx(eight[step], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(data=dict(path="debug_46")), "debug_64"),
        (dict(mesh=dict(data=-1, fsdp=1, tensor=3)), "mesh"),
        (dict(init_from="nowhere"), "nowhere"),
    ],
)
def test_impossible_settings_stop_at_once(changes, said, tmp_path, monkeypatch, caplog):
    settings = recipe(1)
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    assert tiny_run.run_main(settings, tmp_path / "work", monkeypatch.setattr) == checks.FAILED
    assert said in caplog.text and "compiled the train step" not in caplog.text


@pytest.mark.parametrize(
    ("flag", "said"), [("--config.model.chanels=8", "chanels"), ("--config.batch_size=7", "batch_size")]
)
def test_impossible_flags_stop_the_command(flag, said, tmp_path):
    process = run_command(tmp_path / "work", flag, devices=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert said in output and "compiled the train step" not in output


def test_a_workdir_that_cannot_be_made_or_is_in_use_stops_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="workdir .*file/work cannot be written"):
        loop.train(recipe(1), str(tmp_path / "file" / "work"))
    other = subprocess.Popen(["sleep", "60"])
    try:
        with monkeypatch.context() as patched:
            patched.setattr(lock.os, "getpid", lambda: other.pid)
            held = lock.Lock(tmp_path, beat=0.05)
        with pytest.raises(ValueError, match=f"being written by process {other.pid}"):
            loop.train(recipe(1), str(tmp_path))
        held.release()
    finally:
        other.kill()


def test_sigterm_saves_and_ends_with_status_0(data, tmp_path):
    workdir = tmp_path / "run"
    process = tiny_run.start(workdir, data, num_steps=100_000, checkpoint_every=100_000)
    said = Path(f"{workdir}.log")
    deadline = time.monotonic() + 240
    while not logged(workdir, "train/loss"):
        assert time.monotonic() < deadline and process.poll() is None, said.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0 and "run the same command to go on" in said.read_text()
    assert tiny_run.steps_of(workdir) == [max(logged(workdir, "train/loss"))]


def test_validation_measures_the_average_and_samples_from_it(data, tmp_path, monkeypatch):
    passed = {}

    def keep(name):
        def method(self, params, *rest):
            passed[name] = partition.to_host(params)
            return {}

        return method

    for name in ("losses", "samples"):
        monkeypatch.setattr(validation.Validation, name, keep(name))
    assert tiny_run.status(tiny_run.config(data, 2), tmp_path, monkeypatch) == 0
    stored = stored_state(tmp_path, 2)
    for params in (passed["losses"], passed["samples"]):
        for layer in ("fc1", "fc2"):
            path = f"['{layer}']['kernel']"
            np.testing.assert_array_equal(params[layer]["kernel"], stored[f"['ema_params']{path}"])
            assert (params[layer]["kernel"] != stored[f"['params']{path}"]).any()


def test_init_from_starts_from_the_parameters(data, tmp_path, monkeypatch):
    source = tiny_run.whole_run(data, 2, tmp_path / "source")
    settings = tiny_run.config(data, 1, init_from=str(source))
    settings["optim"]["learning_rate"] = 1e-9
    assert tiny_run.status(settings, tmp_path / "run", monkeypatch) == 0
    before, after = stored_state(source, 2), stored_state(tmp_path / "run", 1)
    for layer in ("['fc1']['kernel']", "['fc2']['kernel']"):
        average = before[f"['ema_params']{layer}"]
        assert (average != before[f"['params']{layer}"]).any()
        np.testing.assert_allclose(after[f"['params']{layer}"], average, atol=1e-6)


def test_parameters_that_a_start_lacks_begin_fresh_and_others_must_fit():
    fresh = {"net": {"a": {"kernel": np.zeros(3)}, "new": {"kernel": np.zeros(2)}}}
    loaded = {"net": {"a": {"kernel": np.ones(3)}}}
    started = started_from("before", loaded, fresh)
    np.testing.assert_array_equal(started["net"]["a"]["kernel"], 1)
    np.testing.assert_array_equal(started["net"]["new"]["kernel"], 0)
    for other in ({"kernel": np.ones(4)}, {"kernel": np.ones(3), "bias": np.ones(3)}):
        with pytest.raises(ValueError, match="before and the model do not fit"):
            started_from("before", {"net": {"a": other}}, fresh)

"""Steps that are not finite in a run whose log looks at them now and then; test_state.py has the step."""

import json
import shutil

import numpy as np
import pytest

from dalle2_jax.runtime import checkpoint
from tests import tiny_run
from tests.tiny_run import config, logged, status, stored_state

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.shards(tmp_path_factory.mktemp("data"))


def test_one_bad_step_between_lines_of_the_log_leaves_a_trace(data, tmp_path, monkeypatch, caplog):
    """The count survives an interruption."""
    workdir = tmp_path / "run"
    settings = dict(log_every=5, checkpoint_every=5)
    with monkeypatch.context() as patched:
        assert tiny_run.poison(patched, lambda step: step in (2, 4, 7)) == []
        assert status(config(data, 5, **settings), workdir, patched) == 0
        assert "2 steps up to step 5 were not finite and changed nothing; 2 in the whole run" in caplog.text
        assert status(config(data, 15, **settings), workdir, patched) == 0
    assert "1 steps up to step 10 were not finite and changed nothing; 3 in the whole run" in caplog.text
    assert logged(workdir, "train/bad_steps") == {5: 0, 10: 0, 15: 0}
    assert logged(workdir, "train/bad_total") == {5: 2, 10: 3, 15: 3}
    assert "up to step 15" not in caplog.text


def test_a_streak_that_ends_before_a_line_of_the_log_stops_the_run(data, tmp_path, monkeypatch, caplog):
    """A line, which a checkpoint has too: what is saved has nothing that was not told, wherever a run is
    killed."""
    workdir, settings = tmp_path / "run", dict(log_every=20, checkpoint_every=7)
    with monkeypatch.context() as patched:
        read = tiny_run.poison(patched, lambda step: 3 < step < 13)
        assert status(config(data, 40, **settings), workdir, patched) == 3
    assert "8 steps in a row had a loss or gradient that is not finite (step 11)" in caplog.text
    noted = json.loads((workdir / "bad_steps.json").read_text())
    assert noted["records"] == {str(step): read[step - 1] for step in range(4, 12)}
    assert noted["scalars"]["train/bad_steps"] == 0 and noted["scalars"]["train/bad_total"] == 9
    assert tiny_run.steps_of(workdir) == [7]  # the checkpoint of step 14 would have counted the streak
    # With the data mended the run goes on from the middle of the streak.
    assert logged(workdir, "train/bad_steps")[7] == 4
    assert status(config(data, 40, **settings), workdir, monkeypatch) == 0
    assert logged(workdir, "train/bad_streak")[40] == 0


class Killed(BaseException):
    """Stands for kill -9: nothing of the loop comes after it but that a save which has begun is committed."""


def test_bad_steps_of_a_run_that_is_killed_before_a_line_were_told(data, tmp_path, monkeypatch, caplog):
    """The last checkpoint, from which it goes on, counts them."""
    workdir, settings = tmp_path / "run", dict(log_every=20, checkpoint_every=4)

    def is_bad(step):
        if step == 7:
            raise Killed
        return step in (2, 3)

    with monkeypatch.context() as patched:
        tiny_run.poison(patched, is_bad)
        with pytest.raises(Killed):
            status(config(data, 40, **settings), workdir, patched)
    assert tiny_run.steps_of(workdir) == [4]
    assert "2 steps up to step 4 were not finite and changed nothing; 2 in the whole run" in caplog.text
    caplog.clear()
    assert status(config(data, 24, **settings), workdir, monkeypatch) == 0
    assert logged(workdir, "train/bad_total")[20] == 2 and "not finite" not in caplog.text


def test_what_the_error_of_a_streak_advises_can_be_done(data, tmp_path, monkeypatch, caplog):
    """Lower optim.learning_rate or set optim.grad_clip, and go on with --allow_changed=optim."""
    unclipped = config(data, 30, log_every=4, checkpoint_every=3)
    unclipped["optim"]["grad_clip"] = 0.0
    first = tmp_path / "first"
    with monkeypatch.context() as patched:
        tiny_run.poison(patched, lambda step: step > 3)
        assert status(unclipped, first, patched) == 3
    assert (
        "lower optim.learning_rate or set optim.grad_clip and go on with --allow_changed=optim" in caplog.text
    )
    for setting, value, allowed in (
        ("learning_rate", 1e-3, "optim"),
        ("learning_rate", 1e-3, "optim.learning_rate"),
        ("grad_clip", 0.5, "optim.grad_clip"),
        ("weight_decay", 0.1, "optim.weight_decay"),
    ):
        workdir = tmp_path / f"{setting} {allowed}"
        shutil.copytree(first, workdir)
        changed = unclipped | dict(num_steps=12, optim=unclipped["optim"] | {setting: value})
        caplog.clear()
        assert status(changed, workdir, monkeypatch) == 2
        assert f"by --allow_changed=optim.{setting}:\n  optim.{setting}: " in caplog.text
        before = stored_state(workdir, 9)
        assert status(changed, workdir, monkeypatch, [allowed]) == 0
        assert f"changed from step 9 on, as allowed: optim.{setting}: " in caplog.text
        assert json.loads((workdir / "config.json").read_text())["optim"][setting] == value
        (entry,) = json.loads((workdir / "changes.json").read_text())["changes"]
        was = unclipped["optim"][setting]
        assert entry == dict(step=9, name=f"optim.{setting}", before=was, now=value)
        assert logged(workdir, "train/bad_total")[12] == 6  # 4 to 9
        assert any(
            (
                checkpoint.restore_subtree(workdir, "params", 12)["fc1"]["kernel"]
                != before["['params']['fc1']['kernel']"]
            ).flat
        )
        # The same command goes on with it, and so does one without the flag.
        assert status(changed | dict(num_steps=13), workdir, monkeypatch, [allowed]) == 0
        assert status(changed | dict(num_steps=14), workdir, monkeypatch) == 0


def test_a_changed_optimizer_goes_on_with_its_moments(data, tmp_path, monkeypatch):
    """Clipping at a norm that no gradient has changes nothing but the names of the optimizer's leaves: the
    state is that of a run without, to rounding, whether clipping begins or ends."""
    plain = config(data, 8)
    plain["optim"]["grad_clip"] = 0.0
    clipped = plain | dict(num_steps=6, optim=plain["optim"] | dict(grad_clip=1e6))
    assert status(plain, tmp_path / "plain", monkeypatch) == 0
    assert status(plain | dict(num_steps=3), tmp_path / "other", monkeypatch) == 0
    for settings in (clipped, plain):
        step = settings["num_steps"]
        assert status(settings, tmp_path / "other", monkeypatch, ["optim.grad_clip"]) == 0
        one, other = (stored_state(tmp_path / name, step) for name in ("plain", "other"))
        if settings is clipped:
            assert "['opt_state']['1']['0']['count']" in other
            other = {
                name.replace("['opt_state']['1']", "['opt_state']"): leaf for name, leaf in other.items()
            }
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_rule_for_spikes_may_begin_later(data, tmp_path, monkeypatch):
    assert status(config(data, 2), tmp_path, monkeypatch) == 0
    assert status(config(data, 4, spike_sigma=6.0), tmp_path, monkeypatch, ["spike_sigma"]) == 0
    assert checkpoint.restore_subtree(tmp_path, "spikes", 4)["known"] == 2

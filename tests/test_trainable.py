"""Training of some parameters: what rests has no state, lies in the workdir, and is part of the model."""

import shutil

import jax
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.runtime import checkpoint, modeldir
from dalle2_jax.train import checks
from tests import tiny_run
from tests.tiny_run import assert_same, config, stored_state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run of all parameters, two steps."""
    return tiny_run.whole_run(data, 2, tmp_path_factory.mktemp("begun") / "run")


def settings(data, begun, steps, **changes):
    return config(data, steps, init_from=str(begun), trainable=("fc2",), **changes)


def load(workdir, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(models, "build_stage", lambda config: tiny_run.Tiny())
        return models.load_stage(workdir, "upsampler")[2]


def test_what_rests_has_no_state_and_is_the_models(data, begun, tmp_path, monkeypatch):
    for steps in (2, 4):
        assert tiny_run.status(settings(data, begun, steps), tmp_path / "parts", monkeypatch) == 0
    assert tiny_run.status(settings(data, begun, 4, grad_accum=1), tmp_path / "whole", monkeypatch) == 0
    state = stored_state(tmp_path / "whole", 4)
    assert_same(state, stored_state(tmp_path / "parts", 4))
    assert not any("fc1" in name for name in state) and any("fc2" in name for name in state)
    start, tuned = (modeldir.flatten(load(path, monkeypatch)) for path in (begun, tmp_path / "whole"))
    assert start.keys() == tuned.keys() == {"fc1/kernel", "fc2/kernel"}
    np.testing.assert_array_equal(start["fc1/kernel"], tuned["fc1/kernel"])
    assert (start["fc2/kernel"] != tuned["fc2/kernel"]).any()
    average = checkpoint.restore_ema_params(tmp_path / "whole")
    np.testing.assert_array_equal(average["fc2"]["kernel"], tuned["fc2/kernel"])


def test_trained_parameters_are_those_of_a_run_of_all_at_its_first_step(data, begun, tmp_path, monkeypatch):
    """Without clipping, whose norm is that of all gradients."""
    optim = dict(learning_rate=1e-2, warmup_steps=0, grad_clip=0.0)
    every = config(data, 1, init_from=str(begun))
    for made, name in ((every, "every"), (settings(data, begun, 1), "some")):
        made["optim"] |= optim
        assert tiny_run.status(made, tmp_path / name, monkeypatch) == 0
    of_all, of_some = (stored_state(tmp_path / name, 1) for name in ("every", "some"))
    for name, leaf in of_some.items():
        if name in of_all:
            np.testing.assert_allclose(leaf, of_all[name], rtol=1e-6, atol=1e-7)


def test_it_does_not_depend_on_where_it_began(data, begun, tmp_path, monkeypatch, caplog):
    """`init_from` may be lost later; the resting parameters of the workdir may not change."""
    start, workdir = tmp_path / "start", tmp_path / "run"
    shutil.copytree(begun, start)
    assert tiny_run.status(settings(data, start, 2), workdir, monkeypatch) == 0
    for step in (1, 2):
        for leaf in (start / "checkpoints" / str(step) / "state").rglob("*"):
            leaf.is_file() and leaf.write_bytes(b"")
    assert tiny_run.status(settings(data, begun, 3), workdir, monkeypatch, ["init_from"]) == 0
    folder, (_, base) = workdir / "base", modeldir.load_stage(workdir / "base")
    modeldir.save_stage(folder, {}, jax.tree.map(lambda x: x + 1e-3, base), "float32")
    assert tiny_run.status(settings(data, begun, 4), workdir, monkeypatch) == checks.FAILED
    assert "base has changed: the sha256 of its parameters was" in caplog.text
    with pytest.raises(ValueError, match="base has changed"):
        load(workdir, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(init_from=""), "leaves parameters as they are: say where they come from, --config.init_from="),
        (dict(trainable=("fc3",)), "'fc3' matches no parameter"),
    ],
)
def test_settings_that_cannot_be_are_refused(data, begun, changes, message, tmp_path, monkeypatch, caplog):
    assert tiny_run.status(settings(data, begun, 2) | changes, tmp_path, monkeypatch) == checks.FAILED
    assert message in caplog.text


def test_a_run_of_all_parameters_does_not_go_on_with_some(data, begun, tmp_path, monkeypatch, caplog):
    shutil.copytree(begun, tmp_path / "run")
    assert tiny_run.status(settings(data, begun, 3), tmp_path / "run", monkeypatch) == checks.FAILED
    assert "--allow_changed=init_from,trainable" in caplog.text

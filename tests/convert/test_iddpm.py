"""Improved DDPM's networks equal torch modules in their layout."""

import jax
import numpy as np
import pytest

from dalle2_jax.convert import convert
from dalle2_jax.convert.formats import iddpm
from dalle2_jax.models import models

torch = pytest.importorskip("torch", reason="the oracle is in torch")

from tests.convert import torch_unet  # noqa: E402 (after torch is known to be there)

MODEL = dict(c_out=6, channels=64, mult=(1, 2, 2), depth=1, attends=(1, 2), by_convs=True)


def converted(model, source, out):
    torch.save(model.state_dict(), source)
    assert convert.main(["iddpm", str(source), str(out), "--dtype=float32"]) == 0


def compare(stage, params, model, sides, label=None, *others):
    """At times of T = 4000; `label` as the network reads it."""
    x = np.random.default_rng(1).normal(size=(2, *sides, 3)).astype(np.float32)
    t = np.array([7, 3900])
    conditions = {} if label is None else {"label": label}
    ours = jax.jit(stage.net.apply)({"params": params}, x, t, conditions, *others)
    seen = np.moveaxis(np.concatenate([x, *others], axis=-1), -1, 1).copy()
    scale = dict(stage.net.body)["style"].time_scale
    added = 0 if label is None else model.label_emb(torch.from_numpy(label))
    with torch.no_grad():
        theirs = model(torch.from_numpy(seen), torch.from_numpy(t * np.float32(scale)), added).numpy()
    assert theirs.std() > 1e-2
    np.testing.assert_allclose(ours, np.moveaxis(theirs, 1, -1), atol=1e-4 * np.abs(theirs).max())


def test_a_generator_of_scaled_times(tmp_path, monkeypatch):
    monkeypatch.setattr(iddpm, "FIRST_ATTENTION", 8)  # a side of 16
    monkeypatch.setitem(iddpm.RELEASED, ("decoder", 16, False), iddpm.RELEASED["decoder", 64, False])
    torch.manual_seed(0)
    model = torch_unet.UNet(3, num_heads=4, **MODEL).eval()
    converted(model, tmp_path / "a.pt", tmp_path / "out")
    stage, config, params = models.load_stage(tmp_path / "out", "decoder")
    assert config["model"]["net"]["time_scale"] == 0.25 and stage.diffusion.schedule.num_timesteps == 4000
    assert stage.diffusion.spacing == "adm"
    compare(stage, params, model, (16, 16))


def test_the_upsampler_with_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(iddpm, "FIRST_ATTENTION", 8)
    monkeypatch.setitem(iddpm.RELEASED, ("upsampler", 16, True), iddpm.RELEASED["upsampler", 256, True])
    torch.manual_seed(1)
    model = torch_unet.UNet(6, num_heads=4, classes=5, **MODEL).eval()
    converted(model, tmp_path / "a.pt", tmp_path / "out")
    stage, config, params = models.load_stage(tmp_path / "out", "upsampler16")
    assert "time_scale" not in config["model"]["net"] and config["model"]["low_res_size"] == 4
    low = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32)
    compare(stage, params, model, (16, 16), np.array([4, 1]), low)


def test_other_files_are_refused(tmp_path, capsys):
    adm = torch_unet.UNet(3, **{**MODEL, "by_convs": False})
    other = torch_unet.UNet(3, num_heads=4, **{**MODEL, "attends": (1,)}, classes=3)
    for model, message in ((adm, "it is ADM's (convert adm)"), (other, "of side 32 with 3 classes")):
        torch.save(model.state_dict(), tmp_path / "a.pt")
        assert convert.main(["iddpm", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err

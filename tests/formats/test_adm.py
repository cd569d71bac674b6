"""ADM's classifier equals a torch module in its layout; formats that are not read say why."""

import json

import jax
import numpy as np
import pytest

from dalle2_jax import convert, modeldir, models
from dalle2_jax.formats import refused

torch = pytest.importorskip("torch", reason="the oracle is in torch")

from tests.formats import torch_unet  # noqa: E402 (after torch is known to be there)

SIDE, CLASSES = 16, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(torch module, its file)."""
    torch.manual_seed(0)
    model = torch_unet.Classifier(SIDE, CLASSES, 128, (1, 2), 1, attends=(1,))
    path = tmp_path_factory.mktemp("adm") / "classifier.pt"
    torch.save(model.state_dict(), path)
    return model, path


def test_the_classifier_is_the_same(made, tmp_path):
    model, path = made
    (path.parent / "classes.txt").write_text("\n".join("abcde") + "\n")
    assert convert.main(["adm-classifier", str(path), str(tmp_path / "out"), "--dtype=float32"]) == 0
    stage, config, params = models.load_stage(tmp_path / "out", "classifier")
    assert config["data"]["classes"] == list("abcde")
    settings = dict(image_size=SIDE, num_res_blocks=1, channel_mult=[1, 2], attention_resolutions=[8])
    assert settings.items() <= config["model"].items() and config["model"]["schedule"] == "cosine"
    x = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    t = np.array([7, 900])
    ours = jax.jit(stage.net.apply)({"params": params}, x, t)
    theirs = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(t)).detach().numpy()
    assert theirs.std() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    index = modeldir.read_index(tmp_path / "out")
    assert not index["tokenizer"] and "MIT" in index["licence"]


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("only\nthree\nnames\n")
    state = made[0].state_dict()
    torch.save(state, tmp_path / "classifier.pt")
    arguments = ["adm-classifier", str(tmp_path / "classifier.pt"), str(tmp_path / "out")]
    assert convert.main(arguments) == 2
    assert "has 3 names, the classifier 5 classes" in capsys.readouterr().err
    (tmp_path / "classes.txt").unlink()
    del state["input_blocks.1.0.in_layers.0.bias"]
    state["middle_block.0.in_layers.2.weight"] = torch.zeros(256, 128, 3, 3)
    state["label_emb.weight"] = torch.zeros(5, 512)
    torch.save(state, tmp_path / "classifier.pt")
    assert convert.main(arguments) == 2
    said = capsys.readouterr().err
    for line in (
        "missing: input_blocks.1.0.in_layers.0.bias [128]",
        "surplus: label_emb.weight [5, 512]",
        "middle_block.0.in_layers.2.weight has [256, 128, 3, 3], the model expects [256, 256, 3, 3]",
    ):
        assert line in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", refused.REASONS)
def test_formats_that_are_not_read_say_why(name, capsys):
    assert convert.main([name, "somewhere", "out"]) == 2
    said = capsys.readouterr().err
    assert f"{name!r} cannot be read" in said and json.dumps(refused.REASONS[name])[1:40] in said

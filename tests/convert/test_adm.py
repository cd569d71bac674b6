"""ADM's networks equal torch modules in their layout; formats that are not read say why."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.convert import convert, tables
from dalle2_jax.convert.formats import adm, refused
from dalle2_jax.convert.tensors import Tensors
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir

torch = pytest.importorskip("torch", reason="the oracle is in torch")

from tests.convert import torch_files, torch_unet  # noqa: E402 (after torch is known to be there)

SIDE, CLASSES = 16, 5
SMALL, LARGE = 8, 32
# As 64x64_diffusion.pt, 64_256_upsampler.pt, and one without classes that begins as the 512 x 512 one does.
GENERATOR = dict(c_in=3, c_out=6, channels=128, mult=(1, 2), depth=1, attends=(0, 1), classes=CLASSES)
UPSAMPLER = dict(c_in=6, c_out=6, channels=128, mult=(1, 1, 2), depth=1, attends=(2,), classes=CLASSES)
PLAIN = dict(c_in=3, c_out=6, channels=256, mult=(0.5, 1), depth=1, attends=(0, 1))


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
    assert_same_classifier(stage, params, model)
    index = modeldir.read_index(tmp_path / "out")
    assert not index["stages"]["classifier"]["tokenizer"] and "MIT" in index["licence"]


def test_a_classifier_that_begins_with_64_channels(tmp_path):
    """As 512x512_classifier.pt: 32 groups of two channels at the first level."""
    torch.manual_seed(3)
    model = torch_unet.Classifier(SIDE, CLASSES, 128, (0.5, 1), 1, attends=(1,))
    torch.save(model.state_dict(), tmp_path / "classifier.pt")
    convert.convert_weights("adm-classifier", tmp_path / "classifier.pt", tmp_path / "out", dtype="float32")
    stage, config, params = models.load_stage(tmp_path / "out", "classifier")
    assert config["model"]["channel_mult"] == [0.5, 1]
    assert params["net"]["down_0_res_0"]["norm1"]["scale"].shape == (64,)
    assert_same_classifier(stage, params, model)


def assert_same_classifier(stage, params, model):
    x = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    t = np.array([7, 900])
    ours = jax.jit(stage.net.apply)({"params": params}, x, t)
    theirs = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(t)).detach().numpy()
    assert theirs.std() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("only\nthree\nnames\n")
    state = made[0].state_dict()
    torch.save(state, tmp_path / "classifier.pt")
    arguments = ["adm-classifier", str(tmp_path / "classifier.pt"), str(tmp_path / "out")]
    assert convert.main(arguments) == 2
    assert "has 3 names, the model 5 classes" in capsys.readouterr().err
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


@pytest.fixture
def small(monkeypatch):
    """ADM's facts about its models, for sides an eighth of theirs."""
    facts = {
        ("decoder", SMALL): adm.RELEASED["decoder", 64],
        ("upsampler", LARGE): adm.RELEASED["upsampler", 256],
    }
    monkeypatch.setattr(adm, "RELEASED", facts)
    monkeypatch.setattr(adm, "FIRST_ATTENTION", SMALL)


def assert_same(stage, params, theirs, sides, told, *others):
    x = np.random.default_rng(1).normal(size=(2, *sides, 3)).astype(np.float32)
    t, label = np.array([7, 900]), np.array([4, 1])
    ours = jax.jit(stage.net.apply)({"params": params}, x, t, told(label), *others)
    seen = np.moveaxis(np.concatenate([x, *others], axis=-1), -1, 1).copy()
    added = theirs.label_emb(torch.from_numpy(label)) if told(label) else 0
    expected = theirs(torch.from_numpy(seen), torch.from_numpy(t), added).detach().numpy()
    expected = np.moveaxis(expected, 1, -1)
    assert expected.std() > 1e-2
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_a_generator_with_its_upsampler_and_classifier(small, tmp_path):
    torch.manual_seed(1)
    generator = torch_unet.UNet(**GENERATOR, blocks=True)
    upsampler = torch_unet.UNet(**UPSAMPLER, num_heads=4)
    classifier = torch_unet.Classifier(SMALL, CLASSES, 128, (1, 2), 1, attends=(1,))
    for name, model in (("a", generator), ("b", upsampler), ("c", classifier)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    (tmp_path / "classes.txt").write_text("cat\ntabby cat\ndog\ngold fish\nfox\n")
    out = tmp_path / "out"
    assert convert.main(["adm", str(tmp_path), str(out), "--dtype=float32"]) == 0
    stage, config, params = models.load_stage(out, "decoder")
    settings = dict(image_size=SMALL, schedule="cosine", attention_resolutions=[8, 4], num_classes=CLASSES)
    settings |= dict(dropout=0.1, spacing="adm", process={"guide_rule": "adm"})
    assert settings.items() <= config["model"].items() and not stage.guidable
    assert_same(stage, params, generator, (SMALL, 12), lambda label: {"label": label})
    stage, config, params = models.load_stage(out, "upsampler")
    settings = dict(image_size=LARGE, low_res_size=SMALL, schedule="linear", num_heads=4, spacing="adm")
    assert settings.items() <= config["model"].items()
    low_res = np.random.default_rng(2).normal(size=(2, SMALL, SMALL, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(low_res, -1, 1).copy()), LARGE, mode="bilinear", align_corners=False
    )
    enlarged = np.asarray(stage.low_res.enlarge(low_res))
    np.testing.assert_allclose(enlarged, np.moveaxis(expected.numpy(), 1, -1), atol=1e-5)
    assert_same(stage, params, upsampler, (LARGE, LARGE), lambda label: {"label": label}, enlarged)

    model = pipeline.UnCLIP.load(out)
    how = dict(decoder_steps=2, upsampler_steps=[2])
    drawn = model.text_to_image(["a tabby cat", "some gold fish"], **how)
    assert drawn.images.shape == (2, LARGE, LARGE, 3) and list(drawn.timings) == ["decoder", "upsampler32"]
    swapped = model.text_to_image(["gold fish", "Tabby cat"], **how)
    assert np.abs(drawn.images - swapped.images[::-1].astype(int)).max() <= 1  # the class alone is read
    assert np.abs(drawn.images[0] - drawn.images[1].astype(int)).max() > 1
    steered, _ = model.decode(np.zeros((1, 0)), ["a dog"], num_steps=2, classifier=300.0)
    assert steered.shape == (1, SMALL, SMALL, 3)
    with pytest.raises(ValueError, match="'a horse' does not name exactly one class of the decoder"):
        model.text_to_image(["a horse"])
    with pytest.raises(ValueError, match="draws classes: give a caption that names one"):
        model.upsample(drawn.base)
    with pytest.raises(ValueError, match="never trained without its condition"):
        model.settings(guidance_scale=3.0)
    assert model.cut_captions(["a dog"]) == []


def test_a_generator_without_classes_draws_what_it_likes(small, tmp_path):
    theirs = torch_unet.UNet(**PLAIN, blocks=True)
    torch.save(theirs.state_dict(), tmp_path / "uncond.pt")
    convert.convert_weights("adm", tmp_path / "uncond.pt", tmp_path / "out", dtype="float32")
    stage, config, params = models.load_stage(tmp_path / "out", "decoder")
    assert config["model"]["channel_mult"] == [0.5, 1] and config["model"]["num_classes"] == 0
    assert_same(stage, params, theirs, (SMALL, SMALL), lambda label: {})
    model = pipeline.UnCLIP.load(tmp_path / "out")
    first, second = (model.text_to_image([said], decoder_steps=2).images for said in ("a cat", "a dog"))
    np.testing.assert_array_equal(first, second)
    assert "reads no captions" in model.cut_captions(["a cat"])[0]


def test_the_lsun_generators_have_dropout(monkeypatch, tmp_path):
    """The name of the file tells them from ImageNet's unconditional generator, whose tensors are alike."""
    monkeypatch.setattr(adm, "FIRST_ATTENTION", SMALL)
    state = torch_unet.UNet(**PLAIN | dict(channels=64, mult=(1, 1))).state_dict()
    names = ("lsun_bedroom", "lsun_cat", "lsun_horse", "256x256_diffusion_uncond")
    for name, dropout in zip(names, (0.1, 0.1, 0.1, 0.0), strict=True):
        torch.save(state, tmp_path / f"{name}.pt")
        convert.convert_weights("adm", tmp_path / f"{name}.pt", tmp_path / name, dtype="float32")
        stage, config, _ = models.load_stage(tmp_path / name, "decoder")
        assert config["model"]["dropout"] == dropout and not config["model"]["num_classes"]
        assert stage.diffusion.guide_rule == stage.diffusion.spacing == "adm"


def test_checkpoints_of_training_are_the_same_model(small, tmp_path):
    torch.manual_seed(1)
    (tmp_path / "plain").mkdir()
    parts = dict(
        a=torch_unet.UNet(**GENERATOR, blocks=True),
        b=torch_unet.UNet(**UPSAMPLER, num_heads=4),
        c=torch_unet.Classifier(SMALL, CLASSES, 128, (1, 2), 1, attends=(1,)),
    )
    for name, model in parts.items():
        torch.save(model.state_dict(), tmp_path / "plain" / f"{name}.pt")
    torch_files.wrap_folder(tmp_path / "plain", tmp_path / "wrapped")
    outs = {kind: tmp_path / f"{kind} out" for kind in ("plain", "wrapped")}
    for kind, out in outs.items():
        convert.convert_weights("adm", tmp_path / kind, out, dtype="float32")
        convert.convert_weights("adm-classifier", tmp_path / kind / "c.pt", out / "only", dtype="float32")
    found = torch_files.weights(outs["wrapped"])
    assert len(found) == 4 and found == torch_files.weights(outs["plain"])


def test_files_that_do_not_go_together_are_refused(small, tmp_path, capsys):
    state = torch_unet.UNet(**PLAIN).state_dict()
    for name in ("one", "two"):
        torch.save(state, tmp_path / f"{name}.pt")
    assert convert.main(["adm", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds two files for the decoder, two.pt is one too many" in capsys.readouterr().err
    state["input_blocks.0.0.weight"] = torch.zeros(128, 4, 3, 3)
    torch.save(state, tmp_path / "one.pt")
    assert convert.main(["adm", str(tmp_path / "one.pt"), str(tmp_path / "out")]) == 2
    assert "has 4 input channels: a generator has 3, an upsampler 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "side", "millions", "mult", "channels", "depth", "first", "facts"),
    [
        ("decoder", 64, 296, [1, 2, 3, 4], 192, 3, 1, dict(schedule="cosine")),
        ("decoder", 128, 422, [1, 1, 2, 3, 4], 256, 2, 2, dict(num_heads=4)),
        ("decoder", 256, 554, [1, 1, 2, 2, 4, 4], 256, 2, 3, {}),
        ("decoder", 512, 559, [0.5, 1, 1, 2, 2, 4, 4], 256, 2, 4, {}),
        ("upsampler256", 256, 312, [1, 1, 2, 2, 4, 4], 192, 2, 3, dict(num_heads=4, low_res_size=64)),
        ("upsampler512", 512, 309, [1, 1, 2, 2, 4, 4], 192, 2, 4, dict(low_res_size=128)),
    ],
)
def test_the_released_sizes_are_read_off_the_tensors(
    role, side, millions, mult, channels, depth, first, facts
):
    """The counts are those of ADM's tables."""
    attention = [side // 2**level for level in range(first, len(mult))]
    model = dict(image_size=side, channels=channels, channel_mult=mult, num_res_blocks=depth)
    model |= dict(attention_resolutions=attention, num_classes=1000, learned_variance=True)
    model |= dict(embed_dim=0) if role == "decoder" else {"low_res_size": side // 4}
    abstract = models.abstract_params(
        models.build_stage({"stage": role.rstrip("0123456789"), "model": model})
    )
    shapes = tables.expected_shapes(adm.rows(abstract), abstract)
    assert round(sum(np.prod(shape) for shape in shapes.values()) / 1e6) == millions
    found, (config, _) = adm._stage(Tensors("a file", shapes, None), Path("no classes"))
    assert found == role and (model | facts).items() <= config["model"].items()
    assert config["model"]["schedule"] == facts.get("schedule", "linear")
    assert config["data"]["classes"][207] == "class 207"


@pytest.mark.parametrize("name", refused.REASONS)
def test_formats_that_are_not_read_say_why(name, capsys):
    assert convert.main([name, "somewhere", "out"]) == 2
    said = capsys.readouterr().err
    assert f"{name!r} cannot be read" in said and json.dumps(refused.REASONS[name])[1:40] in said

"""FID's Inception: against one written in torch, through the whole way from a torch file to features."""

import hashlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from dalle2_jax.convert import convert, inception_weights, torch_legacy
from dalle2_jax.evaluate import features, inception
from dalle2_jax.runtime import modeldir, partition


def pictures(count, size=64, seed=0):
    """uint8 [N, size, size, 3] of smooth colours, each quite unlike the others."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 5, 5, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.BICUBIC)) for p in coarse])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the comparison needs torch")


@pytest.fixture(scope="module")
def theirs(torch):
    from tests.evaluate.torch_inception import random_inception

    return random_inception()


@pytest.fixture(scope="module")
def weights(torch, theirs, tmp_path_factory):
    """The random network, saved by torch as it did before version 1.6, converted by the command."""
    folder = tmp_path_factory.mktemp("inception")
    source, out = folder / "old.pth", folder / "inception.safetensors"
    torch.save(theirs.state_dict(), source, _use_new_zipfile_serialization=False)
    assert convert.main(["inception", str(source), str(out), "--any_checksum"]) == 0
    loaded = inception_weights.load(out)
    assert loaded.source_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert loaded.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    return loaded


def test_features_are_those_of_torch(torch, theirs, weights):
    """On two devices, the second batch not full."""
    images = np.stack([inception.prepare(picture) for picture in pictures(3)])
    mesh = partition.make_mesh(devices=jax.devices()[:2])
    before, run = features.inception_extractor(weights, "ttur", 2, mesh)
    ours = run([before(picture) for picture in pictures(3)])
    with torch.no_grad():
        expected = theirs(torch.tensor(images).permute(0, 3, 1, 2))
    shapes = {"pool": 2048, "spatial": 17 * 17 * 7, "logits": 1008, "logits_unbiased": 1008}
    assert {name: value.shape for name, value in ours.items()} == {n: (3, d) for n, d in shapes.items()}
    for name, value in expected.items():
        value = value.numpy()
        spread = value.std(axis=0).mean()
        assert spread > 0.05 * np.abs(value).mean(), f"{name} is the same for every picture"
        error = np.abs(ours[name] - value).max() / np.abs(value).max()
        print(f"{name}: relative error {error:.1e}, spread {spread:.2f}")
        assert error < 1e-5, name


def test_new_files_of_torch_give_the_same_weights(torch, theirs, weights, tmp_path):
    state = theirs.state_dict()
    torch.save(state, tmp_path / "new.pth")
    assert (
        convert.main(["inception", *(str(tmp_path / n) for n in ("new.pth", "out")), "--any_checksum"]) == 0
    )
    again = modeldir.flatten(inception_weights.load(tmp_path / "out").params)
    for name, value in modeldir.flatten(weights.params).items():
        np.testing.assert_array_equal(again[name], value)
    del state["Mixed_6d.branch1x1.bn.weight"]
    with pytest.raises(ValueError, match="lacks 1 tensors, among them Mixed_6d.branch1x1.bn.weight"):
        inception_weights.from_state_dict({name: value.numpy() for name, value in state.items()})
    state = theirs.state_dict() | {"AuxLogits.fc.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="1 tensors too many, among them AuxLogits"):
        inception_weights.from_state_dict({name: value.numpy() for name, value in state.items()})


def test_another_file_is_refused(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"not weights")
    assert convert.main(["inception", str(tmp_path / "x.pth"), str(tmp_path / "out")]) == 2
    assert "sha256" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert convert.main(["inception", str(tmp_path / "x.pth"), str(tmp_path / "out"), "--any_checksum"]) == 2
    assert "no file of weights that torch wrote" in capsys.readouterr().err
    assert convert.main(["inception", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    with pytest.raises(ValueError, match="convert the released weights once"):
        inception_weights.load(tmp_path / "x.pth")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="missing: Conv2d_1a_3x3/bias"):
        inception_weights.load(tmp_path / "other.safetensors")


# Files of old torch


@pytest.fixture(scope="module")
def old_file(torch, tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "x.pth"
    base = torch.arange(12, dtype=torch.float32)
    tree = {
        "turned": base.reshape(3, 4).T,
        "part": base[5:7],
        "inner": {"half": torch.tensor([1.5, 2.0], dtype=torch.float16), "count": torch.tensor(7)},
        "empty": torch.zeros(0, 3),
    }
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    return path


def test_old_files_are_read(old_file):
    found = torch_legacy.read_legacy(old_file)
    np.testing.assert_array_equal(found["turned"], np.arange(12, dtype=np.float32).reshape(3, 4).T)
    np.testing.assert_array_equal(found["part"], [5, 6])
    np.testing.assert_array_equal(found["inner.half"], np.array([1.5, 2], np.float16))
    assert found["inner.count"].shape == () and found["inner.count"] == 7
    assert found["empty"].shape == (0, 3)


def test_cut_files_are_refused(old_file, tmp_path):
    data = old_file.read_bytes()
    for length in (0, 10, len(data) // 3, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated"):
            torch_legacy.read_legacy(tmp_path / "cut")


def test_a_file_that_would_run_something_runs_nothing(torch, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    torch.save({"a": torch.zeros(2), "b": Evil()}, tmp_path / "x", _use_new_zipfile_serialization=False)
    assert list(torch_legacy.read_legacy(tmp_path / "x")) == ["a"]
    assert not (tmp_path / "made").exists()


# Resizing


def test_bilinear_is_linear_between_grid_points():
    ramp = np.arange(8, dtype=np.uint8)[None, :, None] * np.ones((3, 1, 3), np.uint8)
    found = inception.bilinear(ramp, 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, :, 0], np.minimum(np.arange(16) / 2, 7))
    np.testing.assert_allclose(found[:, 5], found[:1, 5].repeat(16, 0))
    np.testing.assert_array_equal(inception.bilinear(ramp[:, :3], 3), ramp[:, :3])


@pytest.mark.parametrize("size", [64, 256, 299, 512])
def test_bilinear_is_torchs(torch, size):
    picture = np.random.default_rng(size).integers(0, 256, (size, size + 7, 3)).astype(np.uint8)
    tensor = torch.tensor(picture).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(tensor, (299, 299), mode="bilinear", align_corners=False)
    ours = inception.bilinear(picture, 299, half_pixel=True)
    np.testing.assert_allclose(ours, expected[0].permute(1, 2, 0).numpy(), atol=2e-2)
    assert np.abs(ours - inception.bilinear(picture, 299)).mean() > 1 or size == 299


def test_bilinear_is_tensorflows_bit_for_bit():
    tf = pytest.importorskip("tensorflow", reason="the comparison needs TensorFlow")
    for height, width in ((64, 64), (256, 200), (299, 299), (480, 641)):
        picture = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
        expected = tf.compat.v1.image.resize_bilinear(picture[None].astype(np.float32), (299, 299))[0]
        np.testing.assert_array_equal(inception.bilinear(picture, 299), expected.numpy())


def test_the_clean_rule_rounds_nothing_and_stays_in_range():
    picture = pictures(1, 64)[0]
    found = inception.bicubic(picture, 299)
    assert found.min() >= 0 and found.max() <= 255 and np.abs(found - np.round(found)).max() > 0.1
    np.testing.assert_array_equal(inception.bicubic(found, 299), found)
    whole = np.asarray(Image.fromarray(picture).resize((299, 299), Image.BICUBIC), np.float32)
    assert np.abs(found - whole).max() < 1.5


@pytest.mark.parametrize("rule", inception.RULES)
def test_prepared_pictures_are_within_one(rule):
    for level in (0, 255):
        found = inception.prepare(np.full((40, 50, 3), level, np.uint8), rule)
        assert found.shape == (299, 299, 3) and found.dtype == np.float32
        centre = 127.5 if rule == "torch" else 128
        np.testing.assert_allclose(found, (level - centre) / centre, atol=1e-6)

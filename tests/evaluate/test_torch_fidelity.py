"""Inception's features and the numbers made of them, against torch-fidelity with the same random weights.

torch-fidelity asks for torchvision, which PyPI has for CUDA's torch alone, and uses nothing of it here. So it
is in no extra: `pip install --no-deps torch-fidelity` brings it, and a stand-in takes torchvision's place.
"""

import importlib.util
import sys
import types

import numpy as np
import pytest

from dalle2_jax.convert import convert, inception_weights
from dalle2_jax.evaluate import distances, features
from tests.evaluate.test_inception import pictures

COUNT = 24


@pytest.fixture(scope="module")
def torch_fidelity():
    pytest.importorskip("torch", reason="the comparison needs torch")
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity")
    if importlib.util.find_spec("torchvision") is None:
        names = (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
        made = {name: types.ModuleType(name) for name in names}
        for name in ("CIFAR10", "STL10", "CIFAR100"):
            setattr(made["torchvision.datasets"], name, type(name, (), {}))
        made["torchvision"].transforms = made["torchvision.transforms"]
        made["torchvision.transforms"].functional = made["torchvision.transforms.functional"]
        sys.modules.update(made)
        import torch_fidelity

        for name in names:
            del sys.modules[name]
    import torch_fidelity

    return torch_fidelity


def test_features_and_numbers_are_those_of_torch_fidelity(torch_fidelity, tmp_path):
    import torch

    from tests.evaluate.torch_inception import random_inception

    source = tmp_path / "weights.pth"
    torch.save(random_inception().state_dict(), source)
    assert convert.main(["inception", str(source), str(tmp_path / "ours.safetensors"), "--any_checksum"]) == 0
    weights = inception_weights.load(tmp_path / "ours.safetensors")
    sets = [pictures(COUNT, 80, seed=0), pictures(COUNT, 80, seed=1)]
    sets[0][::3] //= 4  # a third is unlike what it is compared with

    before, run = features.inception_extractor(weights, "ttur", COUNT)
    ours = [run([before(picture) for picture in part]) for part in sets]
    extractor = torch_fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(source)
    )
    tensors = [torch.tensor(part).permute(0, 3, 1, 2) for part in sets]
    with torch.no_grad():
        theirs = [extractor(part) for part in tensors]
    for own, (pool, logits) in zip(ours, theirs, strict=True):
        for name, value in (("pool", pool.numpy()), ("logits_unbiased", logits.numpy())):
            assert value.std(axis=0).mean() > 0.05 * np.abs(value).mean()
            assert np.abs(own[name] - value).max() / np.abs(value).max() < 1e-5, name

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, part):
            self.part = part

        def __len__(self):
            return len(self.part)

        def __getitem__(self, i):
            return self.part[i]

    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(tensors[0]),
        input2=Pictures(tensors[1]),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=COUNT,
        kid_subsets=1,
        kid_subset_size=COUNT,
        isc_splits=2,
        feature_extractor="inception-v3-compat",
        feature_layer_fid="2048",
        feature_layer_kid="2048",
        feature_layer_isc="logits_unbiased",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(source),
    )
    x, y = (part["pool"] for part in ours)
    near = distances.neighbourhoods(x, y, k=3)
    found = {
        "frechet_inception_distance": distances.frechet_distance(*map(distances.Moments.of, (x, y))),
        "kernel_inception_distance_mean": distances.kid(x, y, subsets=1, subset_size=COUNT)[0],
        "inception_score_mean": distances.inception_score(ours[0]["logits_unbiased"], splits=2)[0],
        "precision": near["precision"],
        "recall": near["recall"],
    }
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-4), name
    assert 0 < found["precision"] < 1 and found["frechet_inception_distance"] > 1

"""Weights of strangers (R31): nothing in them is executed, wherever it stands, whatever a file is called."""

import json
import pickle
import tracemalloc
import zipfile

import pytest

from dalle2_jax.convert import torch_archive
from dalle2_jax.convert.tensors import open_tensors
from dalle2_jax.runtime import modeldir


class Payload:
    """Unpickling this would make the canary's file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("name", ["a.pkl", "a.ckpt", "a.pt", "a.bin", "a.msgpack", "a.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_and_not_executed(tmp_path, name, protocol):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Payload(canary)}, protocol))
    with pytest.raises(ValueError, match=f"{name} is (no file of weights|not a whole safetensors file)"):
        open_tensors(tmp_path / name)
    assert not canary.exists()
    pickle.loads((tmp_path / name).read_bytes())  # the payload was live
    assert canary.exists()


def test_a_pickle_within_an_archive_of_torch_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"weight": Payload(canary)}, 2))
    assert len(open_tensors(tmp_path / "a.pt")) == 0 and not canary.exists()


def test_a_pickle_in_the_place_of_a_models_weights_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        modeldir.load_stage(tmp_path)
    assert not canary.exists()


def test_shards_outside_their_folder_are_refused(tmp_path):
    (tmp_path / "weights").mkdir()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "weights" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must lie in the same folder"):
        open_tensors(tmp_path / "weights")


def test_an_archive_takes_256_mebibytes_beside_its_tensors_at_most(tmp_path, monkeypatch):
    """One that is compressed, one whose pickle is long, 10^12 leaves in a few bytes, millions of objects."""

    def peak(path, complaint: str) -> int:
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=complaint):
                open_tensors(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def archive(name, data, method=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / name, "w", method) as file:
            file.writestr("a/data.pkl", data)
        return tmp_path / name

    bomb = archive("bomb.pt", bytes(100 << 20), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 200_000
    assert peak(bomb, "compressed numbers, which torch does not write") < 1 << 20
    assert peak(archive("long.pt", bytes(65 << 20)), "data.pkl has more than 64 MiB") < 1 << 20
    tree = []
    for _ in range(12):
        tree = [tree] * 10
    laughs = archive("laughs.pt", pickle.dumps(tree, 2))
    with monkeypatch.context() as patched:  # tracing memory makes a million of them slow
        patched.setattr(torch_archive, "_MAX_NODES", 100_000)
        assert peak(laughs, "more than 100000 nodes") < 1 << 20
    # An empty dictionary, and its place in the memo: the most that two bytes may come to.
    objects = archive("objects.pt", b"\x80\x04" + b"}\x94" * (2 << 20) + b".")
    assert 1 << 20 < peak(objects, "more than 1000000 instructions") < 256 << 20

"""The hub, with a fake in the place of huggingface_hub: addresses are pinned, data alone travels."""

import fnmatch
import importlib
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.runtime import hub, modeldir
from dalle2_jax.train import inputs
from tests.tiny_model import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HfHubHTTPError(Exception):
    pass


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A hub that is a folder: repositories at root/OWNER/NAME, one commit each; `asked` notes the calls."""
    library = types.ModuleType("huggingface_hub")
    library.errors = types.SimpleNamespace(HfHubHTTPError=HfHubHTTPError)
    library.root, library.asked = tmp_path / "hub", []

    def copy(source, target, patterns, ignored=()):
        for path in Path(source).rglob("*"):
            name = path.relative_to(source).as_posix()
            hit = any(fnmatch.fnmatch(name, p) for p in patterns)
            if path.is_file() and hit and not any(fnmatch.fnmatch(name, p) for p in ignored):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        library.asked.append((name, revision))
        if not (library.root / name).exists():
            raise HfHubHTTPError(f"404: there is no {name}\nRequest ID: 1")
        copy(library.root / name, tmp_path / "cache" / revision, allow_patterns, ignore_patterns)
        return str(tmp_path / "cache" / revision)

    class HfApi:
        def create_repo(self, name, *, private, exist_ok):
            library.asked.append((name, "private" if private else "public"))
            (library.root / name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            copy(folder_path, library.root / repo_id, allow_patterns)
            return types.SimpleNamespace(oid=COMMIT)

    library.snapshot_download, library.HfApi = snapshot_download, HfApi
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    return library


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = make_model(tmp_path_factory.mktemp("tiny"))
    index = modeldir.read_index(directory)
    modeldir.write_json(directory / "model_index.json", index | {"licence": "Apache-2.0"})
    (directory / "README.md").write_text("# A model")
    (directory / "notes.pkl").write_bytes(b"not for others")
    return directory


def test_a_name_without_a_slash_is_a_model_of_the_package(tmp_path, monkeypatch):
    """It wins over a folder of that name, which ./ reaches; a stage of it is fine-tuned by name."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "scenes")
    packaged = hub.local("scenes")
    assert Path(packaged) == Path(hub.__file__).parents[1] / "bundled" / "scenes"
    assert (Path(packaged) / modeldir.INDEX_FILE).is_file()
    for path in ("./scenes", "scenes/clip", "", ".", "..", "none"):
        assert hub.local(path) == path and hub.packaged(path) is None
    assert pipeline.UnCLIP.load("scenes").name == pipeline.UnCLIP.load().name
    assert pipeline.UnCLIP.load("./scenes").name != pipeline.UnCLIP.load().name
    config = importlib.import_module("configs.finetune").get_config("scenes/decoder")
    assert (config.init_from, config.clip) == (f"{packaged}/decoder", str(packaged))


def test_what_is_published_is_what_is_loaded(fake, model, capsys):
    assert convert.main(["push", str(model), "somebody/tiny", "--private"]) == 0
    address = f"hf://somebody/tiny@{COMMIT}"
    assert address in capsys.readouterr().out
    loaded = pipeline.UnCLIP.load(address)
    assert fake.asked == [("somebody/tiny", "private"), ("somebody/tiny", COMMIT)]
    theirs, ours = (modeldir.load_stage(place / "prior")[1] for place in (loaded.engine.directory, model))
    np.testing.assert_array_equal(theirs["net"]["out_proj"]["kernel"], ours["net"]["out_proj"]["kernel"])
    assert not list(fake.root.rglob("*.pkl"))


def test_training_takes_addresses_as_it_takes_folders(fake, model, tmp_path):
    hub.push(model, "somebody/tiny")
    address = f"hf://somebody/tiny@{COMMIT}"
    for path in (address, f"{address}/", f"{address}/decoder"):
        stage, _, params = models.load_stage(path, "decoder")
        np.testing.assert_array_equal(
            params["time"]["fc1"]["bias"], modeldir.load_stage(model / "decoder")[1]["time"]["fc1"]["bias"]
        )
    recipe = importlib.import_module("configs.finetune")
    config = recipe.get_config(f"{address}/decoder")
    assert config.clip == address and config.init_from == f"{address}/decoder"
    made = inputs.make_tokenizer(config.to_dict(), tmp_path / "one")
    clip = recipe.get_config(f"{address}/clip")
    assert not clip.clip and clip.tokenizer.path == f"{address}/tokenizer"
    again = inputs.make_tokenizer(clip.to_dict(), tmp_path / "two")
    assert made(["a red star"])[0].tolist() == again(["a red star"])[0].tolist()
    convert.convert_workdirs(tmp_path / "out", clip=address, prior=address, decoder=address)
    assert modeldir.read_index(tmp_path / "out")["licence"] == "Apache-2.0"
    with pytest.raises(ValueError, match="is no address of a model"):
        models.load_stage(f"{address}/../decoder", "decoder")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://somebody/tiny", "names no commit"),
        ("hf://somebody/tiny@main", "names no commit"),
        (f"hf://tiny@{COMMIT}", "is no address of a model"),
        (f"hf://somebody/absent@{COMMIT}", "cannot be fetched: 404: there is no somebody/absent$"),
    ],
)
def test_addresses_that_are_refused(fake, address, message):
    with pytest.raises(ValueError, match=message):
        pipeline.UnCLIP.load(address)
    assert len(fake.asked) == ("absent" in address)


def test_what_may_not_be_published(fake, model, tmp_path, monkeypatch):
    other = shutil.copytree(model, tmp_path / "other")
    modeldir.write_json(other / "model_index.json", modeldir.read_index(other) | {"licence": ""})
    with pytest.raises(ValueError, match="no card that names a licence"):
        hub.push(other, "somebody/tiny")
    with pytest.raises(ValueError, match="give OWNER/NAME"):
        hub.push(model, "tiny")
    assert not fake.asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'dalle2_jax\[hub\]'"):
        hub.push(model, "somebody/tiny")

"""Training without captions: DDPM's recipe, made small, on pictures alone; a run that reads classes."""

import dataclasses
import importlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.train import loop
from tests import tiny_run
from tests.data import shards_for_tests as made

pytestmark = pytest.mark.usefixtures("one_device")
CLASSES = {"cat": [0, 1, 2], "dog": [3, 4, 105], "fox": [6, 7, 8]}
RECIPES = (
    *(("ddpm.cifar10", ""), ("ddpm.pictures256", ""), ("iddpm.generator", "cifar10")),
    *(("iddpm.generator", "conditional"), ("iddpm.upsampler256", ""), ("adm.generator", "64")),
    *(("adm.generator", "256_unconditional"), ("adm.upsampler", "256"), ("adm.classifier", "64")),
    ("cfg.generator", "64"),
)


@dataclasses.dataclass(frozen=True)
class Labelled(tiny_run.Tiny):
    """The smallest stage, which reads classes."""

    num_classes: int = 3

    def batch_spec(self, batch_size):
        return super().batch_spec(batch_size) | {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def loss(self, params, key, batch, *, step=0, train=True):
        found = super().loss(params, key, batch, step=step, train=train)
        value = found.value + 0.01 * jnp.square(params["fc1"]["kernel"][batch["label"]]).sum()
        return found._replace(value=value)


@pytest.fixture
def pets(tmp_path):
    made.write_class_folder(tmp_path / "pets/train", CLASSES)
    made.write_class_folder(tmp_path / "pets/val", {"dog": [20, 21], "fox": [22]})
    return tmp_path / "pets"


def run(data, num_steps, workdir, monkeypatch, num_classes=3, **changes) -> int:
    """The exit status of a run of `Labelled` on a class folder."""
    settings = tiny_run.config(data, num_steps)
    settings["data"] |= dict(source="folder", split="train", eval_split="validation") | changes
    with monkeypatch.context() as patched:
        patched.setattr(models, "build_stage", lambda config: Labelled(num_classes=num_classes))
        return tiny_run.run_main(settings, workdir, patched.setattr)


def test_a_run_keeps_the_names_of_its_classes_and_resumes_to_the_bit(pets, tmp_path, monkeypatch):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert run(pets, 4, whole, monkeypatch) == 0
    assert run(pets, 2, workdir, monkeypatch) == 0
    kept = json.loads((workdir / "config.json").read_text())["data"]["classes"]
    assert kept == ["cat", "dog", "fox"]
    assert run(pets, 4, workdir, monkeypatch) == 0  # with data.classes=() as before
    tiny_run.assert_same(tiny_run.stored_state(workdir, 4), tiny_run.stored_state(whole, 4))
    assert json.loads((workdir / "config.json").read_text())["data"]["classes"] == kept
    assert run(pets, 5, workdir, monkeypatch, classes=("dog", "cat", "fox")) != 0
    (pets / "train/cat").rename(pets / "train/ant")
    assert run(pets, 5, workdir, monkeypatch) != 0
    assert tiny_run.steps_of(workdir)[-1] == 4


@pytest.mark.parametrize(
    "num_classes, changes, message",
    [
        (2, {}, "the data have 3 classes .*--config.model.num_classes=3"),
        (3, dict(split="test"), "has no split 'test'"),
        (3, dict(classes=("a", "b")), "data.classes has 2 names, model.num_classes is 3"),
    ],
)
def test_a_run_is_refused_before_it_compiles(
    pets, tmp_path, monkeypatch, caplog, num_classes, changes, message
):
    monkeypatch.setattr(loop, "_compiled", None)
    with caplog.at_level("ERROR"):
        assert run(pets, 1, tmp_path / "run", monkeypatch, num_classes, **changes) == 2
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("source", ["folder", pytest.param("tfds", marks=pytest.mark.slow)])
def test_ddpm_trains_on_pictures_alone(pets, tmp_path, monkeypatch, source):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # it would prepare the dataset by its own rules
    config = importlib.import_module("configs.ddpm.cifar10").get_config("debug")
    recipe = importlib.import_module("configs.ddpm.cifar10").get_config()
    config.model.update(image_size=8, channels=8, channel_mult=(1,), attention_resolutions=(), num_steps=2)
    config.data, config.num_samples, config.sample_every = recipe.data, 2, 2
    config = json.loads(json.dumps(models.to_plain(config)))
    if source == "folder":
        config["data"] |= dict(source="folder", path=str(pets), eval_split="val")
    else:
        made.write_labelled_tfds(tmp_path / "cifar10/1.0.0", {"train": [*range(9)], "test": [10, 11]})
        config["data"]["data_dir"] = str(tmp_path)
    loop.train(config, str(tmp_path / "run"))
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["data"]["classes"] == [] and not (tmp_path / "run/tokenizer").exists()
    assert tiny_run.logged(tmp_path / "run", "train/loss").keys() == {1, 2}
    with Image.open(tmp_path / "run/samples/samples_00000002.png") as grid:
        assert grid.text["captions"] == "[]"  # no record's name under a picture that did not read it


# Of classifier-free guidance's generator, small enough to compile in seconds.
SMALL = dict(image_size=8, channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
SMALL |= dict(num_classes=3, num_steps=2, net=dict(time_scale=1000 / 65_536, norm_groups=2))


@pytest.mark.slow
def test_classes_train_a_guided_generator_that_draws_them_by_name(pets, tmp_path):
    """From a folder by class to a model directory; the classes of tar shards are those of KEY.cls."""
    config = importlib.import_module("configs.cfg.generator").get_config()
    config.model.update(SMALL)
    config.update(batch_size=4, num_steps=2, num_samples=2, sample_every=2, eval_batches=1, ema_decay=0.5)
    config.mesh.data, config.optim.warmup_steps = 1, 0
    config = json.loads(json.dumps(models.to_plain(config)))
    members = [(f"{n:03d}.png", made.flat_png(n)) for n in range(8)]
    members += [(f"{n:03d}.cls", b"%d" % (n % 3)) for n in range(8)]
    for split in ("train", "validation"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        made.write_tar(tmp_path / "shards" / split / "0.tar", sorted(members))
    folder = dict(source="folder", path=str(pets), eval_split="val")
    for name, data in (("folder", folder), ("tar", dict(path=str(tmp_path / "shards")))):
        loop.train(config | dict(data=config["data"] | data), str(tmp_path / name))
        convert.convert_workdirs(tmp_path / f"{name} model", decoder=str(tmp_path / name), dtype="float32")
        model = pipeline.UnCLIP.load(tmp_path / f"{name} model")
        classes = model.engine.configs["decoder"]["data"]["classes"]
        assert classes == (["cat", "dog", "fox"] if name == "folder" else ["0", "1", "2"])
        drawn = model.text_to_image([f"a {classes[2]}", "nothing"], guidance_scale=3.0, numbers=[5, 5])
        assert drawn.images.shape == (2, 8, 8, 3)  # the second without a class: the null


@pytest.mark.parametrize("recipe, preset", RECIPES)
def test_a_recipe_asks_its_data_for_what_they_have(recipe, preset):
    """The names of classes are those of the data; no recipe asks for a caption."""
    config = importlib.import_module(f"configs.{recipe}").get_config(preset)
    assert not config.data.classes and not config.model.get("text")
    assert config.data.source == ("tfds" if "cifar10" in (recipe + preset) else "tar")

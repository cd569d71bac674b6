"""The recipe for a folder of pictures: three layouts, one command, a grid of the folder's captions."""

import json

import pytest
from PIL import Image, ImageDraw

import dalle2_jax
from configs.tiny import folder as recipe
from dalle2_jax.convert import convert
from dalle2_jax.data import words
from dalle2_jax.models import models
from dalle2_jax.train import inputs, plan
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("one_device")
COLOURS = ("red", "orange", "yellow", "green", "blue")
CAPTIONS = {f"{colour} circle" for colour in COLOURS}


def write_pictures(folder, layout: str) -> str:
    """Twenty drawings in the folder, four of each caption; returns its path."""
    rows = []
    for number in range(20):
        colour = COLOURS[number % 5]
        picture = Image.new("RGB", (40, 30), "white")
        ImageDraw.Draw(picture).ellipse((5 + number // 5, 5, 25 + number // 5, 25), fill=colour)
        place = folder / (f"{colour}_circle" if layout == "classes" else "")
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.png")
        if layout == "texts":
            (place / f"{number}.txt").write_text(f"{colour} circle\n")
        rows.append(f"{number}.png,{colour} circle\n")
    if layout == "metadata":
        (folder / "metadata.csv").write_text("".join(["file_name,text\n", *rows]))
    return str(folder)


def small(path: str) -> dict:
    """The recipe with a network that compiles in seconds, for two steps."""
    config = recipe.get_config()
    config.model.update(image_size=8, channels=16, channel_mult=(1,), attention_resolutions=(8,), num_steps=4)
    config.model.text.update(width=16, depth=1)
    config.data.path = path
    config.optim.update(warmup_steps=0, muon_learning_rate=0.0)
    config.update(batch_size=8, num_steps=2, num_samples=6)
    return json.loads(json.dumps(models.to_plain(config)))


@pytest.mark.parametrize("layout", ["metadata", "texts", "classes"])
def test_each_layout_gives_every_picture_its_caption(tmp_path, layout):
    config = small(write_pictures(tmp_path / "pictures", layout))
    tokenizer = inputs.make_tokenizer(config, tmp_path)
    fields = {"image", "tokens", "token_mask"}
    dataset, held_out = inputs.make_datasets(config, plan.make_plan(config), fields, tokenizer)
    assert dataset.fingerprint == held_out.fingerprint and not dataset.settings.flip
    labels = dataset.labels(range(dataset.num_records))
    assert len(labels) == 20 and set(labels) == CAPTIONS


def test_a_folder_becomes_a_model_that_draws_its_captions(tmp_path, monkeypatch):
    config = small(write_pictures(tmp_path / "pictures", "classes"))
    assert tiny_run.run_main(config, tmp_path / "run", monkeypatch.setattr) == 0
    with Image.open(tmp_path / "run/samples/samples_00000002.png") as grid:
        shown = json.loads(grid.text["captions"])
    assert len(shown) == 6 and set(shown) <= CAPTIONS
    convert.convert_workdirs(tmp_path / "model", decoder=str(tmp_path / "run"))
    assert words.read(tmp_path / "model").counts.keys() == {*COLOURS, "circle"}
    drawn = dalle2_jax.load(str(tmp_path / "model"))("red circle", n=2, seed=0)
    assert drawn.images.shape == (2, 8, 8, 3)


def test_pictures_without_captions_are_refused_with_what_to_do(tmp_path, monkeypatch, caplog):
    write_pictures(tmp_path / "pictures", "loose")
    with caplog.at_level("ERROR"):
        config = small(str(tmp_path / "pictures"))
        assert tiny_run.run_main(config, tmp_path / "run", monkeypatch.setattr) == 2
    assert "give them captions: KEY.txt beside KEY.png" in caplog.text

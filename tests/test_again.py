"""A picture of `generate` says how it was made, and is drawn again, to the bit."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.generate import again, output
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.generate.result import Result
from tests.tiny_model import CAPTIONS, make_model

SETTINGS = dict(guidance_scale=2.0, guidance_interval=(0.2, 3.0), prior_steps=2, decoder_steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Pipeline.load(make_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def result(model):
    """Two pictures of a caption."""
    options = SETTINGS | dict(upsampler_steps=[2], negative=CAPTIONS[1])
    return model.text_to_image([CAPTIONS[0]], n=2, seed=7, **options)


@pytest.fixture(scope="module")
def paths(result, tmp_path_factory):
    """Their files, as the library writes them."""
    return result.save(tmp_path_factory.mktemp("drawn"))


def test_a_picture_is_drawn_again_to_the_bit(model, paths):
    drawn = again.read(paths[1])
    assert (drawn.caption, drawn.number, drawn.seed, drawn.model) == (CAPTIONS[0], 1, 7, "tiny")
    sums = {name: model.engine.weights_sha256(name) for name in model.engine.stages}
    assert drawn.origin["weights"] == sums and len(sums["prior"]) == 64
    result, verdict = again.draw(model, drawn)
    np.testing.assert_array_equal(result.images[0], np.asarray(Image.open(paths[1])))
    assert verdict == f"the same picture as {paths[1]}, to the bit"
    assert json.loads(json.dumps(result.settings)) == drawn.settings
    assert drawn.negative == CAPTIONS[1] and result.origin() == drawn.origin


def test_a_base_picture_is_drawn_again(model, result, paths):
    drawn = again.read(paths[1])
    settings = {name: values for name, values in drawn.settings.items() if name in ("prior", "decoder")}
    _, verdict = again.draw(model, dataclasses.replace(drawn, image=result.base[1], settings=settings))
    assert verdict.startswith("the same picture")


def test_a_result_is_pickled_without_its_model(result):
    copy = pickle.loads(pickle.dumps(result))
    assert copy.origin() == result.origin() and len(pickle.dumps(result)) < 100_000


def test_what_differs_is_said(model, paths):
    drawn = again.read(paths[0])
    origin = drawn.origin | {"weights": drawn.origin["weights"] | {"prior": "0" * 64}}
    origin |= {"versions": drawn.origin["versions"] | {"jax": "0.0.1"}}
    other = dataclasses.replace(drawn, image=drawn.image ^ 1, origin=origin)
    _, verdict = again.draw(model, other)
    assert verdict.startswith(
        f"not the same picture as {paths[0]}: 1e+02 % of its numbers differ, by up to 1 of 255"
    )
    assert "the weights of prior are others" in verdict and "jax is" in verdict and "then 0.0.1" in verdict
    settings = drawn.settings | {"decoder": drawn.settings["decoder"] | {"gone": 3}}
    with pytest.raises(ValueError, match="cannot be drawn again: decoder: gone has no meaning"):
        again.draw(model, dataclasses.replace(drawn, settings=settings))
    settings = {name: values for name, values in drawn.settings.items() if name != "prior"}
    with pytest.raises(ValueError, match="was drawn without a prior: give --model=DIR of model 'tiny'"):
        again.draw(model, dataclasses.replace(drawn, settings=settings))


def test_pictures_that_do_not_say_enough(tmp_path):
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="does not say how it was drawn"):
        again.read(tmp_path / "a.png")
    for made, message in (
        ({"action": "invert"}, "`edit invert`"),
        ({"caption": "a", "number": 0}, "its seed"),
    ):
        output.grid.save_png(tmp_path / "b.png", np.asarray(image), {"dalle2_jax": json.dumps(made)})
        with pytest.raises(ValueError, match=message):
            again.read(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("captions", "n", "cells"), [(1, 100, (10, 10)), (2, 12, (4, 6)), (3, 4, (3, 4)), (2, 11, (4, 6))]
)
def test_many_pictures_of_a_caption_wrap(captions, n, cells):
    """Each caption begins a row."""
    images = np.zeros((captions * n, 128, 128, 3), np.uint8)
    texts = tuple("ab"[i % 2] for i in range(captions) for _ in range(n))
    numbers = tuple(range(n)) * captions
    result = Result(texts, numbers, 0, images[:, 0, 0], images, images, {}, {})
    table = output.result_grid(result)
    rows, columns = cells
    assert table.shape[1] == columns * 132 + 4 and table.shape[0] // rows in range(132, 160)
    first = (rows // captions if captions > 1 else 0) * ((table.shape[0] - 4) // rows) + 20
    assert (table[first, 20] == 0).all()


def test_the_grid_of_an_edit_shows_its_source():
    images = np.zeros((2, 128, 128, 3), np.uint8)
    result = Result(("a", "b"), (0, 1), 0, images[:, 0, 0], images, images, {}, {})
    source = output.Source(np.full((1, 128, 128, 3), 77, np.uint8), ["source"])
    table = output.result_grid(result, source)
    assert (table[10, 10] == 77).all() and (table[10, 150] == 0).all()

"""`import dalle2_jax`: a model opened and called, its pictures as arrays, PIL pictures, files and a grid."""

import io
import types

import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax.generate import output
from dalle2_jax.generate.pipeline import KEYWORDS
from dalle2_jax.generate.settings import SETTINGS
from dalle2_jax.runtime import machine, names, partition
from tests.tiny_model import CAPTIONS, make_class_model, make_model


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return dalle2_jax.load(make_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe(CAPTIONS, n=2, seed=5, progress=None)


def test_a_text_is_a_list_of_one(pipe, drawn):
    alone = pipe(CAPTIONS[0], n=2, seed=5, progress=False)
    assert alone.captions == (CAPTIONS[0],) * 2
    np.testing.assert_array_equal(alone.images, drawn.images[:2])


def test_pictures_as_pil_as_files_and_as_a_grid(pipe, drawn, tmp_path):
    assert [np.asarray(picture).tolist() for picture in drawn.pil] == drawn.images.tolist()
    paths = drawn.save(tmp_path / "saved")
    output.write_pictures(tmp_path / "command", drawn, pipe.name)  # what generate --out writes
    files = {path.name: path.read_bytes() for path in (tmp_path / "command").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == files
    assert files.keys() == {path.name for path in paths} | {"grid.png", "generate.json"}
    shown = np.asarray(Image.open(io.BytesIO(drawn._repr_png_())))
    np.testing.assert_array_equal(shown, np.asarray(Image.open(tmp_path / "saved" / "grid.png")))
    assert repr(drawn) == "<Result: 6 pictures of 32 x 32, seed 5>"


def test_progress_is_one_line_that_ends_in_the_time_taken(pipe, drawn, capsys):
    pipe(CAPTIONS, n=2, seed=5)
    out, shown = capsys.readouterr()
    assert not out and shown.count("\n") == 1 and shown.endswith("\n")
    lines = [line.strip() for line in shown.split("\r") if line.strip()]
    assert [line.split()[0] for line in lines] == [
        *("drawing", "text", "prior", "decoder", "upsampler32"),
        "drawn",
    ]
    calls = []
    pipe(CAPTIONS, n=2, seed=5, progress=lambda *event: calls.append(event[:3]))
    assert calls == [(name, 6, 6) for name in ("text", "prior", "decoder", "upsampler32")]
    pipe(CAPTIONS, n=2, seed=5, progress=None)
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_of_all_steps_once_their_speeds_are_known():
    file, speeds = io.StringIO(), {}
    with output.ProgressLine(["prior", "decoder"], speeds, file, clock=lambda: 0.0) as line:
        line("prior", 2, 8, 4.0)
        line("prior", 8, 8, 16.0)
        line("decoder", 8, 8, 80.0)
        line("prior", 2, 8, 4.0)
    shown = [text.strip() for text in file.getvalue().split("\r")[1:]]
    assert shown[0] == "drawing (the first time compiles, once)"
    assert shown[1:3] == ["prior 2/8, 12s left in this step", "prior 8/8, next decoder"]
    assert shown[3:] == ["decoder 8/8, 0s left", "prior 2/8, 1m32s left", "drawn in 0s"]
    assert speeds == {"prior": 2.0, "decoder": 10.0}


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("num_inference_steps", "'num_inference_steps' is no .*; did you mean 'decoder_steps'"),
        ("decoder_num_inference_steps", "did you mean 'decoder_steps'"),
        ("prior_num_inference_steps", "did you mean 'prior_steps'"),
        ("super_res_num_inference_steps", "did you mean 'upsampler_steps'"),
        ("decoder_guidance_scale", "did you mean 'guidance_scale'"),
        ("num_images_per_prompt", "did you mean 'n'"),
        ("negative_prompt", "did you mean 'negative'"),
        ("prompt", "did you mean 'captions'"),
        ("generator", "did you mean 'seed'"),
        ("callback_on_step_end", "did you mean 'progress'"),
        ("guidance_scal", "did you mean 'guidance_scale'"),
        ("sed", "did you mean 'seed'"),
        ("colour", "choose from captions, n, "),
    ],
)
def test_unknown_keywords_name_ours(pipe, keyword, message):
    """Those of diffusers among them."""
    with pytest.raises(ValueError, match=message):
        pipe(CAPTIONS, **{keyword: 1})


def test_no_name_is_a_synonym_of_ours():
    assert not names.SYNONYMS.keys() & {*KEYWORDS, *SETTINGS}


def test_unknown_options_of_edits_name_the_nearest(pipe, drawn):
    with pytest.raises(ValueError, match="'steps' is no option of an edit; did you mean 'num_steps'"):
        pipe.variations(drawn.images[0], steps=3)


def test_guidance_leads_away_from_a_negative_caption(pipe, drawn, tmp_path):
    led = pipe(CAPTIONS[:1], n=2, seed=5, negative=CAPTIONS[1], progress=None)
    np.testing.assert_array_equal(led.image_embeds, drawn.image_embeds[:2])
    assert np.abs(led.base.astype(int) - drawn.base[:2]).max() > 10
    assert led.settings["decoder"] == drawn.settings["decoder"] | {"negative": CAPTIONS[1]}
    for wrong in (dict(negative=" "), dict(negative="a star", guidance_scale=1)):
        with pytest.raises(ValueError, match="caption 1 is empty|a negative caption needs"):
            pipe(CAPTIONS[:1], progress=None, **wrong)
    with pytest.raises(ValueError, match="a negative caption needs a decoder that reads captions"):
        dalle2_jax.load(make_class_model(tmp_path))(negative="a star")


def test_jax_is_set_up_once_and_a_users_settings_stay(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(partition, "initialise", lambda: calls.append(1))
    dalle2_jax._initialise.cache_clear()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            dalle2_jax.load(tmp_path / "nowhere")
    assert calls == [1]
    least = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.setenv("DALLE2_JAX_CACHE", str(tmp_path))
    for folder, seconds, expected in (("", 1.0, 0.1), ("/mine", 1.0, 0.1), ("/mine", 5.0, 5.0)):
        config = types.SimpleNamespace(jax_compilation_cache_dir=folder, **{least: seconds})
        config.update = lambda name, value, config=config: setattr(config, name, value)
        monkeypatch.setattr(machine, "_config", config)
        machine.set_compilation_cache()
        assert getattr(config, least) == expected
        assert config.jax_compilation_cache_dir.startswith(folder or str(tmp_path))

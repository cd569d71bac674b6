"""What a model can do follows from its stages; settings of sampling follow from what the stages declare."""

import math
import types

import numpy as np
import pytest

from dalle2_jax import pipeline, systems
from dalle2_jax.generate import pipeline as generate_pipeline
from dalle2_jax.generate.settings import resolve
from dalle2_jax.models import models
from dalle2_jax.models.stages import Op
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.runtime import modeldir
from dalle2_jax.systems import cascade
from dalle2_jax.systems.step import Step
from tests import tiny_model

EDITS = ["variations", "interpolate", "textdiff"]
CAPTIONED = ["image_to_image", "inpaint", "outpaint"]
CLIP = ["encode_text", "encode_image"]


def stages(*names, extended=False, **decoder):
    made = tiny_model.configs(extended)
    made["decoder"]["model"] |= decoder
    return {name: models.build_stage(made[name]) for name in names}


ALONE = dict(embed_dim=0, text=None, text_drop=0.0, image_drop=0.0)  # a decoder of nothing


@pytest.mark.parametrize(
    ("names", "decoder", "can"),
    [
        (
            ["clip", "prior", "decoder", "upsampler32"],
            {},
            ["draw", "explain", *EDITS, *CAPTIONED, "invert", "redraw", "upscale", *CLIP],
        ),
        (["clip", "decoder"], {}, [*EDITS, "invert", "redraw", *CLIP]),
        (["decoder"], ALONE, ["draw", *CAPTIONED, "invert", "redraw"]),
        (["decoder", "upsampler32"], ALONE, ["draw", *CAPTIONED, "invert", "redraw", "upscale"]),
        (["clip", "prior"], {}, CLIP),
        (["clip"], {}, CLIP),
        (["upsampler32"], {}, ["upscale"]),
    ],
    ids=" ".join,
)
def test_what_stages_can_do_together(names, decoder, can):
    assert list(cascade.actions(stages(*names, **decoder))) == can


def test_the_steps_of_drawing_and_their_folds():
    made = stages("clip", "prior", "decoder", "upsampler32")
    steps = cascade.steps("draw", made | {"upsampler128": made["upsampler32"]})
    assert [step.name for step in steps] == ["text", "prior", "decoder", "upsampler32", "upsampler128"]
    assert [step.fold for step in steps] == [None, 0, 1, 2, 3]
    assert [dict(step.bind).get("low_res") for step in steps[3:]] == ["decoder.image", "upsampler32.image"]
    assert cascade.steps("upscale", made)[0].fold == 2
    assert set(steps[1].specs(made["prior"])) == {"text_embed", "tokens", "token_mask"}
    assert set(steps[3].specs(made["upsampler32"])) == {"low_res"}


def test_principal_components_come_with_an_autoregressive_prior():
    names = ("clip", "prior", "decoder")
    assert "reconstruct" in cascade.actions(stages(*names, extended=True))
    with pytest.raises(ValueError, match="they come with an autoregressive prior"):
        cascade.steps("reconstruct", stages(*names))


def write(directory, *names, version=2):
    """A model directory of some of the tiny model's stages."""
    tiny_model.make_model(directory)
    if version == 1:
        roles = {name: name for name in names if name != "upsampler32"}
        lists = {"upsamplers": ["upsampler32"]} if "upsampler32" in names else {}
        old = {"_class_name": "UnCLIP", "format_version": 1, "stages": roles | lists}
        modeldir.write_json(directory / "model_index.json", old | {"tokenizer": "tokenizer", "name": "tiny"})
    else:
        entries = dict(zip(names, names, strict=True))
        modeldir.write_index(directory, entries, tokenizer="tokenizer", extra={"name": "tiny"})
    return directory


@pytest.mark.parametrize("version", [1, 2])
def test_a_clip_alone_encodes_and_draws_nothing(tmp_path, version):
    model = pipeline.UnCLIP.load(write(tmp_path, "clip", version=version))
    assert list(model.actions) == CLIP
    (embed, _), _ = model.encode_text(["a red star"])
    assert embed.shape == model.encode_image(np.zeros((1, 40, 40, 3), np.uint8)).shape == (1, 32)
    message = "cannot do draw: it has no decoder: it has clip; it can do encode_text, encode_image"
    with pytest.raises(ValueError, match=message):
        model.text_to_image(["a red star"])
    with pytest.raises(ValueError, match="cannot do variations: it has no decoder"):
        model.variations(np.zeros((40, 40, 3), np.uint8))


def test_version_1_draws_what_version_2_draws(tmp_path):
    names = ("clip", "prior", "decoder", "upsampler32")
    drawn = []
    for version in (1, 2):
        model = pipeline.UnCLIP.load(write(tmp_path / str(version), *names, version=version))
        assert list(model.engine.stages) == list(names)
        drawn.append(model.text_to_image(["a red star"], seed=3).images)
    np.testing.assert_array_equal(*drawn)


def test_a_model_without_captions_draws_without(tmp_path):
    model = pipeline.UnCLIP.load(tiny_model.make_class_model(tmp_path / "nothing"))
    drawn = model.text_to_image(n=3, seed=2)
    assert drawn.captions == ("",) * 3 and drawn.numbers == (0, 1, 2)
    np.testing.assert_array_equal(drawn.images, model.text_to_image(["a cat"], n=3, seed=2).images)
    classes = pipeline.UnCLIP.load(tiny_model.make_class_model(tmp_path / "classes", ("cat", "dog")))
    with pytest.raises(ValueError, match="give at least one caption"):
        classes.text_to_image(n=3)


def test_an_unknown_system_is_refused(tmp_path):
    modeldir.save_stage(tmp_path / "a", {"stage": "clip"}, {})
    modeldir.write_index(tmp_path, {"a": "a"}, system="video")
    with pytest.raises(ValueError, match="system 'video' is unknown: there is unclip"):
        pipeline.UnCLIP.load(tmp_path)


def test_two_actions_of_one_stage_by_a_system_of_its_own(tmp_path, monkeypatch):
    """A stage stands in two steps, the second of which starts from the picture of the first."""
    op = Op(("image",))
    first = Step("first", "decoder", "sample", op, fold=1, role="decoder")
    again = dict(bind={"init": "first.image"}, optional=("init",), fixed={"strength": 0.5})
    second = Step("second", "decoder", "sample", op, fold=5, role="decoder", **again)
    acts = {"draw": (first,), "redraw": (first, second)}
    toy = types.SimpleNamespace(
        actions=lambda stages: acts,
        steps=lambda action, stages: acts[action],
        check=lambda *_: None,
        GUIDES={},
    )
    monkeypatch.setattr(systems, "load", lambda name: {"toy": toy}[name])
    tiny_model.make_class_model(tmp_path)
    modeldir.write_index(tmp_path, {"decoder": "decoder"}, system="toy")
    model = generate_pipeline.Pipeline.load(tmp_path)
    drawn = model.text_to_image(n=2, seed=4)
    settings = resolve(model.engine, acts["redraw"])
    assert list(settings) == ["first", "second"]
    made, timings = model.run(acts["redraw"], {"number": [0, 1]}, settings, generate_pipeline.Running(seed=4))
    np.testing.assert_array_equal(made["first.image"], drawn.images)
    assert made["second.image"].shape == drawn.images.shape and list(timings) == ["first", "second"]
    assert (made["second.image"] != drawn.images).any()


# Settings


def test_every_setting_of_a_stage_is_a_keyword_and_the_stage_has_its_value():
    of_stages = {"prior": "prior", "decoder": "decoder", "upsampler": "upsampler32"}
    for role, name in of_stages.items():
        (stage,) = stages(name).values()
        declared = {setting.name for setting in systems.declared(role)}
        guided = {"guidance_scale", "guidance_interval", "threshold"} if role == "upsampler" else set()
        assert declared == set(stage.sampling) | guided
        assert declared <= {s.name for s in cascade.SETTINGS.values() if s.role == role}
    (prior,) = stages("prior", extended=True).values()
    assert {setting.name for setting in systems.declared("ar_prior")} == set(prior.sampling)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "3", 3),
        (float, "0.5", 0.5),
        (("a", "b"), "b", "b"),
        ("list", "27, 15", [27, 15]),
        ("pair", "0.3,5", (0.3, 5.0)),
        ("pair", "0.3,inf", (0.3, math.inf)),
    ],
)
def test_a_flags_text_is_a_value(kind, text, value):
    assert Setting("x", kind, "").parse(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [(int, "x"), (float, ""), (("a", "b"), "c"), ("list", "2,x"), ("pair", "1"), ("pair", "1,x")],
)
def test_another_text_is_refused(kind, text):
    with pytest.raises(ValueError):
        Setting("x", kind, "").parse(text)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (Setting("x", int, "", 1), 0, "x 0 must be 1 or more"),
        (Setting("x", float, "", 0, 1), math.nan, "x nan must lie in 0 .. 1"),
        (Setting("x", "pair", "", 0), (1, -1), "x .* must be 0 or more"),
        (Setting("x", ("a", "b"), ""), "c", "x 'c' is unknown; choose one of a, b"),
    ],
)
def test_a_value_outside_of_its_range_is_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        setting.check(value)

"""The recipes of configs/karlo in small, trained and exported: diffusers draws what our stages draw."""

import importlib
import json

import pytest

from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir
from dalle2_jax.train import loop

diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers' UnCLIPPipeline")

from tests.convert.test_karlo import CAPTION, assert_same_run, load_stages  # noqa: E402 (it imports torch)
from tests.convert.unclip_pipeline import EMBED, LARGE, SIDE  # noqa: E402

# Less than the presets have, so that a step compiles in seconds.
SMALLER = {
    "clip": {},
    "prior": {},
    "decoder": dict(image_size=SIDE, channel_mult=[1], attention_resolutions=[SIDE]),
    "upsampler256": dict(image_size=LARGE, low_res_size=SIDE, crop_size=SIDE, channel_mult=[1]),
}


def recipe(name: str, clip: str) -> dict:
    """The preset `debug` of configs/karlo/NAME.py for four steps that move the weights."""
    config = importlib.import_module(f"configs.karlo.{name}").get_config("debug")
    config = json.loads(json.dumps(models.to_plain(config)))
    config["model"] |= SMALLER[name]
    config["optim"]["learning_rate"] = 3e-3
    return config | dict(num_steps=4, ema_decay=0.5, num_samples=0, clip=clip)


@pytest.fixture(scope="module")
def model(one_device, tmp_path_factory):
    """The model directory of all four."""
    root = tmp_path_factory.mktemp("recipes")
    for name in SMALLER:
        loop.train(recipe(name, str(root / "clip") if name in ("prior", "decoder") else ""), str(root / name))
    workdirs = [f"--{role}={root / role}" for role in ("clip", "prior", "decoder")]
    workdirs += [f"--upsamplers={root / 'upsampler256'}", "--dtype=float32"]
    assert convert.main(["workdirs", *workdirs, f"--out={root / 'model'}"]) == 0
    return root / "model"


def test_diffusers_draws_what_the_recipes_draw(model, tmp_path, monkeypatch, capsys):
    assert convert.main(["to-diffusers", str(model), str(tmp_path / "theirs")]) == 0
    assert "note" not in capsys.readouterr().out  # the null caption is "", as CLIP encodes it
    theirs = diffusers.UnCLIPPipeline.from_pretrained(tmp_path / "theirs")
    theirs.set_progress_bar_config(disable=True)
    ours = load_stages(model)
    tokens, mask = convert.load_tokenizer(model / "tokenizer")([CAPTION])
    stage, params = ours["clip"]
    assert stage.embed_dim == EMBED and not stage.unit_embeds
    texts = (*stage.encode_text(params, tokens, mask), mask)
    # Guidance of a trained decoder multiplies rounding in the first steps; the prior has its guidance of 4.
    assert_same_run(theirs, ours, texts, monkeypatch, guidance=1.0)


def test_the_null_caption_is_not_trained(model):
    null = {name: modeldir.load_stage(model / name)[1] for name in ("prior", "decoder")}
    states = null["prior"]["net"]["null_text_states"]["embedding"]
    assert states.shape == (2, EMBED) and (states == null["decoder"]["null_text_states"]["embedding"]).all()

"""Recipes: each builds at full size without computing anything, and the paper's agree with its Table 3."""

import functools
import importlib
import json
import math
from pathlib import Path

import jax
import pytest

from configs import common
from dalle2_jax.data.settings import FIELDS, DataSettings
from dalle2_jax.models import models
from dalle2_jax.runtime import partition
from dalle2_jax.train import optim

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in ROOT.glob("configs/**/*.py")
    if path.stem not in ("__init__", "common") and "def get_config(" in path.read_text("utf-8")
)
PAPER = (
    "configs.clip",
    "configs.prior",
    "configs.decoder64",
    "configs.upsampler256",
    "configs.upsampler1024",
)
AR_PRIOR = "configs.ar_prior"  # of the paper too, in the place of the diffusion prior
MODERN = tuple(f"configs.modern.{name}" for name in ("prior", "decoder64", "upsampler256", "upsampler1024"))
MODERN_TINY = tuple(f"configs.modern.{name}" for name in ("tiny_prior", "tiny", "tiny_upsampler"))
DEBUG = (*PAPER, AR_PRIOR, *MODERN)
CASES = [(recipe, "") for recipe in RECIPES] + [(recipe, "debug") for recipe in DEBUG]
# Recipes beside a folder's cascade: what may take a stage's place, or steer one.
BESIDE = (".ar_prior", ".classifier", ".noisy_clip", ".decoder64", ".upsampler1024", ".folder")
BESIDE += (".judge_clip", ".judge_style")
TO_1024 = ("clip", "prior", "decoder64", "upsampler256", "upsampler1024")
# Cascades: CLIP, prior, decoder, upsamplers.
CASCADES = {
    "paper": PAPER,
    "paper, autoregressive": (PAPER[0], AR_PRIOR, *PAPER[2:]),
    "tiny, to 1024": tuple(f"configs.tiny.{name}" for name in TO_1024),
    "modern": (PAPER[0], *MODERN),
    "modern, tiny": ("configs.tiny.clip", *MODERN_TINY, "configs.tiny.upsampler256"),
    **{
        folder: tuple(
            sorted(
                (
                    name
                    for name in RECIPES
                    if name.startswith(f"configs.{folder}.") and not name.endswith(BESIDE)
                ),
                key=lambda name: (
                    ["clip", "prior", "decoder", "upsampler"].index(name.split(".")[-1].rstrip("0123456789")),
                    int("0" + "".join(c for c in name if c.isdigit())),
                ),
            )
        )
        for folder in ("tiny", "bundled", "emoji_styles")
    },
}

# Table 3 of arXiv 2204.06125, in its words and order, for the stages that we have.
TABLE = """
                          | prior  | decoder64 | upsampler256 | upsampler1024
Diffusion steps           | 1000   | 1000      | 1000         | 1000
Noise schedule            | cosine | cosine    | cosine       | linear
Sampling steps            | 64     | 250       | 27           | 15
Sampling variance method  | analytic | learned   | ddim         | ddim
Crop fraction             | -      | -         | 0.25         | 0.25
Channels                  | -      | 512       | 320          | 192
Depth                     | -      | 3         | 3            | 2
Channels multiple         | -      | 1,2,3,4   | 1,2,3,4      | 1,1,2,2,4,4
Heads channels            | -      | 64        | -            | -
Attention resolution      | -      | 32,16,8   | -            | -
Text encoder context      | 256    | 256       | -            | -
Text encoder width        | 2048   | 2048      | -            | -
Text encoder depth        | 24     | 24        | -            | -
Text encoder heads        | 32     | 32        | -            | -
Dropout                   | -      | 0.1       | 0.1          | -
Weight decay              | 6.0e-2 | -         | -            | -
Batch size                | 4096   | 2048      | 1024         | 512
Iterations                | 600000 | 800000    | 1000000      | 1000000
Learning rate             | 1.1e-4 | 1.2e-4    | 1.2e-4       | 1.0e-4
Adam beta2                | 0.96   | 0.999     | 0.999        | 0.999
Adam epsilon              | 1.0e-6 | 1.0e-8    | 1.0e-8       | 1.0e-8
EMA decay                 | 0.9999 | 0.9999    | 0.9999       | 0.9999
"""


def config_of(recipe: str, preset: str = "") -> dict:
    """A recipe as the plain types that are stored with its checkpoints."""
    return json.loads(json.dumps(models.to_plain(importlib.import_module(recipe).get_config(preset))))


@functools.cache
def _abstract(stage_and_model: str):
    stage = models.build_stage(json.loads(stage_and_model))
    return stage, models.abstract_params(stage)


def abstract(config: dict):
    """(stage, shapes of its parameters) of a config; equal models are traced once."""
    return _abstract(json.dumps({name: config[name] for name in ("stage", "model")}, sort_keys=True))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("recipe, preset", CASES)
def test_a_recipe_builds_at_full_size(recipe, preset):
    config = config_of(recipe, preset)
    stage, params = abstract(config)
    assert count(params) > 1000
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jax.numpy.dtype("float32")}
    assert set(stage.batch_spec(2)) <= set(FIELDS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_of_a_recipe_has_a_place_on_a_mesh(recipe):
    _, params = abstract(config_of(recipe))
    placed = partition.shardings({"params": params}, partition.make_mesh(data=1, fsdp=8))
    assert count(params) > 1000 and len(jax.tree.leaves(placed)) == len(jax.tree.leaves(params))


@pytest.mark.parametrize(
    "name", ["clip", "prior", "ar_prior", "decoder64", "upsampler256", "modern.decoder64"]
)
def test_each_device_holds_its_part_of_the_papers_stages(name):
    """Every leaf has a rule, and each of 8 devices holds about an eighth."""
    _, params = abstract(config_of(f"configs.{name}"))
    placed = jax.tree.leaves(partition.shardings(params, partition.make_mesh(1, 4, 2)))
    held = sum(
        math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(params), placed, strict=True)
    )
    assert count(params) / 8 <= held < 1.02 * count(params) / 8


def test_every_sharding_rule_is_one_that_a_recipe_uses(monkeypatch):
    trees = [abstract(config_of(recipe))[1] for recipe in RECIPES]
    adafactor = optim.make_optimizer(learning_rate=1e-4, num_steps=1, optimizer="adafactor")  # Imagen's
    trees.append(jax.eval_shape(adafactor.init, trees[0]))
    partition.check_rules(trees)
    dead = (r"(^|/)not_in_any_network/kernel$", partition.P())
    monkeypatch.setattr(partition, "RULES", (dead, *partition.RULES))
    with pytest.raises(ValueError, match="not_in_any_network") as error:
        partition.check_rules(trees)
    assert all(repr(pattern) not in str(error.value) for pattern, _ in partition.RULES[1:])


@pytest.mark.parametrize("recipe, preset", CASES)
def test_keywords_of_a_recipe_are_those_of_what_it_configures(recipe, preset):
    config = config_of(recipe, preset)
    assert set(config) == set(common.get_config())  # the loop reads these and no others
    options = {name: value for name, value in config["data"].items() if name != "eval_split"}
    models.check_keywords(DataSettings, options | {"fields": ()}, "data")
    assert not {"fields", "tokenizer", "seed", "image_size", "crop_size"} & set(
        options
    )  # the loop sets these
    optim.make_optimizer(**config["optim"], num_steps=config["num_steps"])
    assert set(config["mesh"]) == {"data", "fsdp", "tensor"}
    assert set(config["tokenizer"]) == {"path", "vocab_size", "context_length"}


@pytest.mark.parametrize("recipe, preset", CASES)
def test_numbers_of_a_recipe_fit_together(recipe, preset):
    config = config_of(recipe, preset)
    assert config["num_steps"] > 0 and 0 < config["ema_decay"] < 1
    # Eight devices, or a pod: any power of two up to a chip an example.
    assert config["batch_size"] % (8 * config["grad_accum"]) == 0
    text = config["model"].get("text")
    if text:
        assert text["context_length"] == config["tokenizer"]["context_length"]
        if "states_width" not in text:  # else a frozen encoder reads the tokens
            assert text["vocab_size"] >= config["tokenizer"]["vocab_size"]
    if preset == "debug":
        assert config["num_steps"] == 2 and config["data"]["source"] == "scenes"
        assert count(abstract(config)[1]) < 1e6


@pytest.mark.parametrize("recipe", RECIPES)
def test_unknown_presets_are_refused(recipe):
    with pytest.raises(ValueError, match="preset 'debgu' is unknown"):
        importlib.import_module(recipe).get_config("debgu")


@pytest.mark.parametrize(
    ("cascade", "preset"), [(cascade, "") for cascade in CASCADES] + [("paper", "debug"), ("modern", "debug")]
)
def test_stages_of_a_cascade_fit_together(cascade, preset):
    clip, prior, decoder, *upsamplers = [config_of(recipe, preset)["model"] for recipe in CASCADES[cascade]]
    assert clip["embed_dim"] == prior["embed_dim"] == decoder["embed_dim"]
    assert upsamplers
    side = decoder["image_size"]
    for upsampler in upsamplers:
        assert upsampler["low_res_size"] == side
        side = upsampler["image_size"]
    languages = {config_of(recipe)["data"]["language"] for recipe in CASCADES[cascade]}
    assert len(languages) == 1


def test_the_cascade_of_emoji_fits_the_package_and_mirrors_nothing():
    """Four stages in bfloat16, with less than 40 MB; arrows, clocks and letters stay as they are."""
    configs = [config_of(recipe) for recipe in CASCADES["emoji_styles"]]
    assert [config["stage"] for config in configs] == ["clip", "prior", "decoder", "upsampler"]
    assert 30e6 < 2 * sum(count(abstract(config)[1]) for config in configs) < 40e6
    assert not any(config["data"]["flip"] for config in configs)


# --- the paper ---


def column(recipe: str) -> dict[str, str]:
    """A stage's column of the table."""
    head, *lines = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip("\n").splitlines()]
    return {line[0]: line[head.index(recipe)] for line in lines}


def in_the_papers_words(config: dict) -> dict[str, object]:
    """What `column` says, read from a config; None where it has no such setting."""
    stage, _ = abstract(config)
    model, settings = config["model"], config["optim"]
    text = model.get("text") or {}
    image_size, crop_size = model.get("image_size"), model.get("crop_size")
    learned = stage.diffusion.method == "ddpm" and stage.diffusion.learned_variance
    variance = "learned" if learned else stage.diffusion.method
    return {
        "Diffusion steps": stage.diffusion.schedule.num_timesteps,
        "Noise schedule": model["schedule"],
        "Sampling steps": stage.diffusion.num_steps,
        "Sampling variance method": variance,
        "Crop fraction": crop_size and crop_size / image_size,
        "Channels": model.get("channels"),
        "Depth": model.get("num_res_blocks"),
        "Channels multiple": model.get("channel_mult"),
        "Heads channels": model.get("head_dim"),
        "Attention resolution": model.get("attention_resolutions"),
        "Text encoder context": text.get("context_length"),
        "Text encoder width": text.get("width"),
        "Text encoder depth": text.get("depth"),
        "Text encoder heads": text.get("num_heads"),
        "Dropout": model.get("dropout"),
        "Weight decay": settings["weight_decay"],
        "Batch size": config["batch_size"],
        "Iterations": config["num_steps"],
        "Learning rate": settings["learning_rate"],
        "Adam beta2": settings["beta2"],
        "Adam epsilon": settings["eps"],
        "EMA decay": config["ema_decay"],
    }


@pytest.mark.parametrize("recipe", PAPER[1:])
def test_the_papers_recipes_hold_table_3(recipe):
    config = config_of(recipe)
    said = in_the_papers_words(config)
    expected = column(recipe.removeprefix("configs."))
    assert set(said) == set(expected)
    for name, cell in expected.items():
        value = said[name]
        if cell == "-":
            assert not value, name
        elif isinstance(value, list):
            assert value == [int(part) for part in cell.split(",")], name
        elif isinstance(value, str):
            assert value == cell, name
        else:
            assert value == float(cell), name
    assert config["optim"]["beta1"] == 0.9


def test_the_papers_autoregressive_recipe_holds_table_3():
    config = config_of(AR_PRIOR)
    model, settings = config["model"], config["optim"]
    text = dict(vocab_size=49408, context_length=256, width=2048, depth=24, num_heads=32)
    assert model["text"] == text and model["latent"] == dict(width=1664, depth=24, num_heads=26)
    assert (model["num_components"], model["num_buckets"], model["text_drop"]) == (319, 1024, 0.1)
    assert abstract(config)[0].net.num_codes + 1 <= 384  # the latent decoder's context
    named = {name: settings[name] for name in ("learning_rate", "beta2", "eps", "weight_decay")}
    assert named == dict(learning_rate=1.6e-4, beta2=0.91, eps=1e-10, weight_decay=4e-2)
    assert (config["batch_size"], config["num_steps"], config["ema_decay"]) == (4096, 1_000_000, 0.999)


def test_the_papers_dropping_rates_guidance_and_clip():
    """Sections 1.3, 1.4 and 1.7 of the facts, where Table 3 is silent."""
    decoder, prior, clip = (config_of(f"configs.{name}") for name in ("decoder64", "prior", "clip"))
    assert (decoder["model"]["image_drop"], decoder["model"]["text_drop"]) == (0.1, 0.5)
    assert (prior["model"]["text_drop"], prior["model"]["num_candidates"]) == (0.1, 2)
    assert abstract(decoder)[0].net.num_image_tokens == 4
    assert (clip["model"]["sam_rho"], clip["model"]["sam_batch_size"]) == (0.1, 64)
    assert clip["optim"]["learning_rate"] == 3e-4
    assert (clip["model"]["embed_dim"], clip["model"]["image_size"]) == (1024, 256)
    for name, degradation in (("upsampler256", (1.0, "")), ("upsampler1024", (0, "full"))):
        data = config_of(f"configs.{name}")["data"]
        assert (data.get("low_res_blur", 0), data.get("low_res_bsr", "")) == degradation


def sizes() -> dict[str, tuple[int, float, float]]:
    """What is counted -> (parameters, expected, tolerance)."""
    trees = {name: abstract(config_of(name))[1] for name in PAPER}
    decoder, prior = trees["configs.decoder64"], trees["configs.prior"]
    blocks = prior["net"]["transformer"]
    latent = abstract(config_of(AR_PRIOR))[1]["net"]
    code_decoder = sum(count(x) for name, x in latent.items() if name.startswith("block_"))
    return {
        "decoder": (count(decoder), 3.555e9, 0.02),
        "  its text transformer": (count(decoder["text_net"]), 1.317e9, 0.02),
        "  the rest of it": (count(decoder) - count(decoder["text_net"]), 2.238e9, 0.02),
        "upsampler 64 -> 256": (count(trees["configs.upsampler256"]), 730e6, 0.01),
        "upsampler 256 -> 1024": (count(trees["configs.upsampler1024"]), 282e6, 0.01),
        "prior's transformer": (count(blocks), 1.21e9, 0.01),
        "CLIP": (count(trees["configs.clip"]), 986e6, 0.01),
        "AR prior's text encoder": (count(latent["text_transformer"]), 1.21e9, 0.01),
        "AR prior's code decoder": (code_decoder, 1.094e9, 0.01),
    }


def test_the_papers_stages_have_the_papers_sizes(capsys):
    """Expected: section 1.1 of the facts, recomputed from the published code at Table 3's sizes."""
    counted = sizes()
    with capsys.disabled():
        print()
        for name, (number, expected, _) in counted.items():
            print(f"{name:24s} {number:13,d} parameters, expected {expected / 1e6:7,.0f}M")
    for name, (number, expected, tolerance) in counted.items():
        assert abs(number / expected - 1) < tolerance, name

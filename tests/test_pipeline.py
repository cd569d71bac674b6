"""Drawing with a model directory: a picture is its own, settings are heard, errors are clear."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import dalle2_jax
from dalle2_jax import pipeline
from dalle2_jax.generate.captions import labels
from dalle2_jax.generate.engine import Task, Timing
from dalle2_jax.models import models
from dalle2_jax.models.diffusion import gaussian, schedules
from dalle2_jax.models.stages import diffusion
from dalle2_jax.runtime import partition
from dalle2_jax.systems import cascade
from tests.tiny_model import CAPTIONS, make_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory):
    return pipeline.UnCLIP.load(directory)


@pytest.fixture(scope="module")
def drawn(model):
    return model.text_to_image(CAPTIONS, n=2, seed=5)


def levels(a, b) -> int:
    """The largest difference of two uint8 arrays."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_what_comes_out(drawn):
    assert drawn.captions == tuple(caption for caption in CAPTIONS for _ in range(2))
    assert drawn.numbers == (0, 1) * 3 and drawn.seed == 5
    assert drawn.image_embeds.shape == (6, 32)
    assert drawn.base.shape == (6, 8, 8, 3) and drawn.base.dtype == np.uint8
    assert drawn.images.shape == (6, 32, 32, 3) and drawn.images.dtype == np.uint8
    assert list(drawn.timings) == ["text", "prior", "decoder", "upsampler32"]
    assert [timing.examples for timing in drawn.timings.values()] == [6, 6, 6, 6]
    json.dumps(drawn.settings)


def test_the_librarys_door_draws_the_same(directory, drawn):
    again = dalle2_jax.load(directory)(CAPTIONS, n=2, seed=5)
    np.testing.assert_array_equal(again.images, drawn.images)
    with pytest.raises(FileNotFoundError):
        dalle2_jax.load(directory / "nowhere")


def test_pictures_of_a_caption_and_of_captions_differ(drawn):
    for i in range(6):
        for j in range(i):
            assert levels(drawn.base[i], drawn.base[j]) > 20


def test_the_same_seed_gives_the_same_pictures_and_another_does_not(model, drawn):
    again = model.text_to_image(CAPTIONS, n=2, seed=5)
    np.testing.assert_array_equal(again.images, drawn.images)
    assert sum(timing.compile_seconds for timing in again.timings.values()) < 0.01
    other = model.text_to_image(CAPTIONS, n=2, seed=6)
    assert min(levels(a, b) for a, b in zip(other.base, drawn.base, strict=True)) > 20


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(model, drawn):
    for i, caption in enumerate(CAPTIONS):
        alone = model.text_to_image([caption], n=2, seed=5, batch_size=8)
        assert levels(alone.images, drawn.images[2 * i : 2 * i + 2]) <= 1
    more = model.text_to_image(["a blue star", *CAPTIONS], n=3, seed=5, batch_size=8)  # two micro-batches
    kept = [3 * (1 + i) + j for i in range(3) for j in range(2)]
    assert levels(more.images[kept], drawn.images) <= 1


def test_a_picture_does_not_depend_on_the_devices(directory, drawn):
    mesh = partition.make_mesh(devices=jax.devices()[:1])
    one = pipeline.UnCLIP.load(directory, mesh=mesh)
    alone, _ = one.decode(drawn.image_embeds[2:4], CAPTIONS[1:2] * 2, seed=5, batch_size=1)
    assert levels(alone, drawn.base[2:4]) <= 1


def test_little_memory_holds_one_stage_as_it_is_stored_and_draws_the_same(drawn, tmp_path):
    make_model(tmp_path, "bfloat16")
    plenty, little = (pipeline.UnCLIP.load(tmp_path, low_memory=low) for low in (False, True))
    pictures = []
    for model in (plenty, little):
        base, _ = model.decode(drawn.image_embeds[:2], CAPTIONS[:1] * 2, seed=5)
        pictures.append(model.upsample(base, seed=5)[0])
    assert levels(*pictures) <= 1
    held = [{name: jax.tree.leaves(p) for name, p in m.engine._params.items()} for m in (plenty, little)]
    assert set(held[0]) == {"decoder", "upsampler32"} and set(held[1]) == {"upsampler32"}
    assert {str(leaf.dtype) for leaf in held[0]["upsampler32"]} == {"float32"}
    assert {str(leaf.dtype) for leaf in held[1]["upsampler32"]} == {"bfloat16"}


def test_guidance_changes_the_picture_and_compiles_nothing(model, drawn):
    strong = model.text_to_image(CAPTIONS, n=2, seed=5, guidance_scale=6.0)
    assert strong.settings["decoder"]["guidance_scale"] == 6.0
    assert levels(strong.base, drawn.base) > 20
    assert strong.timings["decoder"].compile_seconds < 0.01


def test_a_guidance_scale_of_one_is_no_guidance(model):
    embeds = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    none, _ = model.decode(embeds, CAPTIONS[:2], guidance_scale=1)
    nearly, _ = model.decode(embeds, CAPTIONS[:2], guidance_scale=1 + 1e-6)  # the program with the null half
    assert levels(none, nearly) <= 1


def test_the_caption_reaches_the_decoder(model):
    embeds = np.ones((3, 32), np.float32)
    pictures, _ = model.decode(embeds, [*CAPTIONS[:2], CAPTIONS[0]], numbers=[0, 0, 0])
    assert levels(pictures[0], pictures[1]) > 10
    assert levels(pictures[0], pictures[2]) == 0
    null, _ = model.decode(embeds[:1], None, numbers=[0])
    assert levels(pictures[0], null[0]) > 10


def test_stages_one_by_one_are_the_whole(model, drawn):
    embeds, _ = model.sample_prior(CAPTIONS, n=2, seed=5)
    np.testing.assert_array_equal(embeds, drawn.image_embeds)
    base, _ = model.decode(embeds, drawn.captions, seed=5, numbers=drawn.numbers)
    np.testing.assert_array_equal(base, drawn.base)
    images, _ = model.upsample(base, seed=5, numbers=drawn.numbers)
    np.testing.assert_array_equal(images, drawn.images)


@pytest.mark.parametrize("numbers", [[0, 1], [0, 1, 2, 3]], ids=["too few", "too many"])
def test_numbers_are_one_for_each_of_what_is_drawn(model, drawn, numbers):
    count = f"need as many numbers, got {len(numbers)}"
    with pytest.raises(ValueError, match=f"^3 captions {count}"):
        model.sample_prior(CAPTIONS, numbers=numbers)
    with pytest.raises(ValueError, match=f"^3 image embeddings {count}"):
        model.decode(drawn.image_embeds[:3], numbers=numbers)
    with pytest.raises(ValueError, match=f"^3 pictures {count}"):
        model.upsample(drawn.base[:3], numbers=numbers)
    with pytest.raises(ValueError, match="^3 pictures need as many captions, got 1"):
        model.upsample(drawn.base[:3], CAPTIONS[:1])


def test_the_pipeline_runs_what_the_stages_define(model, drawn):
    """The prior's sample of one caption by hand: tokens, CLIP, key, and the stage's own defaults."""
    clip, prior = model.engine.stage("clip"), model.engine.stage("prior")
    tokens, mask = model.engine.tokenizer("prior")(CAPTIONS[2:])
    text_embed, _ = jax.jit(clip.encode_text)(model.engine.params("clip"), tokens, mask)
    batch = {"text_embed": text_embed, "tokens": tokens, "token_mask": mask}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), 0)
    embed = jax.jit(prior.sample)(model.engine.params("prior"), key[None], batch)
    np.testing.assert_allclose(embed[0], drawn.image_embeds[5], atol=1e-4)


def test_pictures_reach_clip_as_in_training(model):
    from PIL import Image

    wide = np.random.default_rng(0).integers(0, 255, (40, 70, 3)).astype(np.uint8)
    array, picture = model.encode_image([wide]), model.encode_image([Image.fromarray(wide)])
    np.testing.assert_array_equal(array, picture)
    np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)
    clip = model.engine.stage("clip")
    small = Image.fromarray(wide).resize((56, 32), Image.Resampling.BICUBIC).crop((12, 0, 44, 32))
    pixels = np.asarray(small)[None] / np.float32(127.5) - 1
    by_hand = jax.jit(clip.encode_image)(model.engine.params("clip"), pixels)
    np.testing.assert_allclose(array, by_hand, atol=1e-5)


def test_a_transparent_picture_is_laid_on_white(model):
    from PIL import Image

    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    np.testing.assert_array_equal(
        model.encode_image([clear]), model.encode_image([np.full((40, 40, 3), 255, np.uint8)])
    )


def test_captions_that_are_cut_are_reported(model):
    assert model.cut_captions(CAPTIONS) == []
    lines = model.cut_captions([CAPTIONS[0], "a red star " * 30])
    assert len(lines) == 1 and lines[0].startswith("caption 2 is too long by ")


def test_progress_counts_pictures(model):
    seen = []
    model.decode(np.ones((10, 32), np.float32), progress=lambda *told: seen.append(told[:3]), batch_size=8)
    assert seen == [("decoder", 8, 10), ("decoder", 10, 10)]


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [
        ([], {}, "at least one caption"),
        ("a red star", {}, "a list of texts"),
        (["a red star", "  "], {}, "caption 2 is empty"),
        (["x" * 1001], {}, "1001 characters"),
        ([None], {}, "must be texts"),
        (["a"], dict(seed=-1), "seed -1"),
        (["a"], dict(n=0), "n 0"),
        (["a"], dict(guidance_scale=-1.0), "decoder: guidance_scale -1.0"),
        (["a"], dict(prior_guidance_scale=float("nan")), "prior: guidance_scale nan"),
        (["a"], dict(prior_steps=0), "prior: num_steps 0"),
        (["a"], dict(decoder_steps=1001), "decoder: num_steps must be between 1 and .* 1000, got 1001"),
        (["a"], dict(upsampler_steps=[3, 3]), "has 1 upsampler"),
        (["a"], dict(upsampler_steps=[0]), "upsampler32: num_steps 0"),
        (["a"], dict(method="dpm"), "method 'dpm'"),
        (["a"], dict(eta=0.5), "eta 0.5 has no meaning"),
        (["a"], dict(method="ddim", eta=2.0), "eta 2.0"),
        (["a"], dict(batch_size=0), "batch_size 0"),
        (["a"], dict(prior_method="eulre"), "method 'eulre'"),
        (["a"], dict(prior_candidates=0), "prior: num_candidates 0"),
        (["a"], dict(noisy_clip=1.0), "has no noisy_clip: it has clip, prior, decoder"),
        (["a"], dict(method="analytic"), "decoder: method 'analytic' needs statistics"),
        (["a"], dict(prior_eta=0.5), "prior: eta 0.5 has no meaning"),
        (["a"], dict(prior_temperature=0.5), "prior: temperature has no meaning for a stage 'prior'"),
        (["a"], dict(upsampler_method="ddpmm"), "upsampler32: method 'ddpmm'"),
        (["a"], dict(tile=0), "upsampler32: tile 0 must be a multiple"),
        (
            ["a"],
            dict(spacing="fast27", decoder_steps=5),
            "decoder: spacing 'fast27' is 27 steps of 1000, not 5",
        ),
        (["a"], dict(threshold=101.0), "decoder: threshold 101"),
        (
            ["a"],
            dict(guidance_interval=(3.0, 1.0)),
            "decoder: guidance_interval 3,1 must be two noise levels",
        ),
        (["a"], dict(prior_guidance_interval=(0.2, 3.0)), "prior: guidance_interval has no meaning without"),
        (["a"], dict(gudance_scale=2.0), "no setting of sampling; did you mean 'guidance_scale'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, captions, settings, message):
    with pytest.raises(ValueError, match=message):
        model.text_to_image(captions, **settings)


def test_bad_directories_are_named(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        pipeline.UnCLIP.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        pipeline.UnCLIP.load(tmp_path)

    def broken(name):
        return shutil.copytree(directory, tmp_path / name)

    copy = broken("no_weights")
    (copy / "prior" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="prior"):
        pipeline.UnCLIP.load(copy)
    copy = broken("not_json")
    (copy / "decoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="decoder/config.json is damaged"):
        pipeline.UnCLIP.load(copy)
    copy = broken("misspelt")
    config = json.loads((copy / "decoder" / "config.json").read_text())
    config["model"]["chanels"] = config["model"].pop("channels")
    (copy / "decoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="did you mean model.channels"):
        pipeline.UnCLIP.load(copy)
    copy = broken("other_weights")
    shutil.copy(copy / "prior" / "model.safetensors", copy / "clip" / "model.safetensors")
    with pytest.raises(ValueError, match="clip and the model do not fit"):
        pipeline.UnCLIP.load(copy).encode_text(["a"])


def test_stages_that_do_not_fit_are_named(model):
    engine = model.engine

    def check(configs, stages, vocab_size):
        cascade.check(configs, stages, dict.fromkeys(stages, vocab_size), {})

    def changed(name, **changes):
        config = json.loads(json.dumps(engine.configs[name]))
        config["model"] |= changes
        return engine.configs | {name: config}, engine.stages | {name: models.build_stage(config)}

    check(engine.configs, engine.stages, 512)
    with pytest.raises(ValueError, match="the decoder has embeddings of 16 entries, CLIP of 32"):
        check(*changed("decoder", embed_dim=16), 512)
    with pytest.raises(ValueError, match="side 4, the decoder draws side 8"):
        check(*changed("upsampler32", low_res_size=4), 512)
    with pytest.raises(ValueError, match="513 tokens, the clip knows 512"):
        check(engine.configs, engine.stages, 513)


def test_a_stage_that_is_missing_is_named(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "no_prior")
    index = json.loads((copy / "model_index.json").read_text())
    del index["stages"]["prior"]
    (copy / "model_index.json").write_text(json.dumps(index))
    model = pipeline.UnCLIP.load(copy)
    with pytest.raises(ValueError, match="has no prior: it has clip, decoder, upsampler32"):
        model.text_to_image(["a"])


def test_steps_reach_the_schedule(model, monkeypatch):
    asked = []

    def trace(task, rows, **_):
        """`Engine.run` without compiling and running."""
        output = jax.eval_shape(task.function, model.engine.params(task.name), rows, task.scalars)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), output), Timing(1, task.steps, 0.0, 0.0)

    monkeypatch.setattr(model.engine, "run", trace)
    monkeypatch.setattr(model.engine, "prepare", lambda *_: None)
    original = schedules.space_timesteps
    monkeypatch.setattr(schedules, "space_timesteps", lambda n, *rest: asked.append(n) or original(n, *rest))
    result = model.text_to_image(["a"], prior_steps=2, decoder_steps=3, upsampler_steps=[5])
    assert asked == 2 * [2, 3, 5]  # by the check of the settings, and by the programs
    assert [result.settings[name]["num_steps"] for name in result.settings] == [2, 3, 5]
    asked.clear()
    result = model.text_to_image(["a"], upsample=False)
    assert asked == [4, 4, 4, *[4, 4]] and list(result.settings) == ["prior", "decoder"]
    np.testing.assert_array_equal(result.images, result.base)


def test_samplers_and_windows_reach_the_stages(model, monkeypatch):
    used = []

    def trace(task, rows, **_):
        """`Engine.run` without compiling and running."""
        output = jax.eval_shape(task.function, model.engine.params(task.name), rows, task.scalars)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), output), Timing(1, task.steps, 0.0, 0.0)

    def sample(process, denoise, keys, shape, **_):
        used.append((len(process.timesteps()), process.method, process.eta))
        noise = jax.numpy.zeros((len(keys), *shape))
        denoise(noise, jax.numpy.zeros(len(noise), int))
        return noise

    windows, thresholds = [], []
    monkeypatch.setattr(model.engine, "run", trace)
    monkeypatch.setattr(model.engine, "prepare", lambda *_: None)
    monkeypatch.setattr(gaussian.GaussianDiffusion, "sample", sample)
    in_tiles, bounded = diffusion.in_tiles, gaussian.dynamic_threshold
    monkeypatch.setattr(
        diffusion, "in_tiles", lambda f, x, tile: windows.append(tile) or in_tiles(f, x, tile)
    )
    monkeypatch.setattr(
        gaussian,
        "dynamic_threshold",
        lambda d, s, share, *most: thresholds.append(share) or bounded(d, s, share, *most),
    )
    model.text_to_image(
        ["a"],
        prior_method="ddim",
        prior_eta=0.25,
        spacing="sections:2,1",
        decoder_steps=3,
        threshold=99.0,
        upsampler_method="ddim",
        upsampler_eta=0.5,
        tile=16,
    )
    assert used == [(4, "ddim", 0.25), (3, "ddpm", 0.0), (4, "ddim", 0.5)]
    assert windows == [16] and thresholds == [99.0]


def test_a_program_that_failed_is_tried_again(model):
    tries = []

    def function(params, batch, scalars):
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("out of memory")
        return batch["x"] + scalars["add"]

    rows = {"x": jax.ShapeDtypeStruct((), np.float32)}
    task = Task("clip", function, ("test",), rows, {"add": np.float32(2)})
    with pytest.raises(RuntimeError, match="out of memory"):
        model.engine.run(task, {"x": np.arange(3)})
    output, timing = model.engine.run(task, {"x": np.arange(3)})
    np.testing.assert_array_equal(output, [2, 3, 4])
    assert len(tries) == 2 and timing.examples == 3


# An autoregressive prior and guides


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    return pipeline.UnCLIP.load(make_model(tmp_path_factory.mktemp("extended"), extended=True))


def test_every_sampler_of_the_prior_draws(model):
    drawn = {}
    for method in ("ddpm", "ddim", "analytic", "dpm++"):
        drawn[method], _ = model.sample_prior(CAPTIONS[:1], seed=5, method=method)
        assert np.isfinite(drawn[method]).all()
    for a, b in itertools.combinations(drawn.values(), 2):
        assert np.abs(a - b).max() > 1e-4


def test_an_autoregressive_prior_takes_the_place_of_the_other(extended):
    embeds, timings = extended.sample_prior(CAPTIONS, seed=5, n=2)
    assert embeds.shape == (6, 32) and np.isfinite(embeds).all() and timings["prior"].examples == 6
    alone, _ = extended.sample_prior(CAPTIONS[1:2], seed=5, n=2)
    np.testing.assert_allclose(alone, embeds[2:4], atol=1e-5)
    assert set(extended.settings()["prior"]) == {
        "guidance_scale",
        "num_candidates",
        "temperature",
        "dot_quantile",
    }
    with pytest.raises(ValueError, match="prior: num_steps has no meaning for a stage 'ar_prior'"):
        extended.settings(prior_steps=3)


@pytest.mark.parametrize("guide", [pytest.param("noisy_clip", marks=pytest.mark.slow), "classifier"])
def test_guides_steer_the_decoder_to_the_caption(extended, guide):
    embeds = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    captions = ["a red star", "a yellow circle"]
    plain, _ = extended.decode(embeds, captions, seed=1)
    steered, _ = extended.decode(embeds, captions, seed=1, **{guide: 300.0})
    assert levels(plain, steered) > 0
    none, _ = extended.decode(embeds, captions, seed=1, **{guide: 0.0})
    np.testing.assert_array_equal(none, plain)
    # what it says of the finished pictures has risen
    stage, params = extended.engine.stage(guide), extended.engine.params(guide)
    if guide == "classifier":
        target = labels(extended.engine, captions, guide)
        assert target.tolist() == [0, 2]
    else:
        tokens, mask = extended.engine.tokenizer(guide)(captions)
        target = jax.jit(stage.encode_text)(params, tokens, mask)[0]
    t, log_p = np.zeros(2, np.int32), jax.jit(stage.log_p)
    before, after = (log_p(params, x / np.float32(127.5) - 1, t, target) for x in (plain, steered))
    assert (after > before).all()


def test_guides_that_cannot_steer_say_why(extended):
    with pytest.raises(ValueError, match="'a red star above a blue ring' does not name exactly one class"):
        extended.text_to_image(CAPTIONS[:1], classifier=1.0)
    with pytest.raises(ValueError, match="classifier -1.0 must lie in"):
        extended.settings(classifier=-1.0)
    with pytest.raises(ValueError, match="steer to captions"):
        extended.decode(np.zeros((1, 32), np.float32), classifier=1.0)
    configs, stages = extended.engine.configs, extended.engine.stages
    for name, stage, message in (
        ("noisy_clip", stages["clip"], "noisy_clip was not trained on noised pictures"),
        ("classifier", dataclasses.replace(stages["classifier"], image_size=16), "classifier reads pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            cascade.check(configs, stages | {name: stage}, {}, {})

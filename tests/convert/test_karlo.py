"""Karlo in diffusers' layout: networks and whole runs equal UnCLIPPipeline's, and back again to the bit."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.models.diffusion import sampling
from dalle2_jax.runtime import modeldir
from tests.data.test_tokenizer import data_dir

torch = pytest.importorskip("torch", reason="the oracle is diffusers' UnCLIPPipeline")
diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers' UnCLIPPipeline")
transformers = pytest.importorskip("transformers", reason="the oracle is diffusers' UnCLIPPipeline")

from tests.convert import torch_files, unclip_pipeline  # noqa: E402 (it imports torch)
from tests.convert.unclip_pipeline import EMBED, LARGE, SIDE  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CAPTION = "a red star"
FOLDERS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, the pipeline that is in it)."""
    folder = tmp_path_factory.mktemp("karlo")
    return folder, unclip_pipeline.write(folder)


@pytest.fixture(scope="module")
def source(written):
    return written[0]


@pytest.fixture(scope="module")
def theirs(written):
    return written[1]


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "karlo"
    convert.convert_weights("karlo", source, out, dtype="float32")
    return out


def test_checkpoints_of_training_are_the_same_model(source, converted, tmp_path):
    folder = torch_files.wrap_folder(source, tmp_path / "wrapped")
    convert.convert_weights("karlo", folder, tmp_path / "out", dtype="float32")
    assert torch_files.weights(tmp_path / "out") == torch_files.weights(converted)


def load_stages(model):
    """Role -> (stage, parameters)."""
    roles = ("clip", "prior", "decoder", "upsampler16")
    return {role: models.load_stage(model, role)[::2] for role in roles}


@pytest.fixture(scope="module")
def ours(converted):
    return load_stages(converted)


@pytest.fixture(scope="module")
def texts(converted, ours):
    """(text_embed, text_states, token_mask) of the caption, by our CLIP."""
    tokens, mask = convert.load_tokenizer(converted / "tokenizer")([CAPTION])
    stage, params = ours["clip"]
    return (*stage.encode_text(params, tokens, mask), mask)


def assert_close(actual, expected, scale=1e-4):
    expected = expected.detach().numpy()
    if expected.ndim == 4:
        expected = np.moveaxis(expected, 1, -1)
    assert expected.std() > 1e-2
    np.testing.assert_allclose(actual, expected, atol=scale * np.abs(expected).max(), rtol=0)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def test_the_text_tower_is_the_same_and_embeddings_keep_their_norm(theirs, texts):
    embeds, states, mask = theirs._encode_prompt(CAPTION, "cpu", 1, False)
    assert_close(texts[0], embeds, 1e-5)
    assert_close(texts[1], states, 1e-5)
    np.testing.assert_array_equal(texts[2], mask.numpy())
    assert abs(float(jnp.linalg.norm(texts[0])) - 1) > 0.1


def conditions(theirs, texts):
    """(embeds, states, mask) of theirs, and ours, for the null caption and the caption."""
    both = theirs._encode_prompt(CAPTION, "cpu", 1, True)
    return both, [jnp.repeat(x, 2, axis=0) for x in texts], jnp.array([True, False])


@pytest.mark.parametrize("t", [0, 999])
def test_the_prior_is_the_same_with_and_without_a_caption(theirs, ours, texts, t):
    both, own, drop = conditions(theirs, texts)
    x_t, times = normal(2, EMBED), np.array([t, t])
    with torch.no_grad():
        expected = theirs.prior(
            torch.from_numpy(x_t), torch.from_numpy(times), both[0], both[1], both[2]
        ).predicted_image_embedding
    stage, params = ours["prior"]
    actual = stage.net.apply({"params": params["net"]}, x_t, times, *own, drop)
    assert_close(actual, expected)
    assert np.abs(actual[0] - actual[1]).max() > 1e-3
    expected = theirs.prior.post_process_latents(expected)
    assert_close(stage.embed_scale.inverse(params, actual), expected)


def test_the_decoder_is_the_same_with_and_without_conditions(theirs, ours, texts):
    both, (embed, states, mask), drop = conditions(theirs, texts)
    x_t, z, times = normal(2, SIDE, SIDE, 3), normal(1, EMBED), np.array([871, 871])
    with torch.no_grad():
        context, added = theirs.text_proj(
            image_embeddings=torch.from_numpy(z),
            prompt_embeds=both[0],
            text_encoder_hidden_states=both[1],
            do_classifier_free_guidance=True,
        )
        mask_4 = torch.nn.functional.pad(both[2], (4, 0), value=True)
        expected = theirs.decoder(
            channels_first(x_t), torch.from_numpy(times), context, class_labels=added, attention_mask=mask_4
        ).sample
    stage, params = ours["decoder"]
    image_embed = np.repeat(z, 2, axis=0)
    apply = jax.jit(stage.net.apply)

    def conditions_of(drop):
        image = dict(image_embed=image_embed, drop_image=drop)
        return image | dict(text=states, token_mask=mask, drop_text=drop, text_embed=embed)

    actual = apply({"params": params}, x_t, times, conditions_of(drop))
    assert_close(actual, expected)
    swapped = apply({"params": params}, x_t, times, conditions_of(~drop))
    assert np.abs(swapped - actual).max() > 1e-3  # what is dropped matters


@pytest.mark.parametrize("network", ["first", "last"])
def test_both_networks_of_the_upsampler_are_the_same(theirs, ours, network):
    x_t, low_res, times = normal(1, LARGE, LARGE, 3), normal(1, LARGE, LARGE, 3)[:, ::-1], np.array([321])
    both = np.concatenate([x_t, low_res], axis=-1)
    with torch.no_grad():
        expected = getattr(theirs, f"super_res_{network}")(
            channels_first(both), torch.from_numpy(times)
        ).sample
    stage, params = ours["upsampler16"]
    params = params["last"] if network == "last" else {k: v for k, v in params.items() if k != "last"}
    assert_close(jax.jit(stage.net.apply)({"params": params}, x_t, times, {}, low_res), expected)


def assert_same_run(theirs, ours, texts, monkeypatch, guidance=8.0):
    """The same picture of CAPTION, with the same first noise, and none at the steps; each of our stages
    starts from what theirs drew."""
    from diffusers.schedulers import scheduling_unclip

    drawn = {}
    interpolate = torch.nn.functional.interpolate

    @functools.wraps(interpolate)  # the pipeline looks at its signature
    def watched(x, *args, **kwargs):
        if kwargs.get("mode") == "bicubic":
            drawn["base"] = x
            x = ((x + 1) * 127.5).round() / 127.5 - 1  # ours pass pictures of 256 levels on
        return interpolate(x, *args, **kwargs)

    def no_noise(shape, **kwargs):
        return torch.zeros(shape)

    quiet = sampling._normal
    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", no_noise)
    monkeypatch.setattr(
        sampling, "_normal", lambda keys, fold, shape: jnp.zeros((len(keys), *shape), jnp.float32)
    )
    keys = jax.random.split(jax.random.key(0), 1)
    x_T = {"prior": (EMBED,), "decoder": (SIDE, SIDE, 3), "upsampler16": (LARGE, LARGE, 3)}
    x_T = {name: np.asarray(quiet(keys, 1, shape)) for name, shape in x_T.items()}
    monkeypatch.setattr(sampling, "init_noise", lambda keys, shape: jnp.asarray(wanted))
    project = theirs.text_proj.forward

    def proj(**inputs):
        drawn["embed"] = inputs["image_embeddings"]
        return project(**inputs)

    monkeypatch.setattr(theirs.text_proj, "forward", proj)
    expected = theirs(
        CAPTION,
        prior_num_inference_steps=5,
        decoder_num_inference_steps=4,
        super_res_num_inference_steps=3,
        prior_latents=torch.from_numpy(x_T["prior"].copy()),
        decoder_latents=channels_first(x_T["decoder"]),
        super_res_latents=channels_first(x_T["upsampler16"]),
        decoder_guidance_scale=guidance,
        output_type="np",
    ).images

    batch = dict(zip(("text_embed", "text_states", "token_mask"), texts, strict=True))
    steps = {"prior": 5, "decoder": 4, "upsampler16": 3}
    given = {
        "decoder": {"image_embed": drawn["embed"].detach().numpy()},
        "upsampler16": {"low_res": np.moveaxis(drawn["base"].numpy(), 1, -1)},
    }
    samples = {}
    for role, (stage, params) in list(ours.items())[1:]:
        wanted = x_T[role]
        how = {"num_steps": steps[role]} | ({"guidance_scale": guidance} if role == "decoder" else {})
        sample = jax.jit(lambda p, b, s=stage, how=how: s.sample(p, keys, b, **how))
        samples[role] = sample(params, batch | given.get(role, {}))
    assert_close(samples["prior"], drawn["embed"], 1e-3)
    assert_close((samples["decoder"] + 1) / 2, (drawn["base"] + 1) / 2, 2e-3)
    assert expected.std() > 0.05
    np.testing.assert_allclose((samples["upsampler16"] + 1) / 2, expected, atol=2e-3)


def test_a_whole_run_is_the_same(theirs, ours, texts, monkeypatch):
    assert_same_run(theirs, ours, texts, monkeypatch)


def test_it_draws_and_says_what_it_was_made_from(converted):
    model = pipeline.UnCLIP.load(converted)
    result = model.text_to_image([CAPTION], prior_steps=2, decoder_steps=2, upsampler_steps=[2])
    assert result.images.shape == (1, LARGE, LARGE, 3)
    index = modeldir.read_index(converted)
    assert index["made_from"]["format"] == "karlo" and "OpenRAIL" in index["licence"]
    card = (converted / "README.md").read_text()
    assert index["licence"] in card and all(x in card for x in index["made_from"]["sha256"].values())
    assert result.settings["decoder"]["guidance_scale"] == 8.0


def test_it_goes_back_to_the_bit_and_opens_in_diffusers(source, theirs, converted, tmp_path, capsys):
    out = tmp_path / "back"
    assert convert.main(["to-diffusers", str(converted), str(out)]) == 0
    assert "note" not in capsys.readouterr().out
    again = diffusers.UnCLIPPipeline.from_pretrained(out)
    for name in FOLDERS:
        before, after = getattr(theirs, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        mine, own = getattr(again, name).config, getattr(theirs, name).config
        assert {k: mine[k] for k in own if k[0] != "_"} == {k: v for k, v in own.items() if k[0] != "_"}
    convert.convert_weights("karlo", out, tmp_path / "again", dtype="float32")
    for name in ("clip", "prior", "decoder", "upsampler16"):
        first, second = (modeldir.load_stage(folder / name)[1] for folder in (converted, tmp_path / "again"))
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_model_with_other_settings_is_refused(converted, tmp_path, capsys):
    def refused(stage, message, **changes):
        other = shutil.copytree(converted, tmp_path / "other")
        config = json.loads((other / stage / "config.json").read_text())
        config["model"] |= changes
        (other / stage / "config.json").write_text(json.dumps(config))
        assert convert.main(["to-diffusers", str(other), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
        shutil.rmtree(other)

    refused("clip", "clip: model.unit_embeds is True, diffusers needs False", unit_embeds=True)
    refused("decoder", "decoder: model.embed_scale is None, diffusers needs 1.0", embed_scale=None)
    refused("upsampler16", "model.objective is 'v', diffusers needs 'eps'", objective="v")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("prior/config.json", {"norm_in_type": "layer"}, "norm_in_type is 'layer', only None is built"),
        ("decoder/config.json", {"norm_num_groups": 16}, "has group norms of 16 groups, ours have 32"),
        ("decoder/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("super_res_last/config.json", {"layers_per_block": 2}, "differ in layers_per_block"),
        ("super_res_first/config.json", {"sample_size": 32}, "differ in sample_size"),
        ("prior_scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "only 'sample' is built"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a 'FluxPipeline'"),
    ],
)
def test_other_architectures_are_refused(source, tmp_path, capsys, file, changes, message):
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(config | changes))
    assert convert.main(["karlo", str(other), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def add_image_encoder(folder):
    """A small image tower beside the pipeline's parts, as UnCLIPImageVariationPipeline has one."""
    settings = transformers.CLIPVisionConfig(
        hidden_size=EMBED,
        intermediate_size=4 * EMBED,
        num_attention_heads=4,
        num_hidden_layers=1,
        projection_dim=EMBED,
        image_size=SIDE,
        patch_size=4,
    )
    model = transformers.CLIPVisionModelWithProjection(settings)
    unclip_pipeline.randomise(model, 7).save_pretrained(folder / "image_encoder")


def emoji() -> str:
    """The folder of the emoji's shards; the test is skipped where there is none."""
    shards = data_dir() / "emoji128"
    if not shards.is_dir():
        pytest.skip(f"{shards} is absent; set DALLE2_JAX_TEST_DATA to the folder that holds emoji128")
    return str(shards)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_it_is_trained_on_and_goes_back(stage, source, texts, tmp_path, monkeypatch):
    """The ordinary command, the prior on scenes, the decoder on emoji: its loss falls, and diffusers draws
    what the result draws."""
    folder, model, workdir = shutil.copytree(source, tmp_path / "theirs"), tmp_path / "ours", tmp_path / "run"
    add_image_encoder(folder)
    convert.convert_weights("karlo", folder, model, dtype="float32")
    changes = dict(batch_size=8, num_steps=24, eval_batches=1, num_samples=1, log_every=1, ema_decay=0.5)
    rate = {"prior": 3e-3, "decoder": 3e-4}[stage]
    changes |= {"model.num_steps": 2, "optim.learning_rate": rate, "optim.weight_decay": 0.1}
    data = (
        {"source": "scenes", "path": "debug_64"}
        if stage == "prior"
        else {"path": emoji(), "eval_split": "val"}
    )
    changes |= {f"data.{name}": value for name, value in data.items()}
    command = [sys.executable, "-m", "dalle2_jax.train", f"--config=configs/finetune.py:{model}/{stage}"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in changes.items())]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 24 and np.mean(losses[-3:]) < 0.7 * losses[0]

    parts = dict(clip=str(model), prior=str(model), decoder=str(model), upsamplers=(str(model),))
    convert.convert_workdirs(tmp_path / "tuned", **parts | {stage: str(workdir)}, dtype="float32")
    notes = convert.export_diffusers(tmp_path / "tuned", tmp_path / "back")
    assert notes == []  # the null caption is still ""
    assert "OpenRAIL" in (tmp_path / "back" / "README.md").read_text()  # it goes with what came of them
    again = diffusers.UnCLIPPipeline.from_pretrained(tmp_path / "back")
    again.set_progress_bar_config(disable=True)
    tuned = load_stages(tmp_path / "tuned")
    # Without guidance, which would multiply the difference of rounding in the first steps by eight.
    assert_same_run(again, tuned, texts, monkeypatch, guidance=1.0)
    before, after = (modeldir.flatten(models.load_stage(m, stage)[2]) for m in (model, tmp_path / "tuned"))
    same = [name for name in before if np.array_equal(before[name], after[name])]
    untrained = {
        "prior": ["net/null_text_embed/embedding", "net/null_text_states/embedding"]
        + ["stats/embed_mean", "stats/embed_std"],
        "decoder": ["null_text_embed", "null_text_states/embedding"],
    }
    assert sorted(same) == untrained[stage]

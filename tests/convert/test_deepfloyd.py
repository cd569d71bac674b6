"""DeepFloyd IF from and to folders of diffusers: networks and whole walks with the same noise."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.convert.formats import deepfloyd, to_diffusers
from dalle2_jax.models import models
from dalle2_jax.models.diffusion.sampling import init_noise
from dalle2_jax.runtime import modeldir

torch = pytest.importorskip("torch", reason="the oracle is diffusers, which runs on torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIDE, LARGE, LENGTH, STEPS = 8, 32, 77, 5
KEYS = jax.random.split(jax.random.key(0), 2)
RNG = np.random.default_rng(0)


def unet(side, **changes):
    torch.manual_seed(side)
    made = diffusers.UNet2DConditionModel(
        sample_size=side,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        cross_attention_dim=64,
        attention_head_dim=32,
        cross_attention_norm="group_norm",
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        **changes,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made


def scheduler(**changes):
    return diffusers.DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        prediction_type="epsilon",
        **changes,
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(stage I's network, stage II's, the folder of both)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("if")
    first = unet(SIDE)
    second = unet(
        LARGE,
        class_embed_type="timestep",
        time_embedding_dim=96,
        time_embedding_act_fn="gelu",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1 / 0.7071,
        mid_block_scale_factor=1 / 0.7071,
    )
    second.conv_in = torch.nn.Conv2d(6, 32, 3, padding=1)
    second.register_to_config(in_channels=6)
    thresholds = dict(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5)
    for name, net, noise in (("I", first, scheduler(**thresholds)), ("II", second, scheduler())):
        net.save_pretrained(folder / name / "unet")
        noise.save_pretrained(folder / name / "scheduler")
    settings = dict(vocab_size=96, d_model=24, d_kv=8, d_ff=20, num_layers=1, num_heads=3)
    encoder = transformers.T5EncoderModel(transformers.T5Config(**settings, feed_forward_proj="gated-gelu"))
    encoder.save_pretrained(folder / "I" / "text_encoder")
    (folder / "I" / "tokenizer").mkdir()
    with open(folder / "I" / "tokenizer" / "spiece.model", "wb") as file:
        texts = ["a red star above a blue ring", "a green square to the left of a cross"]
        ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 40),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            **ids,
        )
    return first, second, folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "model"
    assert convert.main(["deepfloyd", str(theirs[2]), str(out), "--dtype=float32"]) == 0
    index = modeldir.read_index(out)
    assert list(index["stages"]) == ["t5", "decoder", f"upsampler{LARGE}"] and "research" in index["licence"]
    return out


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def walk(net, states, side, scale, monkeypatch, low_res=None, level=None):
    """The loop of IF's pipelines, with the noise that our sampler draws."""
    from diffusers.schedulers import scheduling_ddpm

    def noise(fold):
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, fold), (side, side, 3))  # noqa: E731
        return channels_first(jax.vmap(draw)(KEYS))

    steps = net.scheduler
    steps.set_timesteps(STEPS)
    x, both = channels_first(init_noise(KEYS, (side, side, 3))), torch.cat([torch.zeros_like(states), states])
    for t in steps.timesteps:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, t=t, **__: noise(int(t)))
        seen = x if low_res is None else torch.cat([x, low_res], dim=1)
        labels = None if level is None else torch.full((4,), level)
        with torch.no_grad():
            out = net.unet(torch.cat([seen] * 2), t, both, class_labels=labels).sample
        (null, _), (cond, var) = (part.split(3, dim=1) for part in out.chunk(2))
        x = steps.step(torch.cat([null + scale * (cond - null), var], dim=1), t, x).prev_sample
    return np.moveaxis(x.numpy(), 1, -1)


class Net:
    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler


def test_stage_one_draws_the_same(theirs, ours, monkeypatch):
    """Guidance from zeros, dynamic thresholding up to 1.5, learned variance, strided times."""
    stage, config, params = models.load_stage(ours, "decoder")
    assert config["model"]["process"]["threshold_max"] == 1.5 and not config["model"]["text"]["masked"]
    states = RNG.standard_normal((2, LENGTH, 24)).astype(np.float32)
    noise = diffusers.DDPMScheduler.from_pretrained(theirs[2] / "I" / "scheduler")
    expected = walk(Net(theirs[0], noise), torch.from_numpy(states), SIDE, 7.0, monkeypatch)
    batch = {"text_states": states, "token_mask": np.arange(LENGTH) < np.array([[5], [9]])}
    sample = jax.jit(lambda b: stage.sample(params, KEYS, b, num_steps=STEPS, guidance_scale=jnp.float32(7)))
    assert expected.std() > 0.1
    np.testing.assert_allclose(sample(batch), np.clip(expected, -1, 1), atol=2e-3)


def test_stage_two_draws_the_same(theirs, ours, monkeypatch):
    """The small picture is enlarged with aligned corners and noised to time 250, which the network reads."""
    stage, config, params = models.load_stage(ours, f"upsampler{LARGE}")
    small = np.round(RNG.uniform(0, 255, (2, LARGE // 4, LARGE // 4, 3))).astype(np.float32) / 127.5 - 1
    states = RNG.standard_normal((2, LENGTH, 24)).astype(np.float32)
    noise = scheduler()
    low = torch.nn.functional.interpolate(
        channels_first(small), size=LARGE, mode="bilinear", align_corners=True
    )
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, 2**31 - 2), (LARGE, LARGE, 3))  # noqa: E731
    drawn = channels_first(jax.vmap(draw)(KEYS))
    low = noise.add_noise(low, drawn, torch.full((2,), 250))
    expected = walk(Net(theirs[1], noise), torch.from_numpy(states), LARGE, 4.0, monkeypatch, low, 250)
    batch = {"text_states": states, "token_mask": np.ones((2, LENGTH), bool), "low_res": small}
    sample = jax.jit(lambda b: stage.sample(params, KEYS, b, num_steps=STEPS, guidance_scale=jnp.float32(4)))
    assert expected.std() > 0.1 and config["model"]["low_res_level"] == 0.25
    np.testing.assert_allclose(sample(batch), np.clip(expected, -1, 1), atol=2e-3)


@pytest.fixture(scope="module")
def back(ours, tmp_path_factory):
    out = tmp_path_factory.mktemp("back")
    assert convert.main(["to-diffusers", str(ours), str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "number, role, kind", [(0, "decoder", "IF"), (1, f"upsampler{LARGE}", "IFSuperResolution")]
)
def test_stages_go_back_to_diffusers_unchanged(theirs, back, number, role, kind):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(back / role)
    assert type(pipeline).__name__ == f"{kind}Pipeline"
    state, net = theirs[number].state_dict(), pipeline.unet.eval()
    assert net.state_dict().keys() == state.keys()
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    inputs = torch.randn(2, 3 + 3 * number, net.config.sample_size, net.config.sample_size)
    level = {"class_labels": torch.full((2,), 250)} if number else {}
    states, t = torch.randn(2, LENGTH, 24), torch.tensor([7, 900])
    with torch.no_grad():
        found, expected = (each(inputs, t, states, **level).sample for each in (net, theirs[number]))
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.abs().max())
    noise = diffusers.DDPMScheduler.from_pretrained(
        theirs[2] / ("II" if number else "I") / "scheduler"
    ).config
    names = ["beta_schedule", "variance_type", "prediction_type", "clip_sample", "thresholding"]
    names += [] if number else ["dynamic_thresholding_ratio", "sample_max_value"]
    assert {name: pipeline.scheduler.config[name] for name in names} == {name: noise[name] for name in names}


def test_t5_goes_back_and_all_is_read_again(theirs, ours, back, tmp_path, capsys):
    first = theirs[2] / "I"
    pipeline = diffusers.IFPipeline.from_pretrained(back / "decoder")
    before = transformers.T5EncoderModel.from_pretrained(first / "text_encoder").state_dict()
    for name, value in pipeline.text_encoder.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    texts, how = ["a red star", "Two GREEN squares"], dict(padding="max_length", max_length=LENGTH)
    words = transformers.T5Tokenizer.from_pretrained(first / "tokenizer")
    assert pipeline.tokenizer(texts, **how)["input_ids"] == words(texts, **how)["input_ids"]
    assert convert.main(["deepfloyd", str(back), str(tmp_path / "again"), "--dtype=float32"]) == 0
    assert "research alone" in capsys.readouterr().out
    for role in modeldir.read_index(ours)["stages"]:
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / role / file).read_bytes() == (ours / role / file).read_bytes()


@pytest.mark.slow
def test_a_caption_is_drawn_by_both_stages(ours):
    """T5's states of the caption, the small picture, the large one; another caption, another picture."""
    model = pipeline.UnCLIP.load(ours)
    how = dict(decoder_steps=2, upsampler_steps=[2], numbers=[0, 0])
    drawn = model.text_to_image(["a red star", "a green square"], **how)
    assert [*drawn.timings][1:] == ["decoder", f"upsampler{LARGE}"]
    assert drawn.images.shape == (2, LARGE, LARGE, 3) and drawn.base.shape == (2, SIDE, SIDE, 3)
    assert np.abs(drawn.images[0] - drawn.images[1].astype(int)).max() > 1
    np.testing.assert_array_equal(
        model.text_to_image(["a red star"], **how | dict(numbers=[0])).images[0], drawn.images[0]
    )


def test_settings_that_if_does_not_have_are_named(ours):
    stages = {"t5": ({}, {}), "decoder": models.load_stage(ours, "decoder")[1:]}
    settings = {
        role: to_diffusers._settings(config) if config else {} for role, (config, _) in stages.items()
    }
    net = settings["decoder"]["net"] | {"context_norm": "layer"}
    for name, value in dict(learned_variance=False, objective="v", process=None, net=net).items():
        with pytest.raises(ValueError, match={"process": "threshold_max"}.get(name, f"model.{name}")):
            changed = settings["decoder"] | {name: value}
            deepfloyd.export({"t5": {}, "decoder": changed}, {"decoder": stages["decoder"][1]})


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", f"upsampler{LARGE}"])
def test_it_is_trained_on_and_goes_back(stage, ours, back, tmp_path):
    """The ordinary command, on scenes; the learned variance is trained, the T5 rests."""
    changes = dict(batch_size=4, num_steps=2, eval_batches=1, num_samples=1, log_every=1, ema_decay=0.5)
    changes |= {"model.num_steps": 2, "data.source": "scenes", "data.path": "debug_64"}
    command = [sys.executable, "-m", "dalle2_jax.train", f"--config=configs/finetune.py:{ours}/{stage}"]
    command += [
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in changes.items()),
    ]
    how = dict(cwd=Path(__file__).parents[2], env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    t5 = (ours / "t5" / "model.safetensors").read_bytes()
    ran = subprocess.run(command, **how, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (ours / "t5" / "model.safetensors").read_bytes() == t5
    tuned = (
        {"upsamplers": (str(tmp_path / "run"),)} if stage != "decoder" else {"decoder": str(tmp_path / "run")}
    )
    convert.convert_workdirs(tmp_path / "tuned", t5=str(ours), **tuned, dtype="float32")
    assert convert.main(["to-diffusers", str(tmp_path / "tuned"), str(tmp_path / "back")]) == 0
    assert "research" in (tmp_path / "back" / "README.md").read_text()
    net = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "back").unet
    before = diffusers.DiffusionPipeline.from_pretrained(back / stage).unet.state_dict()
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert net.config.out_channels == 6 and len(changed) > 0.9 * len(before)
    assert not torch.equal(net.conv_out.bias[3:], before["conv_out.bias"][3:])

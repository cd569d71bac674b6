"""DDPM to and from diffusers: networks, whole walks with the same noise, and what is refused."""

import json

import jax
import numpy as np
import pytest

from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.models.diffusion.sampling import init_noise

torch = pytest.importorskip("torch", reason="the oracle is diffusers, which runs on torch")
diffusers = pytest.importorskip("diffusers")

SIDE, STEPS = 8, 40


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(pipeline, its folder)."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    ).eval()
    scale = 1000 / STEPS
    scheduler = diffusers.DDPMScheduler(
        STEPS, beta_start=1e-4 * scale, beta_end=0.02 * scale, variance_type="fixed_large", clip_sample=True
    )
    folder = tmp_path_factory.mktemp("ddpm")
    made = diffusers.DDPMPipeline(unet, scheduler)
    made.save_pretrained(folder)
    return made, folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "model"
    assert convert.main(["ddpm", str(theirs[1]), str(out), "--dtype=float32"]) == 0
    return out, *models.load_stage(out, "decoder")


def walk(pipeline, monkeypatch, keys):
    """Pictures of a DDPMPipeline's parts, with the noise that our sampler draws from `keys`."""
    from diffusers.schedulers import scheduling_ddpm

    def noise(fold):
        drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, fold), (SIDE, SIDE, 3)))(keys)
        return torch.from_numpy(np.moveaxis(np.asarray(drawn), -1, 1).copy())

    x = torch.from_numpy(np.moveaxis(np.asarray(init_noise(keys, (SIDE, SIDE, 3))), -1, 1).copy())
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, t=t, **__: noise(int(t)))
        with torch.no_grad():
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    return np.moveaxis(x.numpy(), 1, -1)


def test_whole_walks_are_the_same(theirs, ours, monkeypatch):
    _, stage, config, params = ours
    assert config["model"]["process"]["fixed_variance"] == 1 and config["model"]["net"]["resample_pad"] == [
        0,
        1,
    ]
    keys = jax.random.split(jax.random.key(0), 2)
    mine = np.asarray(jax.jit(lambda: stage.sample(params, keys, {}))())
    other = walk(theirs[0], monkeypatch, keys)
    assert other.std() > 0.1
    np.testing.assert_allclose(mine, np.clip(other, -1, 1), atol=2e-3)


def test_it_goes_back_to_diffusers_unchanged(theirs, ours, tmp_path):
    assert convert.main(["to-diffusers", str(ours[0]), str(tmp_path / "back")]) == 0
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "back")
    state = theirs[0].unet.state_dict()
    assert back.unet.state_dict().keys() == state.keys()
    for name, value in back.unet.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    for name in ("beta_start", "beta_end", "variance_type", "num_train_timesteps", "beta_schedule"):
        assert back.scheduler.config[name] == theirs[0].scheduler.config[name], name
    for name in ("norm_eps", "freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim"):
        assert back.unet.config[name] == theirs[0].unet.config[name], name


def test_old_names_of_attention_are_read(theirs, ours, tmp_path):
    """diffusers before 0.16: query, key, value and proj_attn; a folder of the network alone."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in theirs[0].unet.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = value
    assert any("proj_attn" in name for name in state)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        (tmp_path / file.split("/")[1]).write_text((theirs[1] / file).read_text())
    assert convert.main(["ddpm", str(tmp_path), str(tmp_path / "out"), "--dtype=float32"]) == 0
    _, _, params = models.load_stage(tmp_path / "out", "decoder")
    jax.tree.map(np.testing.assert_array_equal, params, ours[3])


@pytest.mark.parametrize(
    "file, name, value, message",
    [
        ("unet", "act_fn", "gelu", "act_fn is 'gelu', only 'silu' is built"),
        ("unet", "down_block_types", ["DownBlock2D", "DownBlock2D"], "are not built"),
        ("scheduler", "variance_type", "learned", "variance_type 'learned' is not built"),
        ("scheduler", "prediction_type", "v_prediction", "prediction_type is 'v_prediction'"),
    ],
)
def test_what_is_not_built_is_named(theirs, tmp_path, capsys, file, name, value, message):
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((theirs[1] / part).read_text())
        if part.startswith(file):
            config[name] = value
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text(json.dumps(config))
    assert convert.main(["ddpm", str(tmp_path), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err

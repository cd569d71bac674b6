"""Tokenizers of others with random weights: VQGAN against diffusers, the dVAE against PyPI's DALL-E."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert import convert, tables
from dalle2_jax.convert.formats import vqgan
from dalle2_jax.models import models
from dalle2_jax.models.nets.vgg import DEPTHS
from dalle2_jax.models.stages import lpips
from dalle2_jax.runtime import modeldir
from tests.convert import torch_files
from tests.tiny_model import random_params

SIDE = 16
LEVELS = 2
# diffusers' names -> taming's
NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", r"down.\1.attn.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)", r"up.\1.attn.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
)


def in_taming_s_layout(state: dict) -> dict[str, np.ndarray]:
    """The tensors of a VQModel under the names of taming-transformers, whose levels count from the finest."""
    found = {}
    for name, tensor in state.items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        name = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}", name)
        array = tensor.numpy()
        points = re.search(r"attn.*\.(q|k|v|proj_out)\.weight", name)
        found[name] = array[..., None, None] if points else array
    return found


@pytest.fixture(scope="module")
def vqmodel():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),
        latent_channels=8,
        num_vq_embeddings=16,
        vq_embed_dim=4,
        norm_num_groups=8,
    ).eval()
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.slow
def test_a_vqgan_equals_diffusers(vqmodel, tmp_path):
    import torch

    state = in_taming_s_layout(vqmodel.state_dict())
    losses = {"loss.discriminator.main.0.weight": np.zeros((2, 2), np.float32)}
    path = torch_files.save(tmp_path / "last.ckpt", {"epoch": 3, "state_dict": state | losses})
    convert.convert_weights("vqgan", path, tmp_path / "model", dtype="bfloat16")
    stage, config, params = models.load_stage(tmp_path / "model", "tokenizer")
    assert config["model"]["net"]["attention_resolutions"] == [128]
    assert modeldir.read_index(tmp_path / "model")["system"] == "tokens"
    images = np.random.default_rng(0).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        latents = vqmodel.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latents
        _, _, (_, _, codes) = vqmodel.quantize(latents)
        expected = vqmodel.decode(latents).sample.numpy().transpose(0, 2, 3, 1)
        z = stage._net(params, "project", 0, stage._net(params, "features", images), [])
        np.testing.assert_allclose(z, latents.numpy().transpose(0, 2, 3, 1), atol=1e-5)
        ours = stage.encode(params, images)[0]
        np.testing.assert_array_equal(np.asarray(ours).reshape(-1), codes.numpy())
        vectors = stage.quantizers[0].lookup(stage._state(params, 0), ours)
        np.testing.assert_allclose(stage._net(params, "decode", [vectors]), expected, atol=1e-5)


def test_a_vqgan_with_gumbel_codes_is_read(tmp_path):
    """Its quantizer has a projection to logits and a table; nothing is left out or invented."""
    net = dict(kind="vqgan", channels=8, channel_mult=[1, 2], num_res_blocks=1)
    net |= dict(attention_resolutions=[128], z_channels=8)
    quantizer = dict(kind="gumbel", num_codes=16, width=4, bias=False)
    model = dict(image_size=256, net=net, quantizer=quantizer, likelihood="l1")
    stage = models.build_stage({"stage": "tokenizer", "model": model})
    params = random_params(stage, 0)
    state = tables.exported(vqgan.rows(params), params, dropped=["stats/since_0"])
    assert state["quantize.embed.weight"].shape == (16, 4)
    assert state["quantize.proj.weight"].shape == (16, 4, 1, 1)
    arrays = {name: np.asarray(tensor) for name, tensor in state.items()}
    path = torch_files.save(tmp_path / "last.ckpt", {"state_dict": arrays})
    convert.convert_weights("vqgan", path, tmp_path / "model")
    read, _, found = models.load_stage(tmp_path / "model", "tokenizer")
    assert read.grids == ((128, 128),) and read.quantizers[0].beta[1] == pytest.approx(5e-4 * 12)
    for name, leaf in modeldir.flatten(params).items():
        if not name.startswith("stats/"):
            np.testing.assert_array_equal(modeldir.flatten(found)[name], leaf, err_msg=name)
    check_gumbel_codes(read, jax.tree.map(np.asarray, found), arrays)


def check_gumbel_codes(stage, params, arrays):
    """By taming's formulas: logits = proj(quant_conv(f)), code = argmax, its vector a row of embed."""
    images = np.random.default_rng(0).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)

    @jax.jit
    def compute(params, images):
        features = stage._net(params, "features", images)
        codes = stage.encode(params, images)
        vectors = stage.quantizers[0].lookup(stage._state(params, 0), codes[0])
        return features[0], stage._net(params, "project", 0, features, []), codes[0], vectors

    features, logits, codes, vectors = map(np.asarray, compute(params, images))
    by_hand = features.astype(np.float64)
    for layer in ("quant_conv", "quantize.proj"):
        by_hand = by_hand @ arrays[f"{layer}.weight"][..., 0, 0].T + arrays[f"{layer}.bias"]
    np.testing.assert_allclose(logits, by_hand, atol=1e-5)
    np.testing.assert_array_equal(codes, logits.argmax(axis=-1))
    assert codes.shape == (2, 8, 8) and len(np.unique(codes)) > 2
    np.testing.assert_array_equal(vectors, arrays["quantize.embed.weight"][codes])


def test_lpips_is_read_and_is_the_formula(tmp_path):
    """Unit features, weighted squares, mean over positions; used by a VQGAN's loss as a frozen stage."""
    draw, state, number, widths = np.random.default_rng(0), {}, 0, (4, 8, 8, 8, 4)
    before = 3
    for width, depth in zip(widths, DEPTHS, strict=True):
        for _ in range(depth):
            kernel = draw.normal(size=(width, before, 3, 3)) / np.sqrt(9 * before)
            state[f"features.{number}.weight"] = kernel.astype(np.float32)
            state[f"features.{number}.bias"] = draw.normal(size=width).astype(np.float32)
            number, before = number + 2, width
        number += 1
    linear = [np.abs(draw.normal(size=(1, width, 1, 1))).astype(np.float32) for width in widths]
    folder = tmp_path / "weights"
    folder.mkdir()
    torch_files.save(
        folder / "vgg16-397923af.pth", state | {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    )
    torch_files.save(folder / "vgg.pth", {f"lin{i}.model.1.weight": x for i, x in enumerate(linear)})
    convert.convert_weights("lpips", folder, tmp_path / "model", dtype="float32")
    stage, _, params = models.load_stage(tmp_path / "model", "features")
    x, y = draw.uniform(-1, 1, (2, 2, 32, 32, 3)).astype(np.float32)
    found = [], []
    for images, features in zip((x, y), found, strict=True):
        scaled = (images - np.array(lpips.MEAN)) / np.array(lpips.DEVIATION)
        features += [
            np.asarray(f) for f in stage.net.apply({"params": params["net"]}, scaled.astype(np.float32))
        ]
    units = [
        [f / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10) for f in features] for features in found
    ]
    expected = sum(
        ((a - b) ** 2 @ weights[0, :, 0, 0]).mean() for a, b, weights in zip(*units, linear, strict=True)
    )
    np.testing.assert_allclose(stage.distance(params, x, y), expected, rtol=1e-4)
    assert stage.distance(params, x, x) == 0


@pytest.mark.slow
def test_openais_dvae_equals_pypis(tmp_path):
    """Whole modules, pickled by torch in a zip archive or as before 1.6, read as data."""
    torch = pytest.importorskip("torch")
    why = "DALL-E is not installed: pip install --no-deps DALL-E"
    dall_e = pytest.importorskip("dall_e", reason=why)
    torch.manual_seed(0)
    sizes = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(**sizes)
    (tmp_path / "old").mkdir()
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        for parameter in module.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        torch.save(module, tmp_path / f"{name}.pkl")
        torch.save(module, tmp_path / "old" / f"{name}.pkl", _use_new_zipfile_serialization=False)
    convert.convert_weights("openai-dvae", tmp_path, tmp_path / "model")
    convert.convert_weights("openai-dvae", tmp_path / "old", tmp_path / "model_of_old")
    stage, config, params = models.load_stage(tmp_path / "model", "tokenizer")
    _, _, old = models.load_stage(tmp_path / "model_of_old", "tokenizer")
    jax.tree.map(np.testing.assert_array_equal, params, old)
    assert config["model"]["net"] == dict(kind="dvae", channels=64, num_groups=4, num_blocks=1)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    pixels = torch.tensor(dall_e.map_pixels(torch.tensor((images + 1) / 2)).numpy().transpose(0, 3, 1, 2))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        logits = encoder(pixels)
        codes = torch.argmax(logits, axis=1)
        one_hot = torch.nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float()
        maps = decoder(one_hot)
        z = stage._net(params, "project", 0, stage._net(params, "features", images), [])
        np.testing.assert_allclose(z, logits.numpy().transpose(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(stage.encode(params, images)[0], codes.numpy())
        vectors = stage.quantizers[0].lookup(stage._state(params, 0), jnp.asarray(codes.numpy()))
        ours = np.asarray(stage._net(params, "decode", [vectors]))
        np.testing.assert_allclose(ours, maps.numpy().transpose(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
        pictures = dall_e.unmap_pixels(torch.sigmoid(maps[:, :3])).numpy().transpose(0, 2, 3, 1)
        made = stage.decode_codes(params, (jnp.asarray(codes.numpy()),))
        np.testing.assert_allclose((made + 1) / 2, pictures, atol=1e-5)

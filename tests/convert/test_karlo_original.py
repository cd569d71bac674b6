"""Karlo's own checkpoints: the same networks as torch modules in the layout of OpenAI's code."""

import jax
import numpy as np
import pytest

from dalle2_jax.convert import convert
from dalle2_jax.convert.formats import karlo_original
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir
from tests.convert import clip_tokenizer, torch_files

torch = pytest.importorskip("torch", reason="the oracle is in torch")
diffusers = pytest.importorskip("diffusers", reason="the oracle of the prior is diffusers' PriorTransformer")
pytest.importorskip("transformers", reason="the oracle of CLIP is transformers' CLIPModel")

from tests.convert import torch_unet  # noqa: E402 (after torch is known to be there)
from tests.convert.test_clip import LENGTH, clip_model, openai_state  # noqa: E402

EMBED, TOKENS, SIDE, LARGE = 128, 64, 8, 16
DECODER = dict(c_in=3, c_out=6, channels=128, mult=(1, 2), depth=1, attends=(1,), context_width=TOKENS)
ABOVE = dict(c_in=6, c_out=3, channels=128, mult=(1, 2), depth=1, scale_shift=False)


class Decoder(torch_unet.UNet):
    """The U-Net with Karlo's conditions: image embedding and caption, added and as context."""

    def __init__(self):
        super().__init__(**DECODER)
        self.clip_emb, self.text_feat_proj = torch.nn.Linear(EMBED, 512), torch.nn.Linear(EMBED, 512)
        self.clip_tok_proj = torch.nn.Linear(EMBED, 4 * TOKENS)
        self.text_seq_proj = torch.nn.Sequential(torch.nn.Linear(EMBED, TOKENS), torch.nn.LayerNorm(TOKENS))
        self.cf_param = torch.nn.Parameter(torch.randn(EMBED))

    def forward(self, x, t, z, text_embed, text_states):
        image_tokens = self.clip_tok_proj(z).reshape(len(z), TOKENS, 4)
        context = torch.cat([image_tokens, self.text_seq_proj(text_states).transpose(1, 2)], dim=2)
        return super().forward(x, t, self.clip_emb(z) + self.text_feat_proj(text_embed), context)


def in_karlos_names(prior) -> dict:
    """The state of a PriorTransformer under Karlo's names."""
    named = {
        "encoder_hidden_states_proj": "text_enc_proj",
        "embedding_proj": "text_emb_proj",
        "proj_in": "clip_img_proj",
        "proj_to_clip_embeddings": "out_proj",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "norm_out": "final_ln",
    }
    inner = {
        "norm1": "ln_1",
        "norm3": "ln_2",
        "attn1.to_out.0": "attn.c_proj",
        "ff.net.0.proj": "mlp.c_fc",
        "ff.net.2": "mlp.c_proj",
    }
    state, out = prior.state_dict(), {}
    for kind in ("weight", "bias"):
        out |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in named.items()}
        for i in range(2):
            a, b = f"transformer_blocks.{i}", f"transformer.resblocks.{i}"
            out |= {f"{b}.{new}.{kind}": state[f"{a}.{old}.{kind}"] for old, new in inner.items()}
            q, k, v = (state[f"{a}.attn1.to_{x}.{kind}"] for x in "qkv")
            rows = [part[64 * head : 64 * head + 64] for head in range(2) for part in (q, k, v)]
            out[f"{b}.attn.c_qkv.{kind}"] = torch.cat(rows)
    out["positional_embedding"], out["prd_emb"] = state["positional_embedding"], state["prd_embedding"]
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(role -> torch module, what was made of their files)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("karlo")
    clip = clip_model(clip_tokenizer.write(folder / "tokenizer"), embed=EMBED)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=64, num_layers=2, embedding_dim=EMBED, num_embeddings=LENGTH
    ).eval()
    decoder, first, last = Decoder(), torch_unet.UNet(**ABOVE), torch_unet.UNet(**ABOVE)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def save(name, tensors):
        torch.save({"state_dict": tensors, "epoch": 3}, folder / name)

    save("prior-ckpt-step=1.ckpt", {f"model.{k}": v for k, v in in_karlos_names(prior).items()})
    save("decoder-ckpt-step=1.ckpt", {f"model.{k}": v for k, v in decoder.state_dict().items()})
    above = {f"model_first_steps.{k}": v for k, v in first.state_dict().items()}
    save(
        "improved-sr-ckpt-step=1.ckpt",
        above | {f"model_last_step.{k}": v for k, v in last.state_dict().items()},
    )
    torch.save(openai_state(clip), folder / "ViT-L-14.pt")
    torch.save((torch.randn(EMBED), torch.rand(EMBED) + 0.5), folder / "ViT-L-14_stats.th")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karlo_original, "SIDES", (SIDE, LARGE))
        arguments = ["karlo-original", str(folder), str(folder / "out"), "--dtype=float32"]
        assert convert.main(arguments) == 2  # it has no tokenizer
        assert convert.main([*arguments, f"--tokenizer={folder / 'tokenizer'}"]) == 0
    return dict(prior=prior, decoder=decoder, first=first, last=last), folder / "out"


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def assert_close(actual, expected):
    expected = expected.detach().numpy()
    expected = np.moveaxis(expected, 1, -1) if expected.ndim == 4 else expected
    assert expected.std() > 1e-2
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_the_prior_is_the_same(made):
    stage, _, params = models.load_stage(made[1], "prior")
    assert stage.diffusion.limit == 10 and stage.guidance_scale == 4
    x, embed, states, t = normal(2, EMBED), normal(2, EMBED), normal(2, LENGTH, EMBED), np.array([7, 900])
    mask = np.arange(LENGTH) < np.array([[3], [6]])
    ours = stage.net.apply({"params": params["net"]}, x, t, embed, states, mask, np.zeros(2, bool))
    theirs = made[0]["prior"](*(torch.from_numpy(a) for a in (x, t, embed, states, mask)))
    assert_close(ours, theirs.predicted_image_embedding)
    _, stats = torch.load(made[1].parent / "ViT-L-14_stats.th")
    np.testing.assert_array_equal(params["stats"]["embed_std"], stats.numpy())


def test_the_decoder_is_the_same(made):
    stage, config, params = models.load_stage(made[1], "decoder")
    assert config["model"]["attention_resolutions"] == [4] and config["model"]["channel_mult"] == [1, 2]
    x, z, t = normal(2, SIDE, SIDE, 3), normal(2, EMBED), np.array([7, 900])
    embed, states = normal(2, EMBED)[::-1].copy(), normal(2, LENGTH, EMBED)
    shown = np.zeros(2, bool)
    mask = np.ones((2, LENGTH), bool)
    conditions = dict(image_embed=z, drop_image=shown, text_embed=embed)
    conditions |= dict(text=states, token_mask=mask, drop_text=shown)
    ours = jax.jit(stage.net.apply)({"params": params}, x, t, conditions)
    theirs = made[0]["decoder"](channels_first(x), *(torch.from_numpy(a) for a in (t, z, embed, states)))
    assert_close(ours, theirs)
    np.testing.assert_array_equal(params["null_image_embed"], made[0]["decoder"].cf_param.detach().numpy())


@pytest.mark.parametrize("network", ["first", "last"])
def test_both_networks_of_the_upsampler_are_the_same(made, network):
    stage, _, params = models.load_stage(made[1], "upsampler")
    x, low_res, t = normal(1, LARGE, LARGE, 3), normal(1, LARGE, LARGE, 3)[:, ::-1], np.array([321])
    params = params["last"] if network == "last" else {k: v for k, v in params.items() if k != "last"}
    ours = jax.jit(stage.net.apply)({"params": params}, x, t, {}, low_res)
    both = channels_first(np.concatenate([x, low_res], axis=-1))
    assert_close(ours, made[0][network](both, torch.from_numpy(t)))


def test_the_index_names_every_file(made):
    index = modeldir.read_index(made[1])
    assert len(index["made_from"]["sha256"]) == 5 and "OpenRAIL" in index["licence"]
    assert list(index["stages"])[-1] == f"upsampler{LARGE}"


def test_checkpoints_of_training_are_the_same_model(made, tmp_path, monkeypatch):
    monkeypatch.setattr(karlo_original, "SIDES", (SIDE, LARGE))
    folder = torch_files.wrap_folder(made[1].parent, tmp_path / "wrapped")
    words = str(folder / "tokenizer")
    convert.convert_weights("karlo-original", folder, tmp_path / "out", tokenizer=words, dtype="float32")
    assert torch_files.weights(tmp_path / "out") == torch_files.weights(made[1])

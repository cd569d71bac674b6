"""Kandinsky 2.2's prior: a whole run equals diffusers' KandinskyV22PriorPipeline."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.convert import convert
from dalle2_jax.models import models
from dalle2_jax.models.diffusion import sampling
from dalle2_jax.models.stages import clip as clip_stage
from dalle2_jax.runtime import modeldir
from tests.convert import clip_tokenizer, torch_files

torch = pytest.importorskip("torch", reason="the oracle is diffusers' KandinskyV22PriorPipeline")
diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers' KandinskyV22PriorPipeline")
transformers = pytest.importorskip(
    "transformers", reason="the oracle is diffusers' KandinskyV22PriorPipeline"
)

LENGTH, EMBED, CAPTION = 8, 40, "a red star"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, a tiny pipeline that is in it); states and embeddings differ in width from the prior's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kandinsky")
    vocab = clip_tokenizer.write(folder / "tokenizer")
    tower = dict(hidden_size=EMBED, num_attention_heads=4, projection_dim=EMBED, hidden_act="gelu")
    text = transformers.CLIPTextConfig(
        **tower,
        intermediate_size=4 * EMBED,
        num_hidden_layers=2,
        vocab_size=vocab,
        max_position_embeddings=LENGTH,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=0,
    )
    # of bigG's kind: an MLP of another width than four times
    vision = transformers.CLIPVisionConfig(
        **tower, intermediate_size=3 * EMBED, num_hidden_layers=1, image_size=8, patch_size=4
    )
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=EMBED, num_embeddings=LENGTH
    )
    with torch.no_grad():
        prior.clip_mean.normal_()
        prior.clip_std.uniform_(0.5, 2.0)
        prior.positional_embedding.normal_()
    made = diffusers.KandinskyV22PriorPipeline(
        prior=prior.eval(),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        text_encoder=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        image_processor=transformers.CLIPImageProcessor(crop_size=8, size=8),
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return folder, made


def test_a_run_of_the_prior_is_the_same(theirs, tmp_path, monkeypatch):
    from diffusers.schedulers import scheduling_unclip

    convert.convert_weights("kandinsky", theirs[0], tmp_path / "ours", dtype="float32")
    assert "Apache-2.0" in modeldir.read_index(tmp_path / "ours")["licence"]
    clip, config, clip_params = models.load_stage(tmp_path / "ours", "clip")
    assert config["model"]["vision"]["mlp_width"] == 3 * EMBED
    image = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    pixels = ((image + 1) / 2 - clip_stage.IMAGE_MEAN) / clip_stage.IMAGE_STD
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    seen = theirs[1].image_encoder(pixels).image_embeds.detach().numpy()
    assert seen.std() > 1e-2
    np.testing.assert_allclose(clip.encode_image(clip_params, image), seen, atol=1e-5)
    prior, _, params = models.load_stage(tmp_path / "ours", "prior")
    assert prior.diffusion.limit == 10

    first = np.random.default_rng(0).normal(size=(1, EMBED)).astype(np.float32)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    monkeypatch.setattr(sampling, "_normal", lambda keys, fold, shape: jnp.zeros((len(keys), *shape)))
    monkeypatch.setattr(sampling, "init_noise", lambda keys, shape: jnp.asarray(first))
    expected = theirs[1](CAPTION, latents=torch.from_numpy(first), num_inference_steps=6).image_embeds

    tokens, mask = convert.load_tokenizer(tmp_path / "ours" / "tokenizer")([CAPTION])
    embed, states = clip.encode_text(clip_params, tokens, mask)
    batch = {"text_embed": embed, "text_states": states, "token_mask": mask}
    drawn = jax.jit(lambda p, b: prior.sample(p, jax.random.split(jax.random.key(0), 1), b, num_steps=6))
    expected = expected.numpy()
    actual = drawn(params, batch)
    # diffusers has alpha_bar in float32, which is felt over the steps; tests of Karlo compare the network
    np.testing.assert_allclose(actual, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)
    assert expected.std() > 0.1
    plain = drawn(params, batch | {"text_embed": -embed})
    assert np.abs(plain - actual).max() > 1e-2


def test_checkpoints_of_training_are_the_same_model(theirs, tmp_path):
    folders = {"plain": theirs[0], "wrapped": torch_files.wrap_folder(theirs[0], tmp_path / "wrapped")}
    found = {}
    for kind, folder in folders.items():
        convert.convert_weights("kandinsky", folder, tmp_path / f"{kind} out", dtype="float32")
        found[kind] = torch_files.weights(tmp_path / f"{kind} out")
    assert len(found["plain"]) == 2 and found["wrapped"] == found["plain"]


def test_another_pipeline_is_refused(theirs, tmp_path, capsys):
    index = theirs[0] / "model_index.json"
    kept = index.read_text()
    index.write_text(json.dumps({"_class_name": "KandinskyV22Pipeline"}))
    assert convert.main(["kandinsky", str(theirs[0]), str(tmp_path / "out")]) == 2
    assert "holds a 'KandinskyV22Pipeline', not a KandinskyV22Prior" in capsys.readouterr().err
    index.write_text(kept)

"""GLIDE's checkpoints equal torch modules in their layout; captions are drawn without CLIP and prior."""

import gzip
import importlib
import json

import jax
import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.convert import convert, tables
from dalle2_jax.convert.formats import glide
from dalle2_jax.convert.tensors import Tensors
from dalle2_jax.data.tokenizer import load_tokenizer
from dalle2_jax.edit.latents import Latents
from dalle2_jax.evaluate import drawing
from dalle2_jax.models import models
from dalle2_jax.models.diffusion import sampling
from dalle2_jax.runtime import modeldir
from dalle2_jax.train import inputs
from dalle2_jax.train.plan import make_plan
from dalle2_jax.train.run import started_from

torch = pytest.importorskip("torch", reason="the oracle is in torch")

from tests.convert import torch_files, torch_unet  # noqa: E402 (after torch is known to be there)
from tests.convert.test_karlo_original import assert_close, channels_first, normal  # noqa: E402

SIDE, LARGE, LENGTH, WIDTH = 8, 16, 6, 128
CAPTION = "a red star"
ROLES = ("base", "upsample")


def write_tokenizer(folder):
    """A tiny vocabulary in the layout of GPT-2's; its size."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("s", "t")]
    words = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / "encoder.json.gz", "wt", encoding="utf-8") as file:
        json.dump({word: number for number, word in enumerate(words)}, file)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    return len(words)


def write(folder, inpaint):
    """role -> torch module, with their files and a tokenizer in `folder`."""
    torch.manual_seed(inpaint)
    vocab = write_tokenizer(folder / "tokenizer")
    text = dict(vocab=vocab, length=LENGTH, width=WIDTH, text_depth=2)
    nets = dict(channels=128, mult=(1, 2), depth=1, attends=(1,))
    seen = {"base": 3 + 4 * inpaint, "upsample": 6 + 4 * inpaint}
    made = {role: torch_unet.Glide(seen[role], **nets, **text) for role in ROLES}
    for role, model in made.items():
        name = f"{role}_inpaint.pt" if inpaint else f"{role}.pt"
        torch.save({name: x.half() for name, x in model.state_dict().items()}, folder / name)
        model.load_state_dict({name: x.half() for name, x in model.state_dict().items()})
    return made


def convert_written(folder, inpaint):
    """(whether for repainting, role -> torch module, the model directory made of their files)."""
    modules = write(folder, inpaint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glide, "SIDES", (SIDE, LARGE))
        convert.convert_weights(
            "glide", folder, folder / "out", tokenizer=str(folder / "tokenizer"), dtype="float32"
        )
    return inpaint, modules, folder / "out"


@pytest.fixture(scope="module")
def repainting(tmp_path_factory):
    return convert_written(tmp_path_factory.mktemp("glide"), True)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "inpaint"])
def made(request, repainting, tmp_path_factory):
    return repainting if request.param else convert_written(tmp_path_factory.mktemp("plain"), False)


@pytest.fixture(scope="module")
def read(made):
    """tokens, masks and which captions are dropped: a caption, and none."""
    tokens, mask = load_tokenizer(made[2] / "tokenizer", LENGTH)([CAPTION] * 2)
    return tokens, mask, np.array([False, True])


def known(inpaint, *shape):
    """What is kept of a picture, as a network sees it; None for one that does not look."""
    repaint = np.arange(shape[2])[:, None] < 5
    kept = normal(*shape, 3)[::-1] * (1 - repaint)
    return np.concatenate([kept, np.broadcast_to(1.0 - repaint, (*shape, 1))], -1) if inpaint else None


def test_the_decoder_is_the_same_with_and_without_a_caption(made, read):
    inpaint, modules, model = made
    stage, config, params = models.load_stage(model, "decoder")
    assert config["model"]["attention_resolutions"] == [4] and config["model"]["text"]["num_heads"] == 2
    assert stage.embed_dim == 0 and stage.guidance_scale == 3 and stage.inpaint == inpaint
    tokens, mask, drop = read
    x, t, kept = normal(2, SIDE, 12, 3), np.array([7, 900]), known(inpaint, 2, SIDE, 12)
    caption = dict(text=tokens, token_mask=mask, drop_text=drop)
    ours = jax.jit(stage.net.apply)({"params": params}, x, t, caption, known=kept)
    seen = np.concatenate([x, kept], -1).astype(np.float32) if inpaint else x
    theirs = (torch.from_numpy(a) for a in (t, tokens, mask & ~drop[:, None]))
    assert_close(ours, modules["base"](channels_first(seen), *theirs))
    other = jax.jit(stage.net.apply)({"params": params}, x, t, caption | {"drop_text": ~drop}, known=kept)
    assert np.abs(other - ours).max() > 1e-3


def test_the_upsampler_is_the_same(made, read):
    inpaint, modules, model = made
    stage, config, params = models.load_stage(model, "upsampler")
    assert stage.diffusion.spacing == "fast27" and config["model"]["resize"] == "linear"
    assert stage.diffusion.noise_scale == 0.997
    tokens, mask, _ = read
    small, x, t = normal(2, SIDE, SIDE, 3), normal(2, LARGE, LARGE, 3), np.array([7, 900])
    kept, enlarged = known(inpaint, 2, LARGE, LARGE), stage.low_res.enlarge(small)
    caption = dict(text=tokens, token_mask=mask, drop_text=np.zeros(2, bool))
    ours = jax.jit(stage.net.apply)({"params": params}, x, t, caption, enlarged, known=kept)
    theirs = torch.nn.functional.interpolate(channels_first(small), LARGE, mode="bilinear")
    seen = [channels_first(part) for part in ([x, kept.astype(np.float32)] if inpaint else [x])]
    words = (torch.from_numpy(a) for a in (t, tokens, mask))
    assert_close(ours, modules["upsample"](torch.cat([*seen, theirs], 1), *words))


def ancestral(network, beta, times, noise, kept, keep, scale=1.0):
    """DDPM's sampling in torch with learned variances (improved DDPM, equations 14 and 15) and the same noise
    at every step; x0 is `kept` where `keep` is 1."""
    alpha_bar = np.cumprod(1 - np.asarray(beta, np.float64))
    x, before = scale * noise, [*alpha_bar[times[1:]], 1.0]
    for number, (t, bar_s) in enumerate(zip(times, before, strict=True)):
        bar_t = alpha_bar[t]
        beta_t = 1 - bar_t / bar_s
        eps, frac = network(x, torch.full((len(x),), int(t))).chunk(2, dim=1)
        x0 = (x - (1 - bar_t) ** 0.5 * eps) / bar_t**0.5
        x0 = (x0 * (1 - keep) + kept * keep).clamp(-1, 1)
        x = (bar_s**0.5 * beta_t * x0 + (bar_t / bar_s) ** 0.5 * (1 - bar_s) * x) / (1 - bar_t)
        if number < len(times) - 1:
            small, share = np.log(beta_t * (1 - bar_s) / (1 - bar_t)), (frac + 1) / 2
            x = x + (share * np.log(beta_t) + (1 - share) * small).mul(0.5).exp() * noise
    return x


def test_a_whole_run_is_the_same(repainting, monkeypatch):
    """Guidance, schedules, the enlarging and what is kept: a caption drawn into half of a picture."""
    _, modules, model = repainting
    tokens, mask = load_tokenizer(model / "tokenizer", LENGTH)([CAPTION])

    def noise(*shape):
        return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)

    monkeypatch.setattr(sampling, "_normal", lambda keys, fold, shape: noise(len(keys), *shape))
    picture = np.clip(noise(1, LARGE, LARGE, 3), -1, 1)
    repaint = (np.arange(LARGE) < LARGE // 2).astype(np.float32)[None, :, None, None] + 0 * picture[..., :1]
    small = (picture[:, ::2, ::2], repaint[:, ::2, ::2])
    keys, batch = jax.random.split(jax.random.key(0), 1), {"tokens": tokens, "token_mask": mask}
    base, _, base_params = models.load_stage(model, "decoder")
    above, _, above_params = models.load_stage(model, "upsampler")
    names = ("inpaint_image", "inpaint_mask")
    read = batch | dict(zip(names, small, strict=True))
    drawn = jax.jit(lambda p, b: base.sample(p, keys, b, num_steps=4))(base_params, read)
    low_res = np.round((np.asarray(drawn) + 1) * 127.5) / 127.5 - 1
    read = batch | dict(zip(names, (picture, repaint), strict=True)) | {"low_res": low_res}
    large = jax.jit(lambda p, b: above.sample(p, keys, b, num_steps=3))(above_params, read)

    words, empty = torch.from_numpy(tokens), torch.zeros(1, LENGTH, dtype=torch.bool)
    kept, keep = channels_first(small[0]), channels_first(1 - small[1])

    def guided(x, t):
        seen = torch.cat([x, kept * keep, keep], 1)
        told, untold = (modules["base"](seen, t, words, m) for m in (torch.from_numpy(mask), empty))
        eps = untold[:, :3] + 3.0 * (told[:, :3] - untold[:, :3])
        return torch.cat([eps, told[:, 3:]], 1)

    u = np.arange(1001) / 1000
    cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    x_T = channels_first(noise(1, SIDE, SIDE, 3))
    with torch.no_grad():
        expected = ancestral(guided, beta, [999, 666, 333, 0], x_T, kept, keep)
        assert_close(drawn, expected)
        kept, keep = channels_first(picture), channels_first(1 - repaint)
        enlarged = torch.nn.functional.interpolate(channels_first(low_res), LARGE, mode="bilinear")

        def upsampler(x, t):
            seen = torch.cat([x, kept * keep, keep, enlarged], 1)
            return modules["upsample"](seen, t, words, torch.from_numpy(mask))

        x_T, linear = channels_first(noise(1, LARGE, LARGE, 3)), np.linspace(1e-4, 0.02, 1000)
        assert_close(large, ancestral(upsampler, linear, [999, 500, 0], x_T, kept, keep, scale=0.997))
    assert np.abs(np.asarray(large) - picture)[:, LARGE // 2 :].max() < 1e-6


def test_it_draws_and_repaints_captions_without_clip_and_prior(repainting):
    folder = repainting[2]
    index = modeldir.read_index(folder)
    assert list(index["stages"]) == ["decoder", f"upsampler{LARGE}"] and "MIT" in index["licence"]
    model = pipeline.UnCLIP.load(folder)
    how = dict(decoder_steps=2, upsampler_steps=[2])
    drawn, other = model.text_to_image([CAPTION, "a blue ring"], **how), model.text_to_image([CAPTION], **how)
    assert drawn.images.shape == (2, LARGE, LARGE, 3) and drawn.image_embeds.shape == (2, 0)
    assert list(drawn.timings) == ["decoder", f"upsampler{LARGE}"] == list(drawn.settings)
    assert np.abs(drawn.images[0] - drawn.images[1].astype(int)).max() > 1
    assert np.abs(drawn.images[0] - other.images[0].astype(int)).max() <= 1
    mask = np.zeros((LARGE, LARGE), bool)
    mask[:, : LARGE // 2] = True
    filled = model.inpaint(drawn.images[0], mask, CAPTION, n=1, num_steps=2)
    np.testing.assert_array_equal(filled.images[0][~mask], drawn.images[0][~mask])
    assert np.abs(filled.images[0][mask] - drawn.images[0][mask].astype(int)).max() > 1
    message = (
        "cannot do variations: its decoder reads no image embeddings; it can do .*image_to_image, inpaint"
    )
    with pytest.raises(ValueError, match=message):
        model.variations(drawn.images[0])
    with pytest.raises(ValueError, match="has no prior"):
        model.settings(prior_steps=2)
    with pytest.raises(ValueError, match="choose the scenes with --scenes"):
        drawing.scenes_of(model)
    assert drawing.scenes_of(model, "quickstart")[1] == LARGE


def test_latents_without_an_embedding_come_back(repainting, tmp_path):
    model = pipeline.UnCLIP.load(repainting[2])
    image = np.full((LARGE, LARGE, 3), 90, np.uint8)
    latents = model.invert([image], captions=[CAPTION], num_steps=2)
    latents.save(tmp_path / "latents.npz")
    again = Latents.load(tmp_path / "latents.npz")
    assert again.image_embeds.shape == (1, 0) and again.captions == (CAPTION,)
    assert model.from_latents(again, upsample=False).base.shape == (1, SIDE, SIDE, 3)


@pytest.mark.parametrize("stage", ["decoder", f"upsampler{LARGE}"])
def test_a_stage_is_trained_on_with_its_own_tokenizer(repainting, stage, tmp_path):
    """Without a CLIP; its parameters are what the released ones were, and it needs captions alone."""
    config = importlib.import_module("configs.finetune").get_config(f"{repainting[2]}/{stage}").to_dict()
    assert not config["clip"] and config["tokenizer"]["context_length"] == LENGTH
    tokens, _ = inputs.make_tokenizer(config, tmp_path)([CAPTION])
    assert (tokens == load_tokenizer(repainting[2] / "tokenizer", LENGTH)([CAPTION])[0]).all()
    built = models.build_stage(config)
    fields = inputs.dataset_fields(config, make_plan(config))
    assert {"image", "tokens", "token_mask"} <= fields and "image_embed" not in fields
    _, _, params = models.load_start(config["init_from"], config)
    modeldir.check_params(started_from("", params, models.abstract_params(built)), params)


def test_the_tokenizer_has_neither_start_nor_end(tmp_path):
    write_tokenizer(tmp_path)
    made = load_tokenizer(tmp_path, LENGTH)
    tokens, mask = made(["A RED star", "a  &amp;"])
    pieces = [
        [made._encoder.id_to_token(n) for n in row[real]] for row, real in zip(tokens, mask, strict=True)
    ]
    assert pieces[0] == ["a", "Ġred", "Ġ", "st", "a", "r"]
    # Its authors' code lowers the text and changes nothing else: neither spaces nor entities.
    assert "".join(pieces[1]).startswith("aĠĠ&") and mask.sum(1).tolist() == [6, len(pieces[1])]
    assert made(["red red red red red red red red"])[1].all()
    assert made.decode(tokens[0]) == "a red star"
    made.save(tmp_path / "saved")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "saved")(["A RED star", "a  &amp;"])[0], tokens)


@pytest.mark.parametrize(
    ("stage", "count", "own"),
    [
        ("decoder", 385_030_726, dict(channel_mult=[1, 2, 3, 4], num_res_blocks=3, embed_dim=0)),
        ("upsampler", 398_361_286, dict(channel_mult=[1, 1, 2, 2, 4, 4], num_res_blocks=2)),
    ],
)
def test_the_released_sizes_are_read_off_the_tensors(stage, count, own):
    """The counts are those of the released files."""
    text = dict(vocab_size=50257, context_length=128, width=512, depth=16, num_heads=8)
    shared = dict(channels=192, attention_resolutions=[32, 16, 8], learned_variance=True, text=text)
    model = shared | own | dict(image_size=64 if stage == "decoder" else 256)
    abstract = models.abstract_params(models.build_stage({"stage": stage, "model": model}))
    shapes = tables.expected_shapes(glide.rows(abstract), abstract)
    assert sum(np.prod(shape) for shape in shapes.values()) == count
    config, _ = glide._stage(Tensors("a file", shapes, None), stage)
    assert model.items() <= config["model"].items()


def test_checkpoints_of_training_are_the_same_model(repainting, tmp_path, monkeypatch):
    monkeypatch.setattr(glide, "SIDES", (SIDE, LARGE))
    folder = torch_files.wrap_folder(repainting[2].parent, tmp_path / "wrapped")
    words = str(folder / "tokenizer")
    convert.convert_weights("glide", folder, tmp_path / "out", tokenizer=words, dtype="float32")
    assert torch_files.weights(tmp_path / "out") == torch_files.weights(repainting[2])


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    write(tmp_path, False)
    arguments = ["glide", str(tmp_path), str(tmp_path / "out")]
    assert convert.main(arguments) == 2
    assert "comes without a tokenizer: give the folder of their encoder.json.gz" in capsys.readouterr().err
    arguments.append(f"--tokenizer={tmp_path / 'tokenizer'}")
    (tmp_path / "base.pt").rename(tmp_path / "other.pt")
    assert convert.main(arguments) == 2
    assert "must be a folder with one file base*.pt" in capsys.readouterr().err
    (tmp_path / "other.pt").rename(tmp_path / "base_a.pt")
    (tmp_path / "upsample.pt").rename(tmp_path / "base_b.pt")
    assert convert.main(arguments) == 2
    assert "holds base_a.pt and base_b.pt: give a folder with the pair" in capsys.readouterr().err
    (tmp_path / "base_a.pt").unlink()
    assert convert.main(arguments) == 2
    assert (
        "has 6 input channels: a network of this role has 3, or 7 for repainting" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()

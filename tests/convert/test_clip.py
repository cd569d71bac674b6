"""CLIPs of others: equal to transformers' CLIPModel, back again to the bit, and clear errors."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.convert.torch_archive import TorchArchive
from dalle2_jax.evaluate import fidelity, picture_sets
from dalle2_jax.evaluate.networks import Networks, open_judge
from dalle2_jax.models import models
from dalle2_jax.models.stages import clip as clip_stage
from dalle2_jax.runtime import modeldir
from tests.convert import clip_tokenizer, torch_files

torch = pytest.importorskip("torch", reason="the oracle is transformers' CLIPModel")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers' CLIPModel")

LENGTH, SIDE, EMBED = 8, 12, 24


def clip_model(vocab_size, activation="quick_gelu", embed=EMBED, **vision):
    """A CLIPModel with random weights, two and three heads of 64, none of them zero."""
    common = dict(num_hidden_layers=2, hidden_act=activation)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=common
            | dict(
                hidden_size=128,
                intermediate_size=512,
                num_attention_heads=2,
                vocab_size=vocab_size,
                max_position_embeddings=LENGTH,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                pad_token_id=0,
            ),
            vision_config=common
            | dict(
                hidden_size=192, intermediate_size=768, num_attention_heads=3, image_size=SIDE, patch_size=4
            )
            | vision,
            projection_dim=embed,
        )
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(std=0.1)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(folder as transformers writes it, the model)."""
    folder = tmp_path_factory.mktemp("clip")
    model = clip_model(clip_tokenizer.write(folder))
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "clip"
    convert.convert_weights("hf-clip", source[0], out, dtype="float32")
    return out


def inputs(vocab_size):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (3, SIDE, SIDE, 3)).astype(np.float32)
    lengths = np.array([3, 6, LENGTH])
    tokens = rng.integers(1, vocab_size - 2, (3, LENGTH))
    mask = np.arange(LENGTH) < lengths[:, None]
    tokens[:, 0], tokens[np.arange(3), lengths - 1] = vocab_size - 2, vocab_size - 1
    return image, (tokens * mask).astype(np.int32), mask


def assert_equal_to_transformers(directory, model):
    stage, _, params = models.load_stage(directory, "clip")
    image, tokens, mask = inputs(model.config.text_config.vocab_size)
    pixels = ((image + 1) / 2 - clip_stage.IMAGE_MEAN) / clip_stage.IMAGE_STD
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        )
    image_embed = stage.encode_image(params, image)
    text_embed, states = stage.encode_text(params, tokens, mask)
    logits = jnp.exp(params["logit_scale"]) * image_embed @ text_embed.T
    assert expected.image_embeds.std() > 0.05 and expected.text_embeds.std() > 0.05
    np.testing.assert_allclose(image_embed, expected.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(text_embed, expected.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(states, expected.text_model_output.last_hidden_state.numpy(), atol=2e-5)
    scale = float(np.exp(params["logit_scale"]))
    np.testing.assert_allclose(logits / scale, expected.logits_per_image.numpy() / scale, atol=1e-5)


def test_a_clip_of_transformers_is_the_same_here(source, converted):
    assert_equal_to_transformers(converted, source[1])
    index = modeldir.read_index(converted)
    entry = {"folder": "clip", "uses": {}, "tokenizer": "tokenizer"}
    assert index["system"] == "unclip" and index["stages"] == {"clip": entry}
    assert index["made_from"]["format"] == "hf-clip" and len(index["made_from"]["sha256"]) == 1


def test_its_tokenizer_comes_with_it(source, converted):
    theirs = transformers.CLIPTokenizer.from_pretrained(source[0])
    ours = convert.load_tokenizer(converted / "tokenizer", LENGTH)
    tokens, mask = ours(["a red star"])
    expected = theirs("a red star", padding="max_length", max_length=LENGTH)
    np.testing.assert_array_equal(tokens[0], expected["input_ids"])
    np.testing.assert_array_equal(mask[0], np.asarray(expected["attention_mask"], bool))


def test_it_goes_back_to_the_bit_and_opens_in_transformers(source, converted, tmp_path):
    assert convert.main(["to-diffusers", str(converted), str(tmp_path / "back")]) == 0
    again = transformers.CLIPModel.from_pretrained(tmp_path / "back")
    theirs = source[1].state_dict()
    assert again.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())
    assert again.config.text_config.hidden_act == "quick_gelu"
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path / "back")
    expected = transformers.CLIPTokenizer.from_pretrained(source[0])("a red star")["input_ids"]
    assert words("a red star")["input_ids"] == expected and words.pad_token_id == 0


def openai_state(model) -> dict:
    """The state dict in OpenAI's layout, renamed from transformers'."""
    state, out = model.state_dict(), {}

    def tower(theirs, ours):
        for i in range(2):
            a, b = f"{theirs}.encoder.layers.{i}", f"{ours}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [state[f"{a}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{b}.attn.in_proj_{kind}"] = torch.cat(parts)
                out[f"{b}.attn.out_proj.{kind}"] = state[f"{a}.self_attn.out_proj.{kind}"]
                out[f"{b}.ln_1.{kind}"] = state[f"{a}.layer_norm1.{kind}"]
                out[f"{b}.ln_2.{kind}"] = state[f"{a}.layer_norm2.{kind}"]
                out[f"{b}.mlp.c_fc.{kind}"] = state[f"{a}.mlp.fc1.{kind}"]
                out[f"{b}.mlp.c_proj.{kind}"] = state[f"{a}.mlp.fc2.{kind}"]

    tower("text_model", "")
    tower("vision_model", "visual.")
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.proj"] = state["visual_projection.weight"].T
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["text_projection"] = state["text_projection.weight"].T
    out["logit_scale"] = state["logit_scale"]
    return out


class Summed(torch.nn.Module):
    def forward(self, x):
        return x + sum(value.sum() for value in self.buffers())


def as_module(state: dict, traced: bool = False):
    """A module with these parameters, nested as their names are; to be traced it uses them all."""
    root = Summed() if traced else torch.nn.Module()
    for name, value in state.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, torch.nn.Module())
            node = node._modules[parent]
        node.register_buffer(last, value.contiguous())
    return root


@pytest.mark.parametrize("archive", ["script", "scripted again", "traced", "state dict"])
def test_openais_layout_is_read_from_their_archives(source, tmp_path, archive):
    """TorchScript with half-precision weights, as released and saved again; a state dict with odd strides."""
    folder, model = source
    state = openai_state(model) | {"input_resolution": torch.tensor(SIDE), "vocab_size": torch.tensor(7)}
    if archive != "state dict":
        half = {k: v.half() for k, v in state.items()}
        if (
            archive == "scripted again"
        ):  # what their own code has in every block, and open_clip in both towers
            half["transformer.resblocks.1.attn_mask"] = torch.full((2, 2), -torch.inf)
            half["visual.input_resolution"] = torch.tensor(SIDE)
        if archive == "traced":
            torch.jit.trace(as_module(half, traced=True), torch.ones(1)).save(tmp_path / "clip.pt")
        else:
            torch.jit.script(as_module(half)).save(tmp_path / "clip.pt")
        if archive != "script":
            torch.jit.save(torch.jit.load(tmp_path / "clip.pt"), tmp_path / "clip.pt")
        model = transformers.CLIPModel(model.config).eval()
        model.load_state_dict({k: v.half().float() for k, v in source[1].state_dict().items()})
    else:
        torch.save(state, tmp_path / "clip.pt")
    arguments = ["openai-clip", str(tmp_path / "clip.pt"), str(tmp_path / "out"), "--dtype=float32"]
    assert convert.main(arguments) == 2  # it has no tokenizer
    assert convert.main([*arguments, f"--tokenizer={folder}"]) == 0
    assert_equal_to_transformers(tmp_path / "out", model)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_says_which_activation_and_which_heads(source, tmp_path, quick):
    own = {} if quick else dict(num_attention_heads=4, intermediate_size=840)  # as ViT-g has them
    model = clip_model(source[1].config.text_config.vocab_size, "quick_gelu" if quick else "gelu", **own)
    from safetensors.torch import save_file

    folder = tmp_path / "source"
    folder.mkdir()
    state = {name: value.contiguous() for name, value in openai_state(model).items()}
    save_file(state, folder / "open_clip_model.safetensors")
    tower = dict(width=192) | ({} if quick else dict(head_width=48, mlp_ratio=4.375))
    described = dict(vision_cfg=tower, text_cfg=dict(width=128, heads=2), quick_gelu=quick)
    config = dict(model_cfg=described, preprocess_cfg=dict(mean=list(clip_stage.IMAGE_MEAN)))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    convert.convert_weights("open-clip", folder, out, tokenizer=str(source[0]), dtype="float32")
    assert_equal_to_transformers(out, model)
    if not quick:
        assert convert.main(["to-diffusers", str(out), str(tmp_path / "back")]) == 0
        again = transformers.CLIPModel.from_pretrained(tmp_path / "back")
        theirs = model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())
    described["vision_cfg"]["timm_model_name"] = "convnext_base"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="timm_model_name is 'convnext_base': only CLIP's architecture"):
        convert.convert_weights("open-clip", folder, out, tokenizer=str(source[0]))


def test_laions_folders_hold_both_layouts_and_a_tokenizer(source, converted, tmp_path):
    """OpenCLIP's files beside transformers', as on the hub: each format reads its own."""
    folder = shutil.copytree(source[0], tmp_path / "both")
    state = {f"module.{name}": value.contiguous() for name, value in openai_state(source[1]).items()}
    state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
    torch.save({"epoch": 1, "state_dict": state}, folder / "open_clip_pytorch_model.bin")
    described = dict(vision_cfg=dict(width=192), text_cfg=dict(width=128, heads=2), quick_gelu=True)
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=described, preprocess_cfg={})))
    for kind in ("open-clip", "hf-clip"):
        assert convert.main([kind, str(folder), str(tmp_path / kind), "--dtype=float32"]) == 0
        assert torch_files.weights(tmp_path / kind) == torch_files.weights(converted)
        ours = convert.load_tokenizer(tmp_path / kind / "tokenizer", LENGTH)(["a red star"])
        np.testing.assert_array_equal(ours[0], convert.load_tokenizer(source[0], LENGTH)(["a red star"])[0])


def test_a_checkpoint_of_training_is_the_same_model(source, converted, tmp_path):
    folder = torch_files.wrap_folder(source[0], tmp_path / "wrapped")
    convert.convert_weights("hf-clip", folder, tmp_path / "out", dtype="float32")
    assert torch_files.weights(tmp_path / "out") == torch_files.weights(converted)


def test_tensors_that_do_not_fit_are_named(source, tmp_path):
    folder, model = source
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    state["text_projection.weight"] = state["text_projection.weight"][:, :-1].contiguous()
    state["visual_projection.wait"] = state.pop("visual_projection.weight")
    (bad / "model.safetensors").unlink()
    torch.save(state, bad / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        convert.convert_weights("hf-clip", bad, tmp_path / "out")
    message = str(error.value)
    near = r"missing: visual_projection.weight [24, 192] (is 'visual_projection.wait' meant for it?)"
    assert near in message
    assert "surplus: visual_projection.wait [24, 192]" in message
    assert "misshapen: text_projection.weight has [24, 127], the model expects [24, 128]" in message
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_clip_is_refused(source, tmp_path, capsys):
    folder, _ = source
    bad = shutil.copytree(folder, tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())

    def refused(message, **changes):
        (bad / "config.json").write_text(json.dumps(config | changes))
        assert convert.main(["hf-clip", str(bad), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err

    refused("holds a 'siglip'", model_type="siglip")
    refused("intermediate_size is 100", text_config=config["text_config"] | {"intermediate_size": 100})
    refused("hidden_act ['gelu', 'quick_gelu']", text_config=config["text_config"] | {"hidden_act": "gelu"})
    refused("layer_norm_eps is 0.1", vision_config=config["vision_config"] | {"layer_norm_eps": 0.1})
    assert convert.main(["hf-clip", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err


# --- torch's archives ---


def test_archives_of_torch_are_read_without_torch(tmp_path):
    values = {
        "half": torch.randn(3, 4).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "int64": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "turned": torch.randn(4, 6)[1:3, ::2].T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "shared": torch.arange(6.0)[2:4],
    }
    torch.save(
        {"state_dict": values, "step": 3, "pair": (torch.ones(2), [torch.zeros(1)])}, tmp_path / "a.pt"
    )
    archive = TorchArchive(tmp_path / "a.pt")
    assert set(archive.tensors) == {f"state_dict.{name}" for name in values} | {"pair.0", "pair.1.0"}
    for name, value in values.items():
        read = archive.read(f"state_dict.{name}")
        assert read.shape == tuple(value.shape)
        expected = value.float() if name == "bfloat16" else value
        np.testing.assert_array_equal(read.astype(expected.numpy().dtype), expected.numpy())


class Harmful:
    def __reduce__(self):
        import os

        return os.system, ("touch harmed",)


def test_nothing_in_an_archive_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "evil": Harmful()}, "bad.pt")
    archive = TorchArchive("bad.pt")
    np.testing.assert_array_equal(archive.read("weight"), [1, 1])
    assert not (tmp_path / "harmed").exists()


def test_a_tensor_that_repeats_its_storage_is_not_read(tmp_path):
    """10^18 numbers in a file of a few hundred bytes."""
    torch.save({"weight": torch.ones(1).expand(10**9, 10**9)}, tmp_path / "wide.pt")
    wide = TorchArchive(tmp_path / "wide.pt")
    assert wide.tensors["weight"].shape == (10**9, 10**9)
    with pytest.raises(ValueError, match="more numbers than its storage"):
        wide.read("weight")


def test_files_in_torchs_old_layout_are_read(tmp_path):
    from dalle2_jax.convert.tensors import open_tensors

    torch.save(
        {"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "a.pt", _use_new_zipfile_serialization=False
    )
    np.testing.assert_array_equal(open_tensors(tmp_path / "a.pt")["a"], np.arange(6.0).reshape(2, 3).T)


def test_damaged_archives_are_refused(tmp_path):
    from dalle2_jax.convert.tensors import open_tensors

    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ValueError, match="no file of weights that torch wrote"):
        open_tensors(tmp_path / "text.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_tensors(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        open_tensors(tmp_path)


def test_clip_score_of_pictures_is_what_transformers_finds(source, converted, tmp_path):
    """From files of any size and captions to the mean cosine, by their processor, tokenizer and model."""
    draw = np.random.default_rng(0)
    captions = ["a red star", "a blue ring above a circle", "square", "green"]
    for i, caption in enumerate(captions):
        shape = (30 + 5 * i, 40 - 3 * i, 3)
        Image.fromarray(draw.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pixels = processor([Image.open(tmp_path / f"{i}.png") for i in range(4)], return_tensors="pt")
    texts = transformers.CLIPTokenizer.from_pretrained(source[0])(
        captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        out = source[1](pixel_values=pixels["pixel_values"], input_ids=texts["input_ids"])
    cosine = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    assert cosine.std() > 0.01
    networks = Networks(clip=pipeline.UnCLIP.load(converted))
    found = fidelity.measure(picture_sets.open_pictures(tmp_path), None, ["clip_score"], networks)
    assert found["clip_score_raw"]["value"] == pytest.approx(cosine.mean(), abs=1e-5)
    with open_judge(str(source[0])) as judge:  # the folder of transformers, as it is
        by_judge = fidelity.measure(
            picture_sets.open_pictures(tmp_path), None, ["clip_score"], Networks(clip=judge, judge=True)
        )
    assert by_judge["clip_score_raw"]["value"] == found["clip_score_raw"]["value"]
    assert by_judge["clip_score_raw"]["features"] == f"CLIP of the judge {source[0].name}"
    assert found["clip_score_torchmetrics"]["value"] == pytest.approx(max(100 * cosine.mean(), 0), abs=1e-3)

"""Weights of others as people have them: inside training's wrappers, spoilt, truncated, no weights at all."""

import json

import ml_dtypes
import numpy as np
import pytest

from dalle2_jax.convert import convert, tables, wrappers
from dalle2_jax.convert.formats import open_clip, openai_clip
from dalle2_jax.convert.tensors import open_tensors
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir
from tests import tiny_model
from tests.convert import torch_files
from tests.convert.torch_files import Object

VISION = dict(kind="vit", patch_size=4, width=64, depth=1, num_heads=1)
TEXT = dict(vocab_size=512, context_length=32, width=64, depth=1, num_heads=1)
CLIP = dict(embed_dim=8, image_size=8, vision=VISION, text=TEXT, activation="gelu")


def clip_state(seed: int = 0) -> dict[str, np.ndarray]:
    """A CLIP's random weights in OpenAI's layout."""
    rows = openai_clip.text_rows(1) + openai_clip.vit_rows(1) + tables.leaf("logit_scale", "logit_scale")
    abstract = models.abstract_params(models.build_stage({"stage": "clip", "model": CLIP}))
    draw = np.random.default_rng(seed)
    shapes = tables.expected_shapes(rows, abstract)
    return {name: np.asarray(draw.normal(size=shape), np.float32) for name, shape in shapes.items()}


STATE, OTHER = clip_state(), clip_state(1)


def prefixed(prefix: str, state=STATE) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in state.items()}


def optimizer() -> dict:
    return {
        "state": {0: {"step": np.float32(3), "exp_avg": np.ones((2, 3), np.float32)}},
        "param_groups": [{}],
    }


# What people call a CLIP, by where it comes from. Each is one and the same model.
WRAPPED = {
    "a plain state dictionary": STATE,
    "open_clip's training": {
        "epoch": 3,
        "name": "x",
        "state_dict": prefixed("module."),
        "optimizer": optimizer(),
    },
    "a tutorial": {"model_state_dict": STATE, "optimizer_state_dict": optimizer(), "loss": np.float32(1)},
    "torch.compile and DDP": {"model": prefixed("_orig_mod.module."), "lr_scheduler": {}, "scaler": {}},
    "FSDP's names": {
        name.replace("resblocks.0.", "resblocks.0._fsdp_wrapped_module._orig_mod."): value
        for name, value in STATE.items()
    },
    "Lightning": {
        "state_dict": prefixed("model."),
        "optimizer_states": [optimizer()],
        "callbacks": {"best": np.float32(1)},
        "global_step": 7,
    },
    "Lightning's net": {"state_dict": prefixed("net."), "loops": {}},
    "AveragedModel": {"n_averaged": np.array(5), **prefixed("module.")},
    "timm's averages": {"state_dict": OTHER, "state_dict_ema": STATE, "optimizer": optimizer()},
    "averages beside a model": {"model": prefixed("module.", OTHER), "model_ema": STATE, "epoch": 3},
    "averages of parameters alone": {
        "model": OTHER | {"text_projection": STATE["text_projection"]},
        "ema": {
            "decay": np.float32(0.9),
            "module": {n: v for n, v in STATE.items() if n != "text_projection"},
        },
    },
    "DeepSpeed": {"module": STATE, "optimizer": optimizer(), "global_steps": 3, "rng_state": np.ones(3)},
    "a logit_scale of [1]": STATE | {"logit_scale": STATE["logit_scale"].reshape(1)},
    "a text tower of its own": {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": value
        for name, value in STATE.items()
    },
}
# As TorchScript saves what it has loaded: masks in the blocks, sizes in the towers.
SCRIPTED = STATE | {
    "transformer.resblocks.0.attn_mask": np.full((2, 2), -np.inf, np.float32),
    "visual.input_resolution": np.array(8),
    "context_length": np.array(32),
}


def read(path) -> dict[str, np.ndarray]:
    """Our parameters of the CLIP in a file, under flat names."""
    params = open_clip.import_weights(path).stages["clip"][1]
    return {name: np.asarray(leaf) for name, leaf in modeldir.flatten(params).items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return read(torch_files.save(tmp_path_factory.mktemp("plain") / "clip.pt", STATE))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_training_are_taken_off(name, expected, tmp_path):
    assert_same(read(torch_files.save(tmp_path / "a.pt", WRAPPED[name])), expected)


@pytest.mark.parametrize("name", ["open_clip's training", "torch.compile and DDP", "timm's averages"])
def test_and_in_the_old_layout(name, expected, tmp_path):
    assert_same(read(torch_files.save_legacy(tmp_path / "a.pt", WRAPPED[name])), expected)


@pytest.mark.parametrize("wrap", ["", "model.", "module.clip."])
def test_a_clip_that_was_scripted_again_loads(wrap, expected, tmp_path):
    tree = torch_files.module(prefixed(wrap, SCRIPTED))
    assert_same(read(torch_files.save(tmp_path / "a.pt", tree, script=True)), expected)


def test_what_was_read_and_what_was_not_is_said(tmp_path):
    tensors = open_tensors(torch_files.save(tmp_path / "a.pt", WRAPPED["timm's averages"]))
    assert tensors.source.endswith("a.pt (state_dict_ema.*)")
    said = "\n".join(tensors.notes)
    assert "the averages state_dict_ema.* are read, not the weights state_dict.*" in said
    assert "not read: optimizer.*" in said
    tensors = open_tensors(torch_files.save(tmp_path / "b.pt", WRAPPED["averages of parameters alone"]))
    assert "1 tensors that the averages lack are those of the weights, such as text_proj" in tensors.notes[-1]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"state_dict": prefixed("model.") | dict.fromkeys(
            ("model_ema.decay", "model_ema.num_updates", "model_ema.visualproj"), np.ones(2)
        )}, r"averages, state_dict\.model_ema\.\*, whose names have lost their dots \(LitEma\)"),
        ({"model": STATE, "net": OTHER}, r"holds several models \(model\.\*, net\.\*\)"),
        ({"model": STATE, "ema": {"shadow_params": list(STATE.values())}},
         r"ema\.shadow_params\.0 is no class_embedding|whose names are not those of its weights"),
        ({"model": Object("clip CLIP", {"_parameters": {"proj": np.ones(2)}, "_modules": {}})},
         r"pickled module \(_parameters\.proj\).*torch\.save\(model\.state_dict\(\), FILE\)"),
    ],
    ids=["LitEma", "two models", "nameless averages", "a pickled module"],
)  # fmt: skip
def test_what_cannot_be_told_is_named(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_tensors(torch_files.save(tmp_path / "a.pt", tree))


def test_frozen_torchscript_is_named(tmp_path):
    torch_files.save(tmp_path / "a.pt", Object("__torch__ CLIP", {"training": False}), script=True)
    with pytest.raises(ValueError, match=r"without parameters: torch\.jit\.freeze"):
        open_tensors(tmp_path / "a.pt")


def test_names_that_are_a_models_own_stay():
    """A first word that others do not share is a part of the model; so is one that is no wrapper."""
    for names in (["model.a", "head.b"], ["text_model.a", "text_model.b"], ["0", "1"], ["model", "net"]):
        assert wrappers.unwrap(names, "x").names == dict(zip(names, names, strict=True))


def test_what_a_file_holds_is_said_where_a_tensor_is_missing(tmp_path):
    torch_files.save(tmp_path / "a.pt", {"model.a": np.ones(2), "head.b": np.ones(2), "head.c": np.ones(2)})
    with pytest.raises(
        ValueError, match=r"no tensor token_embedding.weight: .* It holds model\.\* \(1\), head\.\* \(2\)"
    ):
        read(tmp_path / "a.pt")


def test_a_logit_scale_of_another_shape_is_refused(tmp_path):
    torch_files.save(tmp_path / "a.pt", STATE | {"logit_scale": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"misshapen: logit_scale has \[2\], the model expects \[\]"):
        read(tmp_path / "a.pt")


# --- spoilt and truncated ---


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tiny_model.tokenizer().save(folder)
    return folder


def said(path, words, out, capsys) -> str:
    """What `convert open-clip` says of a file that it refuses; nothing is written."""
    assert convert.main(["open-clip", str(path), str(out), f"--tokenizer={words}"]) == 2
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(dtype, words, tmp_path, capsys):
    state = {name: value.astype(dtype) for name, value in STATE.items()}
    # a number of float64 that float32 has no place for, or not a number
    state["visual.proj"][3, 5] = 1e300 if dtype is np.float64 else np.nan
    torch_files.save(tmp_path / "a.pt", {"state_dict": prefixed("module.", state)})
    message = said(tmp_path / "a.pt", words, tmp_path / "out", capsys)
    assert "of the 512 numbers of visual.proj 1 are not finite" in message


def test_weights_that_bfloat16_has_no_place_for_are_refused(words, tmp_path, capsys):
    state = STATE | {"visual.proj": np.full((64, 8), 3.4e38, np.float32)}
    torch_files.save(tmp_path / "a.pt", state)
    arguments = ["open-clip", str(tmp_path / "a.pt"), str(tmp_path / "out"), f"--tokenizer={words}"]
    assert convert.main(arguments) == 2
    assert "vision/proj/kernel would hold numbers that are not finite in bfloat16" in capsys.readouterr().err
    assert convert.main([*arguments, "--dtype=float32"]) == 0


def save_safetensors(path, state):
    modeldir.write_tensors(path, state, {name: np.dtype(np.float32) for name in state})
    return path


@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
def test_a_truncated_file_is_called_truncated(name, words, tmp_path, capsys):
    save = {"a.pt": torch_files.save, "old.pt": torch_files.save_legacy, "a.safetensors": save_safetensors}[
        name
    ]
    path = save(tmp_path / name, STATE)
    data = path.read_bytes()
    for length in (100, 2000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        message = said(path, words, tmp_path / "out", capsys)
        assert f"{name} is " in message and "truncated" in message and f"{length:,} bytes" in message
    if name != "a.pt":  # an archive's size is in its last part
        assert f"of at least {len(data):,}" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 605219813\n",
            "is a git-lfs pointer and not the file itself, of 605,219,813 bytes: run `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html>\n<html lang=en>", "is a web page and not a file of weights"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is a web page and not a file of weights"),
    ],
    ids=["empty", "pointer", "page", "refusal"],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_is_no_file_of_weights_is_called_what_it_is(data, message, name, words, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    assert f"{name} {message}" in said(tmp_path / name, words, tmp_path / "out", capsys)


def test_a_model_directory_whose_weights_were_not_fetched_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9800000\n")
    with pytest.raises(ValueError, match="is a git-lfs pointer and not the file itself, of 9,800,000 bytes"):
        modeldir.load_stage(tmp_path)


def test_shards_that_are_not_there_are_named(tmp_path):
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="names 2 files, 2 are not there: 1.safetensors, 2.saf"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an index of shards"):
        open_tensors(tmp_path)


def test_an_archive_that_is_damaged_inside_is_refused(tmp_path):
    path = torch_files.save(tmp_path / "a.pt", STATE)
    data = bytearray(path.read_bytes())
    data[len("a/data.pkl") + 60] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.pt is a damaged archive: Bad CRC-32"):
        open_tensors(path)


# --- the folders of the hub ---


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_a_folder_with_both_layouts_gives_open_clips(kind, words, expected, tmp_path, capsys):
    """As LAION's: transformers' files beside OpenCLIP's, whatever the weights are called."""
    save_safetensors(
        tmp_path / "model.safetensors", {"text_model.embeddings.token_embedding.weight": np.ones(2)}
    )
    torch_files.save(tmp_path / "pytorch_model.bin", {"text_model.x": np.ones(2)})
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    described = dict(model_cfg=dict(vision_cfg=dict(width=64), text_cfg=dict(width=64, heads=1)))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    if kind == "safetensors":
        save_safetensors(tmp_path / "open_clip_model.safetensors", STATE)
    elif kind == "bin":
        torch_files.save(tmp_path / "open_clip_pytorch_model.bin", STATE)
    else:
        halves = {"1.bin": list(STATE)[::2], "2.bin": list(STATE)[1::2]}
        for name, part in halves.items():
            torch_files.save(tmp_path / name, {key: STATE[key] for key in part})
        where = {key: name for name, part in halves.items() for key in part}
        index = tmp_path / "open_clip_pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": where}))
    assert_same(read(tmp_path), expected)
    for path in [*tmp_path.glob("open_clip_model*"), *tmp_path.glob("open_clip_pytorch*")]:
        path.unlink()
    message = said(tmp_path, words, tmp_path / "out", capsys)
    assert "is in transformers' layout: convert it as hf-clip" in message

"""From training workdirs to a model directory: the weights, nothing of the machine, and clear errors."""

import json
import shutil

import jax
import numpy as np
import pytest

from dalle2_jax import pipeline
from dalle2_jax.convert import convert
from dalle2_jax.convert.workdirs import without_paths
from dalle2_jax.models import models
from dalle2_jax.runtime import checkpoint, modeldir
from tests import tiny_model

SECRET = "/home/somebody/private"


def make_workdir(directory, folder, *, step=2, tokenizer=None, **model_changes):
    """A workdir as training leaves it, without training: the average differs from the last parameters."""
    config = tiny_model.configs()[folder]
    config["model"] |= model_changes
    config |= {"clip": f"{SECRET}/clip", "init_from": f"{SECRET}/before/", "wandb": "somebody/project"}
    config["data"] |= {"data_dir": f"{SECRET}/data", "path": f"{SECRET}/shards/{{0..9}}.tar"}
    stage = models.build_stage(config)
    params = tiny_model.random_params(stage, 0)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (tokenizer or tiny_model.tokenizer()).save(directory / "tokenizer")
    ema_params = jax.tree.map(lambda x: x + 1, params)
    with checkpoint.Checkpointer(directory, 1) as checkpointer:
        checkpointer.save(step, {"params": params, "ema_params": ema_params}, {})
    return ema_params


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """(folder of the workdirs, stage -> averaged parameters)."""
    root = tmp_path_factory.mktemp("workdirs")
    return root, {name: make_workdir(root / name, name) for name in tiny_model.RECIPES}


def sources(root, **changes) -> dict:
    roles = {role: str(root / role) for role in ("clip", "prior", "decoder")}
    return roles | {"upsamplers": (str(root / "upsampler32"),)} | changes


@pytest.fixture(scope="module")
def converted(workdirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "mine"
    convert.convert_workdirs(out, **sources(workdirs[0]), dtype="float32")
    return out


def test_float32_weights_are_the_averages_to_the_bit(workdirs, converted):
    for name, params in workdirs[1].items():
        _, stored = modeldir.load_stage(converted / name, keep_dtype=True)
        jax.tree.map(np.testing.assert_array_equal, stored, params)


def test_bfloat16_weights_are_the_averages_rounded(workdirs, tmp_path):
    convert.convert_workdirs(tmp_path / "half", **sources(workdirs[0]), name="small")
    for name, params in workdirs[1].items():
        _, stored = modeldir.load_stage(tmp_path / "half" / name)
        # 8 bits of mantissa, rounded to nearest: half a unit of 2^-7 at most
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), stored, params)
    size = (tmp_path / "half" / "clip" / "model.safetensors").stat().st_size
    assert size < 0.6 * sum(4 * x.size for x in jax.tree.leaves(workdirs[1]["clip"]))
    assert modeldir.read_index(tmp_path / "half")["name"] == "small"


def test_the_index_says_what_there_is(converted):
    index = modeldir.read_index(converted)
    uses = {"clip": {}, "prior": {"clip": "clip"}, "decoder": {"clip": "clip"}, "upsampler32": {}}
    read = {"clip": "tokenizer", "prior": "tokenizer", "decoder": "tokenizer", "upsampler32": ""}
    assert index["system"] == "unclip" and list(index["stages"]) == list(uses)
    for name, entry in index["stages"].items():
        assert entry == {"folder": name, "uses": uses[name], "tokenizer": read[name]}
    assert index["name"] == "mine"
    assert index["trained_steps"] == dict.fromkeys(tiny_model.RECIPES, 2)


def test_the_card_says_what_it_is(converted, workdirs, tmp_path):
    card = (converted / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n") and "pipeline_tag: text-to-image" in card
    count = sum(x.size for x in jax.tree.leaves(workdirs[1]["prior"]))
    assert f"| `prior` | prior | {count:,} | 2 | scenes, " in card
    assert '"channel_mult"' in card and "not stated: ask the makers of these weights" in card
    once = sources(workdirs[0], upsamplers=())
    convert.convert_workdirs(tmp_path / "free", **once, licence="Apache-2.0")
    assert "license: apache-2.0" in (tmp_path / "free" / "README.md").read_text()
    again = sources(workdirs[0], upsamplers=(), decoder=str(tmp_path / "free"))
    convert.convert_workdirs(tmp_path / "again", **again)
    assert modeldir.read_index(tmp_path / "again")["licence"] == "Apache-2.0"


def test_nothing_of_the_machine_is_in_it(converted):
    files = [path for path in converted.rglob("*") if path.is_file()]
    assert len(files) == 2 + 2 * 4 + 2
    for path in files:
        data = path.read_bytes()
        for secret in (b"/home", b"somebody", str(converted.parent).encode()):
            assert secret not in data, path
    config = json.loads((converted / "prior" / "config.json").read_text())
    assert config["clip"] == "clip" and config["init_from"] == "before"
    assert config["data"]["path"] == "{0..9}.tar" and config["optim"]["learning_rate"] > 0


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/a/b/c", "c"),
        ("a/b/", "b"),
        ("gs://bucket/run/clip", "clip"),
        ("C:\\runs\\clip", "clip"),
        ("~", ""),
        ("~/clip", "clip"),
        ("quickstart_64", "quickstart_64"),
        ("a caption, of words", "a caption, of words"),
        (["x/y", 1, None, 2.5, True], ["y", 1, None, 2.5, True]),
        ({"a": {"b": "x/y"}}, {"a": {"b": "y"}}),
        ({"classes": ["home/indoor"]}, {"classes": ["home/indoor"]}),
    ],
)
def test_without_paths(value, kept):
    assert without_paths(value) == kept


def test_what_is_written_can_be_opened_and_written_again(converted, tmp_path):
    model = pipeline.UnCLIP.load(converted)
    assert model.name == "mine" and model.image_size == 32
    (folder,) = converted.glob("upsampler*")  # a stage's own folder
    models = dict.fromkeys(("clip", "prior", "decoder"), str(converted))
    again = sources(converted.parent, **models, upsamplers=(str(folder),))
    convert.convert_workdirs(tmp_path / "again", **again, dtype="float32")
    for name in ("clip/model.safetensors", "decoder/config.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()
    index = modeldir.read_index(tmp_path / "again")
    assert list(index["stages"]) == ["clip", "prior", "decoder", folder.name]
    assert index["trained_steps"] == dict.fromkeys(index["stages"], 2)


def test_stages_that_do_not_fit_are_refused(workdirs, tmp_path):
    root = workdirs[0]

    def refused(message, **changes):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert.convert_workdirs(tmp_path / "out", **sources(root, **changes))
        assert not (tmp_path / "out").exists()

    make_workdir(tmp_path / "other_size", "decoder", embed_dim=16)
    refused("the decoder has embeddings of 16", decoder=str(tmp_path / "other_size"))
    make_workdir(tmp_path / "other_start", "upsampler32", low_res_size=16)
    refused("upsampler32 enlarges pictures of side 16", upsamplers=(str(tmp_path / "other_start"),))
    refused("two upsamplers draw 32 x 32", upsamplers=(str(root / "upsampler32"),) * 2)
    other = tiny_model.train_bpe(["completely different words"] * 5, vocab_size=512, context_length=32)
    make_workdir(tmp_path / "other_words", "prior", tokenizer=other)
    refused("other_words was trained with another tokenizer", prior=str(tmp_path / "other_words"))
    refused("holds a 'prior', not a 'decoder'", decoder=str(root / "prior"))
    refused("no model directory", clip=str(tmp_path / "absent"))
    refused("dtype 'float16'", dtype="float16")
    refused("draws image embeddings: give a clip and a prior", clip="")
    half_made = shutil.copytree(root / "clip", tmp_path / "half_made")
    shutil.rmtree(half_made / "checkpoints" / "2")
    refused("no committed checkpoint", clip=str(half_made))


def test_a_workdir_is_not_overwritten(workdirs):
    root = workdirs[0]
    with pytest.raises(ValueError, match="is a training workdir"):
        convert.convert_workdirs(root / "clip", **sources(root))


def test_the_command(workdirs, tmp_path, capsys):
    root, out = workdirs[0], tmp_path / "model"
    roles = [f"--{role}={root / role}" for role in ("clip", "prior", "decoder")]
    arguments = [*roles, f"--upsamplers={root / 'upsampler32'}", f"--out={out}", "--dtype=float32"]
    assert convert.main(["workdirs", *arguments]) == 0
    assert "--model=" in capsys.readouterr().out and (out / "upsampler32" / "config.json").exists()
    assert convert.main(["workdirs", *arguments, f"--clip={root / 'prior'}"]) == 2
    assert "holds a 'prior', not a 'clip'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["workdir"])

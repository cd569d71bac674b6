"""From configs to stages, from directories to parameters, and what a frozen CLIP adds to a batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir
from tests.tiny_model import configs, make_model

UPSAMPLER = dict(
    stage="upsampler",
    model=dict(image_size=16, low_res_size=4, crop_size=8, channels=8, channel_mult=[1, 2], num_res_blocks=1),
)
SOT, EOT = 21, 22


def changed(**model):
    return UPSAMPLER | {"model": UPSAMPLER["model"] | model}


# --- configs ---


def test_a_misspelt_setting_is_told_what_was_meant():
    with pytest.raises(ValueError, match=r"model\.chanels is not a setting; did you mean model\.channels\?"):
        models.build_stage(changed(chanels=3))
    with pytest.raises(ValueError, match=r"model\.qqq is not a setting; it has .*'channel_mult'"):
        models.build_stage(changed(qqq=3))


def test_settings_that_are_missing_are_named():
    def function(*, here, there, optional=1):
        raise AssertionError("only its signature is read")

    models.check_keywords(function, dict(here=1, there=2), "data")
    with pytest.raises(ValueError, match=r"data lacks data\.here, data\.there"):
        models.check_keywords(function, dict(optional=2), "data")


def test_an_unknown_stage_is_told_what_was_meant():
    with pytest.raises(ValueError, match="stage 'upsamplr' is unknown; did you mean 'upsampler'"):
        models.build_stage(UPSAMPLER | {"stage": "upsamplr"})
    with pytest.raises(ValueError, match="stage 'zzz' is unknown; there are .*'clip', 'prior', 'ar_prior'"):
        models.build_stage(UPSAMPLER | {"stage": "zzz"})


def test_a_config_survives_json():
    """It is stored with every checkpoint, and is enough to build the stage again: JSON has no tuples."""
    config = ConfigDict(changed(channel_mult=(1, 2)))
    stored = json.loads(json.dumps(models.to_plain(config)))
    assert stored == UPSAMPLER
    built = models.build_stage(stored)
    assert built.net == models.build_stage(models.to_plain(config)).net
    assert built.net.body["channel_mult"] == (1, 2)
    hash(built.net.body["channel_mult"])


def test_parameters_are_drawn_also_after_their_shapes_were_asked_for():
    stage = models.build_stage(changed(channel_mult=[1]))
    models.abstract_params(stage)
    params = jax.jit(stage.init)(jax.random.key(0), models.zeros(stage.batch_spec(1)))
    models.abstract_params(stage)
    flat = modeldir.flatten(params)
    drawn = [leaf for name, leaf in flat.items() if name.endswith("conv_in/kernel")]
    assert drawn and all(np.std(leaf) > 0.01 for leaf in drawn)
    again = modeldir.flatten(jax.jit(stage.init)(jax.random.key(0), models.zeros(stage.batch_spec(1))))
    assert all(np.array_equal(leaf, again[name]) for name, leaf in flat.items())


def test_abstract_parameters_are_those_of_init():
    stage = models.build_stage(UPSAMPLER)
    abstract = models.abstract_params(stage)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    zeros = models.zeros(stage.batch_spec(2))
    assert {name: (x.shape, x.dtype) for name, x in zeros.items()} == {
        name: (x.shape, x.dtype) for name, x in stage.batch_spec(2).items()
    }
    # Another batch size has the same parameters.
    other = jax.eval_shape(stage.init, jax.random.key(0), zeros)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


# --- directories ---


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """(a model directory with one upsampler, its parameters); the upsampler poses as a decoder too."""
    directory = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    abstract = models.abstract_params(models.build_stage(UPSAMPLER))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), abstract)
    modeldir.save_stage(directory / "upsampler16", UPSAMPLER, params, "float32")
    modeldir.write_index(directory, {"decoder": "upsampler16", "upsampler16": "upsampler16"})
    return directory, params


@pytest.mark.parametrize(
    "inside, name", [("", "upsampler16"), ("", "upsampler"), ("upsampler16", "upsampler")]
)
def test_a_stage_of_a_model_directory_comes_back(model_dir, inside, name):
    """Of the index, which lists upsamplers in the order in which they run, or of the stage's own folder."""
    directory, params = model_dir
    stage, config, loaded = models.load_stage(directory / inside, name)
    assert config == UPSAMPLER and stage.net == models.build_stage(UPSAMPLER).net
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_stage_that_is_not_there_or_another_is_named(model_dir, tmp_path):
    directory, _ = model_dir
    with pytest.raises(ValueError, match=r"holds no stage 'prior'; it has \['decoder', 'upsampler16'\]"):
        models.load_stage(directory, "prior")
    with pytest.raises(ValueError, match="holds a 'upsampler', not a 'decoder'"):
        models.load_stage(directory, "decoder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.load_stage(tmp_path / "nowhere", "prior")


def test_one_of_several_upsamplers_has_to_be_chosen(model_dir, tmp_path):
    _, params = model_dir
    for folder in ("upsampler16", "upsampler64"):
        modeldir.save_stage(tmp_path / folder, UPSAMPLER, params, "float32")
    modeldir.write_index(tmp_path, {name: name for name in ("upsampler16", "upsampler64")})
    with pytest.raises(ValueError, match="holds 2 upsamplers: give one of .*/upsampler16, .*/upsampler64"):
        models.load_stage(tmp_path, "upsampler")
    assert models.load_stage(tmp_path, "upsampler64")[1] == UPSAMPLER


def test_weights_of_another_size_are_refused(model_dir, tmp_path):
    _, params = model_dir
    modeldir.save_stage(tmp_path / "up", changed(channels=16), params, "float32")
    modeldir.write_index(tmp_path, {"upsampler": "up"})
    with pytest.raises(ValueError, match="conv_in/kernel"):
        models.load_stage(tmp_path, "upsampler")


# --- captions for a CLIP with a shorter context ---


def rows(*lengths, total=8):
    """Captions of that many tokens, SOT and EOT included: SOT, 1, 2, ..., EOT, 0, 0, ..."""
    tokens = np.zeros((len(lengths), total), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [SOT, *range(1, length - 1), EOT]
    mask = np.arange(total) < np.array(lengths)[:, None]
    return jnp.asarray(tokens), jnp.asarray(mask)


def test_a_caption_that_is_cut_ends_in_its_end_of_text():
    tokens, mask = models.crop_tokens(*rows(3, 5, 6, 8), context_length=5)
    expected = [[SOT, 1, EOT, 0, 0], [SOT, 1, 2, 3, EOT], [SOT, 1, 2, 3, EOT], [SOT, 1, 2, 3, EOT]]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(mask, np.arange(5) < np.array([3, 5, 5, 5])[:, None])
    assert ((tokens == EOT).sum(axis=1) == 1).all()  # trap 2
    # T5's end of text, 1, is not the highest id
    t5 = np.array([[7, 8, 9, 6, 1, 0], [7, 8, 1, 0, 0, 0]], np.int32)
    cut, _ = models.crop_tokens(jnp.asarray(t5), jnp.asarray(t5 > 0), 3)
    np.testing.assert_array_equal(cut, [[7, 8, 1], [7, 8, 1]])


def test_shorter_captions_are_padded_and_equal_ones_kept():
    tokens, mask = rows(3, 8)
    longer, longer_mask = models.crop_tokens(tokens, mask, 10)
    np.testing.assert_array_equal(longer, np.pad(tokens, ((0, 0), (0, 2))))
    np.testing.assert_array_equal(longer_mask, np.pad(mask, ((0, 0), (0, 2))))
    same, same_mask = models.crop_tokens(tokens, mask, 8)
    np.testing.assert_array_equal(same, tokens)
    np.testing.assert_array_equal(same_mask, mask)


# --- where a run starts ---


def test_a_run_starts_from_what_lies_in_its_stages_place(tmp_path):
    """In a model directory with an autoregressive prior and two CLIPs; in one with the plain CLIP alone."""
    directory = make_model(tmp_path / "extended", extended=True)
    made = configs(extended=True)
    for name, folder in (("prior", "prior"), ("clip", "clip"), ("noisy_clip", "noisy_clip")):
        stage, config, _ = models.load_start(directory, made[name])
        assert config["stage"] == made[name]["stage"], name
        assert bool(config["model"].get("noise")) == (name == "noisy_clip")
        assert stage == models.load_stage(directory / folder, folder)[0]
    plain = make_model(tmp_path / "plain")
    assert not models.load_start(plain, made["noisy_clip"])[1]["model"].get("noise")
    with pytest.raises(ValueError, match="holds no stage 'classifier'"):
        models.load_start(plain, made["classifier"])

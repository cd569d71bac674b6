"""Which fields frozen stages compute, what they read for it, and which of a stage's parameters rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import frozen, models, trainable
from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.stages import Bound, Op
from dalle2_jax.models.stages.clip import CLIP
from dalle2_jax.runtime import modeldir


def spec(**fields):
    return {name: jax.ShapeDtypeStruct(*x) for name, x in fields.items()}


@dataclasses.dataclass
class Clip:
    """An image's embedding is its mean colour, a caption's its number of tokens; it counts its calls."""

    context_length: int = 5
    calls: list = dataclasses.field(default_factory=list)
    ops = CLIP.ops

    def batch_spec(self, size):
        texts = dict(tokens=((size, 5), jnp.int32), token_mask=((size, 5), bool))
        return spec(image=((size, 4, 4, 3), jnp.float32), **texts)

    def encode_image(self, params, image):
        self.calls.append("image")
        return params["gain"] * image.mean(axis=(1, 2))

    def encode_text(self, params, tokens, token_mask):
        self.calls.append("text")
        states = params["gain"] * tokens[..., None].astype(jnp.float32)
        return token_mask.sum(axis=1, keepdims=True) * params["gain"], states


class Tokenizer:
    """Codes are whether a picture is bright."""

    ops = {"encode": Op(("codes",), ("image",)), "decode": Op(("image",), ("codes",))}

    def batch_spec(self, size):
        return spec(image=((size, 2, 2, 3), jnp.float32))

    def encode(self, params, image):
        return (image.mean(axis=-1) > params["edge"]).astype(jnp.int32)

    def decode(self, params, codes):
        return codes[..., None] * jnp.ones(3) - params["edge"]


@dataclasses.dataclass
class Reader:
    """A stage that reads these fields."""

    fields: tuple
    uses: tuple = ()

    def batch_spec(self, size):
        return {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name in self.fields}


def reading(*fields, uses=(), **stages):
    return Frozen(Reader(fields, uses), stages)


BATCH = {
    "image": jnp.zeros((2, 4, 4, 3)),
    "clip.image": jnp.ones((2, 4, 4, 3)),
    "tokens": jnp.array([[7, 8, 9, 0, 0, 0, 0, 0], [7, 1, 1, 1, 1, 1, 1, 9]]),
    "token_mask": jnp.arange(8) < jnp.array([[3], [8]]),
}
PARAMS = {"clip": {"gain": jnp.float32(2)}, "tokenizer": {"edge": jnp.float32(0.5)}}


def test_clip_computes_what_a_stage_reads_and_nothing_else():
    clip = Clip()
    decoder = {"image", "image_embed", "tokens", "token_mask"}
    encoded = reading(*decoder, clip=clip).encode_batch(PARAMS, BATCH)
    assert set(encoded) == decoder and clip.calls == ["image"]
    np.testing.assert_array_equal(encoded["image_embed"], np.full((2, 3), 2.0))
    np.testing.assert_array_equal(encoded["tokens"], BATCH["tokens"])
    prior = {"image_embed", "text_embed", "text_states", "token_mask"}
    encoded = reading(*prior, clip=clip).encode_batch(PARAMS, BATCH)
    assert set(encoded) == prior and clip.calls == ["image"] * 2 + ["text"]
    np.testing.assert_array_equal(encoded["text_embed"], [[6.0], [10.0]])  # of captions cut to CLIP's context
    assert encoded["text_states"].shape == (2, 5, 1)
    assert "clip.image" in BATCH  # the argument is as it was


def test_embeddings_that_the_dataset_carries_are_kept():
    clip, batch = Clip(), {"image_embed": jnp.ones((2, 3)), "text_embed": jnp.ones((2, 3))}
    encoded = reading("image_embed", "text_embed", clip=clip).encode_batch({}, batch)
    assert encoded["image_embed"] is batch["image_embed"] and not clip.calls


def test_frozen_stages_have_no_gradient():
    encode = reading("image_embed", clip=Clip()).encode_batch
    total = jax.grad(lambda clip: encode({"clip": clip}, BATCH)["image_embed"].sum())
    assert total({"gain": jnp.float32(2)})["gain"] == 0


@pytest.mark.parametrize(
    ("needed", "read"),
    [
        ({"image_embed"}, {"clip.image"}),
        ({"text_embed"}, {"tokens", "token_mask"}),
        ({"clip.image_embed", "text_states"}, {"clip.image", "tokens", "token_mask"}),
        ({"image", "codes"}, {"image", "tokenizer.image"}),
        ({"image", "tokenizer.codes", "image_embed"}, {"image", "tokenizer.image", "clip.image"}),
        ({"image"}, {"image"}),  # a decoder of codes computes no input
        ({"top.codes"}, {"top.codes"}),
        (set(), set()),
    ],
)
def test_what_the_dataset_provides(needed, read):
    found = reading(*needed, clip=Clip(), tokenizer=Tokenizer()).dataset_spec(7)
    assert set(found) == read
    sizes = {"clip.image": (7, 4, 4, 3), "tokenizer.image": (7, 2, 2, 3), "tokens": (7, 5)}
    assert all(found[name].shape == shape for name, shape in sizes.items() if name in found)


def test_a_field_that_two_stages_compute_needs_an_owner():
    two = dict(fine=Tokenizer(), coarse=Tokenizer())
    with pytest.raises(ValueError, match="the stage must read fine.codes or coarse.codes"):
        _ = reading("codes", **two).encoders
    found = reading("fine.codes", "coarse.codes", **two)
    assert set(found.dataset_spec(1)) == {"fine.image", "coarse.image"}
    params = {"fine": {"edge": 0.5}, "coarse": {"edge": 2.0}}
    images = {name: jnp.ones((1, 2, 2, 3)) for name in ("fine.image", "coarse.image")}
    encoded = found.encode_batch(params, images)
    assert encoded["fine.codes"].all() and not encoded["coarse.codes"].any()


def test_codes_are_shown_as_pictures():
    found = reading("tokens", tokenizer=Tokenizer())
    name, value = found.decoded(PARAMS, "codes", jnp.ones((1, 2, 2), int))
    assert name == "image" and value.shape == (1, 2, 2, 3) and (value == 0.5).all()
    assert found.decoded(PARAMS, "top.codes", 1) == ("top.codes", 1)
    assert found.decoded(PARAMS, "image_embed", 1) == ("image_embed", 1)


def test_a_loss_gets_the_stages_that_it_uses_and_no_others():
    clip = Clip()
    assert reading(clip=clip).loss_keywords(PARAMS) == {}
    given = reading(uses=("clip",), clip=clip, tokenizer=Tokenizer()).loss_keywords(PARAMS)
    assert given == {"frozen": {"clip": Bound(clip, PARAMS["clip"])}}


# --- configs ---


def test_clip_is_short_for_the_frozen_clip():
    both = dict(clip="A", frozen={"clip": "A", "t5": "B", "none": ""})
    assert frozen.paths(both) == frozen.paths(dict(frozen=both["frozen"])) == {"clip": "A", "t5": "B"}
    assert frozen.paths({}) == {}
    for config in (both, dict(frozen=dict(clip="A", t5="B"))):
        assert frozen.short(config | {"seed": 1}) == {"clip": "A", "frozen": {"t5": "B"}, "seed": 1}
    with pytest.raises(ValueError, match="config.clip C and config.frozen.clip A name the same stage"):
        frozen.paths(both | {"clip": "C"})
    with pytest.raises(ValueError, match=r"config\.frozen\.base: that name is taken"):
        frozen.paths(dict(frozen=dict(base="A")))


def test_paths_of_frozen_stages_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/a/home")
    config = models.expand_paths(dict(clip="~/c", frozen=dict(t5="~/t", vq="hf://a/b@c")))
    assert config == dict(clip="/a/home/c", frozen=dict(t5="/a/home/t", vq="hf://a/b@c"))


# --- parameters that rest ---

STAGE = {"net": {"fc1": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "fc2": {"kernel": np.zeros(4)}}}


def test_trained_parameters_and_those_that_rest_are_all_parameters():
    assert trainable.split(STAGE, ()) == (STAGE, {}) and trainable.merge(STAGE, {}) is STAGE
    params = STAGE | {"stats": {"codes": np.ones(2)}}
    trained, base = trainable.split(params, ("fc1/.*", "no match"))
    assert set(modeldir.flatten(trained)) == {"net/fc1/kernel", "net/fc1/bias", "stats/codes"}
    assert set(modeldir.flatten(base)) == {"net/fc2/kernel"}
    jax.tree.map(np.testing.assert_array_equal, trainable.merge(trained, base), params)
    jax.tree.map(np.testing.assert_array_equal, trainable.like(params, trained), trained)
    assert trainable.like(params, params) is params


@pytest.mark.parametrize(
    ("pattern", "message"), [("fc3", "'fc3' matches no parameter; there are net, "), ("(", "no regular")]
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern, message):
    trainable.check(STAGE, ("fc2", "bias$"))
    with pytest.raises(ValueError, match=message):
        trainable.check(STAGE, ("fc2", pattern))


def test_resting_parameters_that_changed_on_disk_are_refused(tmp_path):
    base = jax.tree.map(np.float32, STAGE)
    trainable.save_base(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, trainable.load_base(tmp_path, modeldir.sha256(base)), base)
    base["net"]["fc1"]["bias"][1] = 2
    trainable.save_base(tmp_path, base)
    with pytest.raises(ValueError, match="base has changed: the sha256 of its parameters was "):
        trainable.load_base(tmp_path, modeldir.sha256(jax.tree.map(np.float32, STAGE)))


def test_parameters_of_16_bits_have_the_sha256_of_the_same_numbers():
    half = jax.tree.map(lambda x: np.asarray(x + 0.1, jnp.bfloat16), STAGE)
    single = jax.tree.map(lambda x: x.astype(np.float32), half)
    assert modeldir.sha256(half) == modeldir.sha256(single) != modeldir.sha256(STAGE)

"""One's own captions in the samples of training."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.stages import Loss, Op
from dalle2_jax.runtime import partition
from dalle2_jax.train import checks, validation
from dalle2_jax.train.plan import Plan
from tests.data.shards_for_tests import WordTokenizer


def stage(reads, draws="image"):
    """A stage whose samples show the image embedding, the token or the class of their caption."""

    def sample(params, keys, batch):
        shown = batch["tokens"][:, 0] if "tokens" in batch else batch["label"]
        shown = batch["image_embed"][:, 0] if "image_embed" in batch else shown
        return jnp.broadcast_to(shown[:, None, None, None] / 100, (len(shown), 4, 4, 3))

    return types.SimpleNamespace(
        ops={"sample": Op((draws,))},
        loss=lambda params, key, batch, **_: Loss(jnp.float32(0)),
        sample=sample,
        batch_spec=lambda size: dict.fromkeys((draws, *reads)),
    )


def run(reads, captions, prior="", **batch):
    host = {"image": np.zeros((8, 4, 4, 3), np.uint8), "index": np.arange(8)} | batch
    dataset = types.SimpleNamespace(
        batches=lambda size, **_: iter([host]),
        labels=lambda indices: [f"record {i}" for i in indices],
        classes=("cat", "dog"),
        settings=types.SimpleNamespace(tokenizer=WordTokenizer()),
    )
    config = dict(batch_size=8, eval_batches=1, num_samples=3, seed=0)
    config |= dict(sample_captions=captions, sample_prior=prior)
    made = validation.Validation(Plan(config, stage(reads), partition.make_mesh()), dataset)
    grids = []
    shown, label = [], made._labelled
    made._labelled = lambda images: shown.append(images) or label(images)
    made.samples({}, {}, types.SimpleNamespace(grid=lambda *grid: grids.append(grid)), 5)
    return grids[0][3], shown[0]


TOKENS = dict(tokens=np.full((8, 4), 99, np.int32), token_mask=np.ones((8, 4), bool))


def test_captions_of_the_config_are_drawn_and_name_the_samples():
    labels, shown = run(TOKENS, ("a 10", "b 20", "c 30", "d 40"), **TOKENS)
    assert labels == ["a 10", "b 20", "c 30", "d 40"]
    levels = shown[:, 0, 0, 0].astype(float)
    np.testing.assert_allclose(levels, (np.array([0.1, 0.2, 0.3, 0.4]) + 1) * 127.5, atol=1)
    labels, shown = run(TOKENS, (), **TOKENS)
    assert labels == ["record 0", "record 1", "record 2"] and len(shown) == 3


def test_image_embeddings_are_those_that_the_prior_draws(monkeypatch):
    def sample(params, keys, batch):
        return batch["tokens"][:, :2] * params["factor"]

    prior = types.SimpleNamespace(context_length=4, embed_dim=2, sample=sample)
    loaded = validation.Prior(Frozen(prior, {}), {"factor": jnp.float32(2)})
    monkeypatch.setattr(validation.Prior, "load", lambda path, plan: loaded)
    stored = TOKENS | dict(image_embed=np.zeros((8, 2), np.float32))
    _, shown = run((*TOKENS, "image_embed"), ("a 10", "b 20"), "PRIOR", **stored)
    np.testing.assert_allclose(shown[:, 0, 0, 0], (np.array([0.2, 0.4]) + 1) * 127.5, atol=1)


def test_captions_that_name_classes():
    own = dict(label=np.full(8, -1, np.int32))
    labels, shown = run(own, ["a dog", "cat"], **own)
    assert labels == ["a dog", "cat"] and shown[0, 0, 0, 0] > shown[1, 0, 0, 0]
    with pytest.raises(ValueError, match="'a fox' names none, or several, of the classes cat, dog"):
        run(own, ["a fox"], **own)
    with pytest.raises(ValueError, match="the data bring text_embed of other captions"):
        run(own, ["a fox"], **own, text_embed=np.zeros((8, 2), np.float32))


@pytest.mark.parametrize(
    "reads, draws, captions, message",
    [
        (("tokens", "image_embed"), "image", ("a",), "which a prior draws: give --config.sample_prior="),
        (("label", "image_embed"), "image", ("a",), "image_embed and no captions. Leave them out"),
        (("tokens", "low_res", "crop_yx"), "image", ("a",), "also reads low_res"),
        (("tokens", "token_mask"), "image_embed", ("a",), "draws no pictures from captions"),
        ((), "image", ("a",), "draws no pictures from captions"),
        (("tokens",), "image", "a red star", r"a list of captions: \('a red star',\)"),
    ],
)
def test_stages_that_do_not_draw_from_captions_refuse_them(reads, draws, captions, message):
    with pytest.raises(ValueError, match=message):
        checks._check_sample_captions(dict(stage="x", sample_captions=captions), stage(reads, draws))


def test_stages_that_draw_from_captions():
    for reads in (("tokens", "token_mask"), ("label",), ("t5.text_states", "token_mask")):
        checks._check_sample_captions(dict(stage="x", sample_captions=("a",)), stage(reads))

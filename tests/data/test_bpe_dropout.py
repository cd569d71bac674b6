"""BPE dropout: the tokens of a caption in training follow from seed, epoch and record, and spell it."""

import functools

import numpy as np
import pytest

from dalle2_jax.data import pipeline
from dalle2_jax.data.tokenizer import Tokenizer, train_bpe
from dalle2_jax.train import inputs

CAPTIONS = ["a red star above a blue ring", "a yellow circle on grey", "café!? 12"]


@functools.cache
def words() -> Tokenizer:
    return train_bpe(CAPTIONS * 4, vocab_size=320, context_length=40)


def test_without_dropout_the_tokens_are_the_usual_ones():
    seeds = [(0, 0, i) for i in range(3)]
    for usual, own in zip(words()(CAPTIONS), words().with_dropout(CAPTIONS, 0.0, seeds), strict=True):
        np.testing.assert_array_equal(own, usual)


def test_with_dropout_captions_have_more_tokens_that_spell_the_same():
    seeds = [(0, 0, i) for i in range(3)]
    tokens, mask = words().with_dropout(CAPTIONS, 0.5, seeds)
    assert mask.sum() > words()(CAPTIONS)[1].sum() + 3
    assert [words().decode(row) for row in tokens] == [words().decode(row) for row in words()(CAPTIONS)[0]]
    np.testing.assert_array_equal(words().with_dropout(CAPTIONS[::-1], 0.5, seeds[::-1])[0], tokens[::-1])
    assert (words().with_dropout(CAPTIONS, 0.5, [(0, 1, i) for i in range(3)])[0] != tokens).any()


def test_a_rate_of_one_is_refused():
    with pytest.raises(ValueError, match="bpe_dropout 1.0 must be in"):
        words().with_dropout(CAPTIONS, 1.0, [(0,)] * 3)


def test_batches_have_it_and_can_be_read_again():
    how = dict(source="scenes", path="debug_64", split="train", fields=("tokens", "token_mask"))
    how |= dict(tokenizer=words(), seed=3)
    plain, dropped, again = (
        next(pipeline.make_dataset(**how, **more).batches(4))["tokens"]
        for more in ({}, dict(bpe_dropout=0.5), dict(bpe_dropout=0.5))
    )
    np.testing.assert_array_equal(dropped, again)
    assert (plain != dropped).any()


def test_validation_has_none(monkeypatch):
    """Training and validation are made with the same settings but for what training changes at random."""
    made = []

    class Made:
        classes, settings, source = (), type("S", (), {"shapes": lambda *_: {}})(), None

    def make(**settings):
        made.append(settings)
        return Made()

    monkeypatch.setattr(pipeline, "make_dataset", make)
    data = dict(source="scenes", path="debug_64", split="train", eval_split="validation", bpe_dropout=0.1)
    plan = type("P", (), {"stage": type("T", (), {"batch_spec": lambda *_: {}})(), "frozen_stages": {}})
    inputs.make_datasets({"data": data, "seed": 0, "stage": "x"}, plan, set(), None)
    assert [settings["bpe_dropout"] for settings in made] == [0.1, 0.0]

"""T5 from a folder: states and token ids equal transformers', and what is refused."""

import json

import jax
import numpy as np
import pytest

from dalle2_jax.convert import convert
from dalle2_jax.data.tokenizer import load_tokenizer
from dalle2_jax.models import models

torch = pytest.importorskip("torch", reason="the oracle is transformers, which runs on torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["a red star above a blue ring", "Two GREEN squares", "", "ein blauer Ring, zweimal: a red star"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(T5 with encoder and decoder, its tokenizer, their folder)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("t5")
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 30),
            model_writer=file,
            vocab_size=70,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder, extra_ids=4)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=96,
            d_model=24,
            d_kv=8,
            d_ff=20,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()
    model.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "model"
    assert convert.main(["t5", str(theirs[2]), str(out), "--dtype=float32"]) == 0
    return out


def test_ids_and_states_are_the_same(theirs, ours):
    model, tokenizer, _ = theirs
    words = load_tokenizer(ours / "tokenizer", 40)
    tokens, mask = words(TEXTS)
    expected = tokenizer(TEXTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].bool())
    assert words.decode(tokens[0]) == TEXTS[0]  # up to the end
    stage, _, params = models.load_stage(ours, "t5")
    states = np.asarray(jax.jit(stage.encode_text)(params, tokens, mask))
    with torch.no_grad():
        other = model.encoder(expected["input_ids"], expected["attention_mask"]).last_hidden_state.numpy()
    assert other.std() > 0.1
    np.testing.assert_allclose(states, other, atol=1e-5 * np.abs(other).max())  # at padding, too


def test_a_cut_caption_keeps_its_end(ours):
    tokens, mask = load_tokenizer(ours / "tokenizer", 4)(TEXTS)
    assert tokens[:, -1].tolist() == [1, 1, 0, 1] and tokens[2].tolist() == [1, 0, 0, 0]
    assert mask.sum(axis=1).tolist() == [4, 4, 1, 4]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("feed_forward_proj", "relu", "only 'gated-gelu' is built"),
        ("model_type", "mt5", "only 't5' is built"),
    ],
)
def test_other_models_are_refused(theirs, tmp_path, capsys, name, value, message):
    config = json.loads((theirs[2] / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.main(["t5", str(tmp_path), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err

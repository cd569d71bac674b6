"""Text states of a data set in files: as many as a caption has tokens, and training from them."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("pyarrow.parquet", reason="metadata of embeddings need pyarrow")

from configs import decoder64  # noqa: E402
from dalle2_jax.data import embeddings, text_states  # noqa: E402
from dalle2_jax.data import pipeline as data_pipeline  # noqa: E402
from dalle2_jax.data.records import BadRecord  # noqa: E402
from dalle2_jax.embed import embed  # noqa: E402
from dalle2_jax.models import models  # noqa: E402
from dalle2_jax.runtime import modeldir  # noqa: E402
from dalle2_jax.runtime.batch import as_floats  # noqa: E402
from dalle2_jax.train import inputs, loop  # noqa: E402
from dalle2_jax.train.plan import Plan  # noqa: E402
from tests import tiny_model  # noqa: E402
from tests.test_embed import COUNT, recipe, write_shards  # noqa: E402
from tests.tiny_run import stored_state  # noqa: E402

LENGTH, WIDTH = 16, 8
ENCODER = dict(vocab_size=512, width=WIDTH, depth=1, num_heads=2, mlp_width=8, head_dim=4)
ENCODER |= dict(context_length=LENGTH, mask_token=500)
TEXT = dict(states_width=WIDTH, context_length=LENGTH, width=WIDTH, pool_heads=2)
DECODER = dict(embed_dim=0, text=TEXT, image_size=8, channels=8, channel_mult=[1], num_res_blocks=1)
DECODER |= dict(attention_resolutions=[8], head_dim=8, dropout=0.0, text_drop=0.0)


def make_encoder(folder, seed=0):
    """A model directory of a T5 with random weights."""
    config = {"stage": "t5", "model": ENCODER, "data": {}}
    params = tiny_model.random_params(models.build_stage(config), seed)
    modeldir.save_stage(folder / "t5", config, params, "float32")
    tiny_model.tokenizer().save(folder / "tokenizer")
    modeldir.write_index(folder, {"t5": "t5"}, tokenizer="tokenizer", extra={"name": "t5"})
    return os.fspath(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def config(shards, **changes) -> dict:
    made = recipe(shards, decoder64, model=DECODER, tokenizer=dict(context_length=LENGTH), **changes)
    return made | dict(num_steps=2, eval_every=100, sample_every=100, checkpoint_every=2)


def run(shards, encoder, out):
    settings = config(shards, frozen=dict(t5=encoder))
    embed.embed(settings, "", os.fspath(out), splits=("train",), rows_per_shard=8, batch_size=8)
    embeddings.finish(embed.epath.Path(out) / "train")
    return os.fspath(out)


@pytest.fixture(scope="module")
def stored(one_device, shards, encoder, tmp_path_factory):
    return run(shards, encoder, tmp_path_factory.mktemp("states"))


def tokenizer(length=LENGTH):
    made = tiny_model.tokenizer()
    made.context_length = length
    return made


def opened(shards, stored, length=LENGTH):
    source = dict(source="tar", path=os.fspath(shards), split="train", embeddings=stored)
    fields = ("text_states", "token_mask")
    return data_pipeline.make_dataset(fields=fields, tokenizer=tokenizer(length), **source)


def test_states_are_those_of_the_captions_tokens(stored, shards, encoder):
    """In the files by record, in a batch padded with zeros beside their mask; no tokens are needed."""
    stage, _, params = models.load_stage(encoder, "t5")
    source = opened(shards, stored).source
    texts = [source.read(row).captions["en"][0] for row in range(COUNT)]
    tokens, mask = tokenizer()(texts)
    expected = np.asarray(stage.encode_text(params, tokens, mask))
    (batch,) = opened(shards, stored).batches(COUNT, repeat=False, shuffle=False)
    assert batch.keys() == {"text_states", "token_mask", "index"}
    np.testing.assert_array_equal(batch["token_mask"], mask)
    found = batch["text_states"].view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(found, np.where(mask[..., None], expected, 0), rtol=2**-8, atol=1e-6)
    folder = embed.epath.Path(stored) / "train"
    counts = [np.load(file) for file in sorted((folder / "token_counts").iterdir())]
    assert [len(part) for part in counts] == [8, 8, 5]
    np.testing.assert_array_equal(np.concatenate(counts), mask.sum(axis=1))
    plan = json.loads((folder / "embed.json").read_text())
    assert plan["dtype"] == "bfloat16" and plan["left_out"] == {} and not (folder / "img_emb").exists()
    assert plan["frozen"] == {"t5": modeldir.sha256(models.load_stage(encoder, "t5", True)[2])}
    most = mask.sum(axis=1).max()
    with pytest.raises(ValueError, match=f"up to {most} tokens, and tokenizer.context_length is {most - 1}"):
        opened(shards, stored, length=most - 1)


def test_training_from_states_is_training_with_the_encoder(stored, shards, encoder):
    """The same records, loss and gradients as with the frozen encoder, to the rounding of bfloat16."""
    t5, _, t5_params = models.load_stage(encoder, "t5")
    batches = {}
    for kind, changes in (("frozen", dict(frozen=dict(t5=encoder))), ("data", dict(embeddings=stored))):
        settings = config(shards, **(changes if kind == "frozen" else {kind: changes}))
        stage = models.build_stage(settings)
        plan = Plan(settings, stage, None, {"t5": t5} if kind == "frozen" else {})
        fields = inputs.dataset_fields(settings, plan)
        dataset, _ = inputs.make_datasets(settings, plan, fields, tokenizer())
        batch = next(dataset.batches(8))
        index = batch.pop("index")
        batches[kind] = plan.frozen.encode_batch({"t5": t5_params}, as_floats(batch)), index
    (one, first), (other, second) = batches.values()
    assert one.keys() == other.keys() == {"image", "text_states", "token_mask"}
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(one["image"], other["image"])
    params = tiny_model.random_params(stage, 2)  # a fresh network's last layer passes no gradient on

    @jax.jit
    def gradients(batch):
        return jax.value_and_grad(lambda p: stage.loss(p, jax.random.key(0), batch).value)(params)

    def apart(name, a, b):
        assert np.linalg.norm(a) > 0 and np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a), name

    (loss, expected), (value, found) = (jax.device_get(gradients(batch)) for batch in (one, other))
    assert value == pytest.approx(loss, rel=1e-2)
    found = modeldir.flatten(found)
    for name, leaf in modeldir.flatten(expected).items():
        if "text" in name or name.startswith("net/conv"):
            apart(name, leaf, found[name])
    wrong = other | {"text_states": other["text_states"][::-1]}
    moved = modeldir.flatten(jax.device_get(gradients(wrong))[1])["text_states_proj/kernel"]
    expected = modeldir.flatten(expected)["text_states_proj/kernel"]
    assert np.linalg.norm(moved - expected) > 0.1 * np.linalg.norm(expected)


def test_a_run_knows_the_encoder_of_its_states(one_device, stored, shards, tmp_path):
    """By the sha256 in embed.json; the workdir has the encoder's tokenizer."""
    settings = config(shards, data=dict(embeddings=stored))
    loop.train(settings, str(tmp_path / "run"))
    assert stored_state(tmp_path / "run", 2) and (tmp_path / "run" / "tokenizer").is_dir()
    path = embed.epath.Path(stored) / "train" / "embed.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"frozen": {"t5": 64 * "0"}}))
    try:
        with pytest.raises(ValueError, match="the frozen t5 has changed since step 2 .* is 000000000000 now"):
            loop.train(settings | dict(num_steps=3), str(tmp_path / "run"))
    finally:
        path.write_text(before)


def test_states_of_another_encoder_are_refused(stored, shards, tmp_path):
    other = make_encoder(tmp_path / "other", seed=1)
    wider = config(shards, data=dict(embeddings=stored))
    wider["model"]["text"] = TEXT | dict(states_width=12)
    plan = Plan(wider, models.build_stage(wider), None)
    with pytest.raises(ValueError, match=r"stored text_states of an example are \[16, 8\], .* \[16, 12\]"):
        inputs.make_datasets(wider, plan, inputs.dataset_fields(wider, plan), tokenizer())
    with pytest.raises(ValueError, match=r"(?s)holds other embeddings.*frozen: "):
        run(shards, other, stored)
    with pytest.raises(ValueError, match="or --config.frozen.t5=MODEL for the states of one text encoder"):
        run(shards, "", tmp_path / "none")


def test_what_states_cannot_replace_is_told():
    def fields(**changes):
        settings = config("shards", **changes)
        return inputs.dataset_fields(settings, Plan(settings, models.build_stage(settings), None))

    assert fields(data=dict(embeddings="states")) == {"image", "text_states", "token_mask"}
    with pytest.raises(ValueError, match="frozen.t5=MODEL of a T5, or train from precomputed states"):
        fields()
    padding = DECODER | dict(text=TEXT | dict(masked=False))
    with pytest.raises(ValueError, match="reads the states of padding, too"):
        changed = config("shards", data=dict(embeddings="states")) | dict(model=padding)
        inputs.dataset_fields(changed, Plan(changed, models.build_stage(changed), None))


def test_files_of_states_that_do_not_fit_are_refused(tmp_path):
    """A record without states is a bad one; counts must be those of the states."""
    rows = [np.arange(4.0).reshape(2, 2), None, np.ones((1, 2))]
    made = text_states.packed(rows, 2)
    assert made["token_counts"].tolist() == [2, 0, 1] and made["text_states"].shape == (3, 2)
    paths = {kind: tmp_path / f"{kind}.npy" for kind in text_states.KINDS}
    for kind, path in paths.items():
        np.save(path, made[kind])
    files = text_states.StateFiles([paths["text_states"]], [paths["token_counts"]])
    assert files.rows == [3] and files.width == 2 and files.most == 2
    for row, expected in ((0, rows[0]), (2, rows[2])):
        found = text_states.padded(files.row(0, row), 3)
        np.testing.assert_array_equal(found["token_mask"], np.arange(3) < len(expected))
        values = found["text_states"].view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(values[: len(expected)], expected)
        assert not values[len(expected) :].any()
    with pytest.raises(BadRecord, match="no_text_states"):
        files.row(0, 1)
    np.save(paths["token_counts"], np.array([2, 0, 2], np.int32))
    with pytest.raises(ValueError, match="counts other tokens than the 3 of"):
        text_states.StateFiles([paths["text_states"]], [paths["token_counts"]])
    np.save(paths["token_counts"], np.ones(3))
    with pytest.raises(ValueError, match="expected int32 of 1 axes"):
        text_states.StateFiles([paths["text_states"]], [paths["token_counts"]])

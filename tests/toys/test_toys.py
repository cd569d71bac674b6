"""Stages and a system that the package does not know, through the ordinary commands on a mesh of 8 devices.

A code book is trained, saved and resumed. It is then the frozen tokenizer of a token model, whose loss calls
it. Both are converted into model directories and drawn from. Gradients are accumulated over two parts of a
batch.
"""

import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import systems
from dalle2_jax.convert import convert
from dalle2_jax.generate import __main__ as generate
from dalle2_jax.generate.pipeline import Pipeline, Running
from dalle2_jax.models import models
from dalle2_jax.models.nets.causal import causal_mask
from dalle2_jax.models.tokens.decode import Options
from dalle2_jax.runtime import checkpoint, modeldir
from dalle2_jax.train.plan import make_plan
from tests import tiny_run
from tests.data import shards_for_tests as made
from tests.toys.codebook import DECAY
from tests.toys.tokens import CODES

WORDS = ("red", "green", "blue", "yellow")
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
BATCH, NUM_CODES, TOKENIZER_STEPS, TOKEN_STEPS = 16, 8, 160, 40
TEXT = dict(vocab_size=280, context_length=6)
MESH = dict(data=2, fsdp=2, tensor=2)


def squares(words: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, 8, 8, 3] of four squares: the colours of the words [N, 3], and the first again."""
    return COLOURS[words[:, [0, 1, 2, 0]]].reshape(-1, 2, 2, 3).repeat(4, axis=1).repeat(4, axis=2)


def caption(words) -> str:
    return " ".join(WORDS[word] for word in words)


ALL = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shards of all 64 captions; the toys are registered."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "data").mkdir()
    pictures = [made.encode(Image.fromarray(picture)) for picture in squares(ALL)]
    samples = [made.sample(i, caption(words), pictures[i]) for i, words in enumerate(ALL)]
    made.write_tar(folder / "data" / "00000.tar", [member for sample in samples for member in sample])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.STAGES, "toy_codebook", "tests.toys.codebook")
        patch.setitem(models.STAGES, "toy_tokens", "tests.toys.tokens")
        patch.setitem(systems.SYSTEMS, "toy", "tests.toys.system")
        yield folder


def train(place, name: str, steps: int, **changes) -> int:
    """The status of the command that trains in the folder `name`."""
    settings = tiny_run.config(place / "data", steps, batch_size=BATCH, grad_accum=2, mesh=MESH, **changes)
    settings["optim"] |= dict(weight_decay=0.1)
    with pytest.MonkeyPatch.context() as patch:
        return tiny_run.run_main(settings, place / name, patch.setattr)


CODEBOOK = dict(stage="toy_codebook", model=dict(num_codes=NUM_CODES), checkpoint_every=TOKENIZER_STEPS // 2)


@pytest.fixture(scope="module")
def tokenizer(place):
    """The workdir of the code book."""
    assert train(place, "tokenizer", TOKENIZER_STEPS, **CODEBOOK) == 0
    return place / "tokenizer"


def of_tokens(place, **changes) -> dict:
    return dict(
        stage="toy_tokens",
        model=dict(text=TEXT, num_codes=NUM_CODES),
        tokenizer=dict(path="", **TEXT),
        frozen=dict(tokenizer=str(place / "frozen")),
        checkpoint_every=TOKEN_STEPS // 2,
        **changes,
    )


@pytest.fixture(scope="module")
def tokens(place, tokenizer):
    """The workdir of the token model, whose training was resumed once."""
    (place / "frozen").symlink_to(tokenizer)
    for steps in (TOKEN_STEPS // 2, TOKEN_STEPS):
        assert train(place, "tokens", steps, **of_tokens(place)) == 0
    return place / "tokens"


@pytest.fixture(scope="module")
def model(place, tokens, tokenizer):
    """The model directory of both."""
    sources = [f"--stage=tokens={tokens}", f"--stage=tokenizer={tokenizer}"]
    out = place / "model"
    assert convert.main(["workdirs", "--system=toy", *sources, f"--out={out}", "--dtype=float32"]) == 0
    return out


def draw(monkeypatch, model, out, *captions: str, n: int = 1) -> list[np.ndarray]:
    """The pictures that the command draws."""
    flags = dict(model=str(model), out=str(out), n=n, seed=3, batch_size=None, dtype=None, low_memory=False)
    flags |= dict(again=None, rerank_model=None)
    monkeypatch.setattr(generate, "FLAGS", types.SimpleNamespace(**flags, debug=True))
    monkeypatch.setattr(generate, "sampling_settings", dict)
    generate.main(["generate", *captions])
    report = json.loads((out / "generate.json").read_text())
    return [np.asarray(Image.open(out / picture["file"])) for picture in report["pictures"]]


# --- the code book: statistics ---


def test_a_code_book_is_trained_saved_and_resumed(place, tokenizer):
    """It is what its update makes of it: neither optimised, nor decayed, nor averaged."""
    half = TOKENIZER_STEPS // 2
    assert train(place, "parts", half, **CODEBOOK) == 0
    assert train(place, "parts", TOKENIZER_STEPS, **CODEBOOK) == 0
    state = tiny_run.stored_state(tokenizer, TOKENIZER_STEPS)
    tiny_run.assert_same(state, tiny_run.stored_state(place / "parts", TOKENIZER_STEPS))
    names = [name for name in state if "stats" in name]
    kept = {name: state[name] for name in names if name.startswith("['params']")}
    assert len(kept) == 3 and len(names) == 12  # parameters, average, two moments
    for name in names:
        if "opt_state" in name:
            np.testing.assert_array_equal(state[name], 0)
    for name, leaf in kept.items():
        np.testing.assert_array_equal(leaf, state[name.replace("['params']", "['ema_params']")])
    kernel = "['params']['fc1']['kernel']"
    assert (state[kernel] != state[kernel.replace("params", "ema_params")]).any()
    # each step adds a tenth of four patches of 16 pictures, half of them from either part
    counts, decayed = kept["['params']['stats']['counts']"].sum(), DECAY**TOKENIZER_STEPS
    np.testing.assert_allclose(counts, decayed * NUM_CODES + (1 - decayed) * 4 * BATCH, rtol=1e-4)
    codes = [
        tiny_run.stored_state(tokenizer, step)["['params']['stats']['codes']"] for step in (half, 2 * half)
    ]
    assert (codes[0] != codes[1]).any()
    used = tiny_run.logged(tokenizer, "train/used")
    assert used == tiny_run.logged(place / "parts", "train/used") and 0 < used[TOKENIZER_STEPS] <= 1
    assert tiny_run.logged(tokenizer, "train/step")[TOKENIZER_STEPS] == TOKENIZER_STEPS - 1
    assert tiny_run.logged(tokenizer, "eval/step")[TOKENIZER_STEPS] == TOKENIZER_STEPS


def test_two_actions_of_a_code_book(place, tokenizer, monkeypatch, tmp_path):
    """It draws pictures of any squares, by the command, and reconstructs pictures."""
    out = tmp_path / "model"
    assert convert.main(["workdirs", "--system=toy", f"--stage=tokenizer={tokenizer}", f"--out={out}"]) == 0
    drawn = draw(monkeypatch, out, tmp_path / "drawn", n=4)
    patches = np.stack(drawn).reshape(4, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(16, -1)
    assert len(drawn) == 4 and 2 <= len(np.unique(patches, axis=0)) <= NUM_CODES
    pipe = Pipeline.load(out)
    assert list(pipe.actions) == ["draw", "reconstruct"]
    steps = pipe.steps("reconstruct")
    made, _ = pipe.run(steps, {"encode.image": squares(ALL[:8])}, {}, Running())
    assert np.abs(made["picture.image"].astype(int) - squares(ALL[:8])).mean() < 40


# --- the token model: a frozen tokenizer ---


def test_it_learns_the_codes_of_the_frozen_tokenizer(tokens):
    losses = tiny_run.logged(tokens, "train/loss")
    assert losses[1] > 1.5 and np.mean([losses[step] for step in range(TOKEN_STEPS - 9, TOKEN_STEPS)]) < 0.2
    assert tiny_run.logged(tokens, "eval/distance").keys() == {TOKEN_STEPS // 2, TOKEN_STEPS}


def test_the_token_model_and_its_tokenizer_are_split(place, tokens):
    plan = make_plan(tiny_run.config(place / "data", 1, batch_size=BATCH, mesh=MESH, **of_tokens(place)))
    trained, frozen = plan.abstract.params, plan.abstract_frozen["tokenizer"]
    for leaf, shard in (
        (trained["net"]["transformer"]["block_0"]["mlp"]["fc1"]["kernel"], (16, 64)),
        (frozen["fc1"]["kernel"], (24, 2)),
    ):
        assert leaf.sharding.shard_shape(leaf.shape) == shard


def test_samples_of_training_are_the_pictures_of_the_codes(tokens):
    """The grid has pictures of 8 x 8, made by the frozen tokenizer from the codes."""
    grid = np.asarray(Image.open(tokens / "samples" / f"samples_{TOKEN_STEPS:08d}.png"))
    reds = (grid.astype(int) - COLOURS[0]).__abs__().max(axis=-1) < 60
    assert reds.sum() > 16


def test_it_is_resumed_with_its_own_tokenizer_alone(place, tokens, tokenizer, tmp_path, caplog):
    """At the same path lies the code book of an earlier step; by permission the run goes on with it."""
    other, link = tmp_path / "other", place / "frozen"
    shutil.copytree(tokenizer, other)
    shutil.rmtree(other / "checkpoints" / str(TOKENIZER_STEPS))
    link.unlink()
    link.symlink_to(other)
    assert train(place, "tokens", TOKEN_STEPS + 1, **of_tokens(place)) == 2
    assert f"the frozen tokenizer has changed since step {TOKEN_STEPS} of" in caplog.text
    assert "go on with this one by --allow_changed=frozen.tokenizer" in caplog.text
    link.unlink()
    link.symlink_to(tokenizer)


def test_without_its_tokenizer_it_is_refused(place, caplog):
    assert train(place, "none", 2, **of_tokens(place) | dict(frozen={})) == 2
    assert "stage 'toy_tokens' uses a tokenizer: give --config.frozen.tokenizer=PATH" in caplog.text


def test_a_caption_is_drawn_by_the_command(model, tokenizer, monkeypatch, tmp_path):
    index = modeldir.read_index(model)
    sha256 = modeldir.sha256(checkpoint.restore_ema_params(tokenizer))
    assert index["system"] == "toy" and index["stages"]["tokens"]["uses"] == {"tokenizer": "tokenizer"}
    assert index["stages"]["tokens"]["frozen"] == {"tokenizer": sha256}
    words = ALL[5:60:7]
    drawn = draw(monkeypatch, model, tmp_path / "drawn", *map(caption, words))
    assert np.abs(np.stack(drawn).astype(int) - squares(words)).mean() < 40


def test_two_actions_from_one_checkpoint(model):
    """The token model draws a caption, and the lower half of a picture of another one."""
    pipe = Pipeline.load(model)
    assert list(pipe.actions) == ["draw", "infill"]
    given = {"caption": [caption(ALL[60])], "number": [0]}
    drawn, _ = pipe.run(pipe.steps("draw"), given, {}, Running(seed=1))
    given["encode.image"] = squares(ALL[[5]])
    made, _ = pipe.run(pipe.steps("infill"), given, {}, Running(seed=1))
    codes, kept = made[f"codes.{CODES}"], made["encode.codes"]
    np.testing.assert_array_equal(codes[:, :2], kept[:, :2])
    assert (drawn[f"codes.{CODES}"][:, :2] != kept[:, :2]).any()


# --- the decode loop ---


@pytest.fixture(scope="module")
def drawing(tokens, tokenizer):
    """(stage, parameters, tokens [64, L], codes [64, 4] of the pictures of these captions)."""
    from dalle2_jax.data.tokenizer import load_tokenizer

    stage, _, params = models.load_stage(tokens, "tokens")
    frozen, _, frozen_params = models.load_stage(tokenizer, "tokenizer")
    words = load_tokenizer(tokens / "tokenizer")([caption(each) for each in ALL])[0]
    return stage, params, words, np.asarray(frozen.encode(frozen_params, squares(ALL) / 127.5 - 1))


@pytest.mark.parametrize("options", [Options(), Options(0.5, 2, 0.9), Options(guidance_scale=1.0)])
def test_what_is_drawn_are_the_codes_of_the_caption(drawing, options):
    stage, params, words, codes = drawing
    sample = jax.jit(functools.partial(stage.sample, options=options))
    drawn = np.asarray(sample(params, jax.random.split(jax.random.key(1), 64), {"tokens": words}))
    assert drawn.shape == codes.shape and drawn.min() >= 0 and drawn.max() < NUM_CODES
    assert (drawn == codes).mean() > 0.9


def test_with_the_cache_it_draws_what_it_draws_without(drawing):
    """Greedily; without a cache every code takes the whole sequence again."""
    stage, params, words, _ = drawing
    words, layout = words[::8], stage.layout
    sample = jax.jit(functools.partial(stage.sample, options=Options(top_k=1)))
    drawn = sample(params, jax.random.split(jax.random.key(1), 8), {"tokens": words})
    ids = np.pad(words, ((0, 0), (0, 4)))
    mask = causal_mask(layout.length)
    apply = jax.jit(lambda ids: stage.net.apply({"params": params["net"]}, ids, layout.rows(), mask))
    for k in range(stage.context_length, layout.length):
        logits = np.where(layout.allowed()[k], apply(ids)[:, k - 1], -np.inf)
        ids[:, k] = logits.argmax(axis=-1)
    np.testing.assert_array_equal(drawn, layout.split(ids)[CODES])


def test_codes_that_are_given_are_kept(drawing):
    stage, params, words, codes = drawing
    wrong = (codes[:8] + 1) % NUM_CODES  # not what the captions say
    infill = jax.jit(stage.infill)
    drawn = np.asarray(infill(params, jax.random.split(jax.random.key(1), 8), words[:8], wrong))
    np.testing.assert_array_equal(drawn[:, :2], wrong[:, :2])
    assert (drawn[:, 2:] != wrong[:, 2:]).any()

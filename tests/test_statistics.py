"""Statistics that a stage keeps under its parameters: an EMA code book, trained, saved and resumed by the
ordinary command on a mesh of eight devices, with gradients accumulated over two parts of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.stages import Loss
from tests import tiny_run

CODES, WIDTH, DECAY, BATCH = 12, 4, 0.9, 16


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """A vector-quantised autoencoder whose code book is a moving average (arXiv:1711.00937, appendix A.1)."""

    image_size: int = 8

    def batch_spec(self, batch_size):
        return {"image": jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.float32)}

    def init(self, key, batch):
        one, two, three = jax.random.split(key, 3)
        book = jax.random.normal(three, (CODES, WIDTH))
        return {
            "fc1": {"kernel": jax.random.normal(one, (192, WIDTH)) / 14},
            "fc2": {"kernel": jax.random.normal(two, (WIDTH, 192)) / 2},
            "stats": {"codes": book, "sums": book, "counts": jnp.ones(CODES)},
        }

    def loss(self, params, key, batch, *, step=0, train=True):
        x, codes = batch["image"].reshape(-1, 192), params["stats"]["codes"]
        z = x @ params["fc1"]["kernel"]  # [B, D]
        chosen = jax.nn.one_hot(jnp.square(z[:, None] - codes).sum(-1).argmin(-1), CODES)  # [B, K]
        nearest = chosen @ codes  # with a gradient for the code book, which training must not follow
        commit = jnp.square(z - nearest).mean()
        out = (z + jax.lax.stop_gradient(nearest - z)) @ params["fc2"]["kernel"]
        scalars = {"commit": commit, "step": jnp.float32(step)}
        return Loss(
            jnp.square(out - x).mean() + commit, scalars, {"counts": chosen.sum(0), "sums": chosen.T @ z}
        )

    def update(self, params, statistics, key):
        assert statistics["sums"].shape == (2, CODES, WIDTH)  # one for each part of the batch
        old, new = params["stats"], jax.tree.map(lambda x: x.sum(axis=0), statistics)
        counts, sums = (DECAY * old[name] + (1 - DECAY) * new[name] for name in ("counts", "sums"))
        codes = sums / counts[:, None]
        # a code that hardly any example has moves to another one
        other = codes[jax.random.randint(key, (CODES,), 0, CODES)]
        codes = jnp.where(counts[:, None] < 0.7, other, codes)
        stats = {"codes": codes, "sums": counts[:, None] * codes, "counts": counts}
        return params | {"stats": stats}, {"used": (new["counts"] > 0).mean()}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(name, steps) -> the workdir."""
    data = tmp_path / "data"
    data.mkdir()
    tiny_run.shards(data)
    monkeypatch.setattr(models, "build_stage", lambda config: CodeBook())

    def run(name, steps):
        changes = dict(batch_size=BATCH, grad_accum=2, mesh=dict(data=2, fsdp=2, tensor=2))
        settings = tiny_run.config(data, steps, **changes)
        settings["optim"] |= dict(weight_decay=0.1)
        assert tiny_run.run_main(settings, tmp_path / name, monkeypatch.setattr) == 0
        return tmp_path / name

    return run


def test_a_code_book_is_trained_saved_and_resumed(train):
    """It is what its update makes of it: neither optimised, nor decayed, nor averaged."""
    whole = train("whole", 8)
    train("parts", 3)
    resumed = train("parts", 8)
    state = tiny_run.stored_state(whole, 8)
    tiny_run.assert_same(state, tiny_run.stored_state(resumed, 8))
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
    # each step adds a tenth of 16 assignments, 8 from either part
    counts = kept["['params']['stats']['counts']"].sum()
    np.testing.assert_allclose(counts, DECAY**8 * CODES + (1 - DECAY**8) * BATCH, rtol=1e-5)
    codes = [tiny_run.stored_state(whole, step)["['params']['stats']['codes']"] for step in (1, 8)]
    assert (codes[0] != codes[1]).any()
    used = tiny_run.logged(whole, "train/used")
    assert used == tiny_run.logged(resumed, "train/used") and 0 < used[8] <= 1
    assert tiny_run.logged(whole, "train/step")[8] == 7 and tiny_run.logged(whole, "eval/step")[8] == 8

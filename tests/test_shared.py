"""Several processes draw, edit and measure as one, and the loss of one ends the others."""

import numpy as np
import pytest
import safetensors.numpy

from dalle2_jax import modeldir
from dalle2_jax.evals import inception
from tests.test_processes import run_processes
from tests.tiny_model import CAPTIONS, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """FID's network with random weights, in the layout of the converted ones."""
    draw, params = np.random.default_rng(0), {}
    for name, leaf in modeldir.flatten(inception.abstract_params()).items():
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100.0
        params[name] = (draw.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)).astype(np.float32)
    path = tmp_path_factory.mktemp("inception") / "random.safetensors"
    safetensors.numpy.save_file(params, path, metadata={"format": "np"})
    return path


def files(folder) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow
def test_two_processes_share_rows_of_all_that_is_drawn_edited_and_measured(model, inception_file, tmp_path):
    """Pictures and latents are those of one process to the bit, numbers to rounding; every process gets all,
    and ran half of the rows, also of a single caption."""
    got = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        command = ["tests.shared_run", str(model), str(inception_file), str(out)]
        run_processes(command, count, tmp_path / f"log{count}")
        for i in range(count):
            with np.load(out / f"{i}.npz") as stored:
                got[count, i] = dict(stored)
    alone, first, second = got[1, 0], got[2, 0], got[2, 1]
    rows = {name: first[name] for name in first if name.startswith("rows/")}
    for name, own in rows.items():
        np.testing.assert_array_equal(own, -(-alone[name] // 2), err_msg=name)
        assert (own < alone[name]).all() and (own == second[name]).all(), name
    assert rows["rows/one caption"].tolist() == [3, 3] and len(rows) == 11
    for name, value in alone.items():
        if name in rows:
            continue
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        if value.dtype == np.float64:
            assert np.isfinite(value).any()
            np.testing.assert_allclose(first[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(first[name], value, err_msg=name)
    assert len(np.unique(alone["one caption/images"], axis=0)) == 5
    drawn = [files(tmp_path / str(count) / "prompts") for count in (1, 2)]
    assert len(drawn[0]) == 2 + 4 * len(CAPTIONS) and drawn[0] == drawn[1]
    with np.load(tmp_path / "1/stats.npz") as one, np.load(tmp_path / "2/stats.npz") as two:
        assert set(one) == set(two) > {"mu", "sigma_s"}
        np.testing.assert_allclose(two["sigma"], one["sigma"], rtol=1e-3, atol=1e-5)

"""Several processes draw, edit and measure as one, and the loss of one ends the others."""

import signal
import time

import numpy as np
import pytest
import safetensors.numpy

from dalle2_jax.convert import inception_weights
from dalle2_jax.runtime import grid, modeldir, processes
from tests.test_processes import CAUSES, end, launch, run_processes, said, wait_until
from tests.tiny_model import CAPTIONS, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """FID's network with random weights, in the layout of the converted ones."""
    draw, params = np.random.default_rng(0), {}
    for name, leaf in modeldir.flatten(inception_weights.abstract_params()).items():
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "killed"), [("generate", 1), ("evaluate", 1), ("evaluate", 0), ("edit", 1)]
)
def test_the_loss_of_a_process_ends_drawing_with_the_cause(model, tmp_path, command, killed):
    """kill -9 of either of two, in the middle of drawing: the other says so and ends within the heartbeat."""
    of_command = {
        "generate": [CAPTIONS[0], "--n=400"],
        "evaluate": ["--scenes=quickstart", "--metrics=clip_mmd", "--n=4000"],
        "edit": ["image_to_image", str(tmp_path / "picture.png"), CAPTIONS[0], "--n=400"],
    }
    grid.save_png(tmp_path / "picture.png", np.full((32, 32, 3), 200, np.uint8), {})
    out, logs = tmp_path / "out", tmp_path / "log"
    whole = [f"dalle2_jax.{command}", *of_command[command], f"--model={model}", f"--out={out}"]
    running = launch(whole, logs, 2, 2)
    survivor = 1 - killed
    try:
        wait_until(lambda: "pictures, " in said(logs, 0), running, logs)
        running[killed].kill()
        assert running[killed].wait() == -signal.SIGKILL
        began = time.monotonic()
        assert running[survivor].wait(timeout=processes.HEARTBEAT_SECONDS + 15) != 0
        text = said(logs, survivor)
        assert any(cause in text for cause in CAUSES), text
        print(f"ended after {time.monotonic() - began:.1f} s, {running[survivor].returncode}")
        assert not (out / f"{command}.json").exists() and not (out / "report.json").exists()
    finally:
        end(running)


@pytest.mark.slow
def test_commands_of_two_processes_write_what_those_of_one_write(model, inception_file, tmp_path):
    """One of them writes and prints; whatever a command does with several, it does with two."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = [str(folder / f"{i}.png") for i in range(3)]
    for i, path in enumerate(pictures):
        y, x = np.mgrid[:40, :32] * 6
        grid.save_png(path, np.stack([y, x, np.full_like(x, 80 * i)], -1).astype(np.uint8), {})
    (tmp_path / "suite.txt").write_text("\n".join(CAPTIONS))
    edit, few = "dalle2_jax.edit", ["--steps=4", "--batch_size=2"]
    evaluate = ["dalle2_jax.evaluate", "--batch_size=2"]
    stats = ["--metrics=fid_small", f"--inception={inception_file}", f"--reference={folder}"]
    commands = {
        "invert": [edit, "invert", *pictures, *few],
        "interpolate": [edit, "interpolate", pictures[0], CAPTIONS[0], "--frames=5", *few],
        "chosen": [edit, "image_to_image", pictures[1], CAPTIONS[0], "--n=4", "--keep=2", *few],
        "upscale": [edit, "upscale", pictures[2], "--steps=2"],
        "prompts": [*evaluate, f"--prompts={tmp_path / 'suite.txt'}", "--pictures=3"],
        "stats": [*evaluate, f"--images={folder}", *stats],
    }
    for name, command in commands.items():
        made = {}
        for count in (1, 2):
            out = tmp_path / f"out{count}" / name
            out.mkdir(parents=True)
            given = [*command, f"--model={model}", f"--out={out}"]
            given += [f"--stats_out={out}/stats.npz"] if name == "stats" else []
            _, *others = run_processes(given, count, tmp_path / f"out{count}" / f"{name}_log")
            assert all(f"{out}" not in text and "pictures, " not in text for text in others), others
            made[count] = files(out)
        assert made[1].keys() == made[2].keys(), name
        for file, content in made[1].items():
            if file.endswith((".png", ".webp", ".jsonl")):
                assert made[2][file] == content, f"{name}: {file}"
    for file, one, two in each_array(tmp_path, "invert/latents.npz", "stats/stats.npz"):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5, err_msg=file)


def each_array(folder, *names: str):
    """(name of the array, of one process's command, of two's) of .npz files that both wrote."""
    for name in names:
        with np.load(folder / "out1" / name) as one, np.load(folder / "out2" / name) as two:
            assert set(one) == set(two)
            yield from ((f"{name}: {key}", one[key], two[key]) for key in one if one[key].dtype.kind == "f")

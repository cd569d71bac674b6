"""Several processes train as one; they stop together, and one that is lost ends the others."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.dalle1 import tiny as dalle1_tiny
from configs.vqvae import tiny as vqvae_tiny
from configs.vqvae import tiny_prior as vqvae_tiny_prior
from dalle2_jax.models import models
from dalle2_jax.runtime import checkpoint, partition, processes
from dalle2_jax.train import loop
from tests.shared_run import numbers
from tests.test_train import recipe
from tests.test_train_stages import recipe as stage_recipe
from tests.tiny_model import make_model
from tests.tiny_run import ROOT, free_port, logged, stored_state

# What a process says whose run has lost another: ours, or JAX's if it is first.
CAUSES = ("another process of the run was lost", "another task died")
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-009,012],other",
    "SLURM_STEP_NUM_NODES": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_an_ordinary_environment_is_one_process():
    assert processes.settings({}) is None
    assert processes.settings({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert processes.settings({"JAX_NUM_PROCESSES": "1"})["num_processes"] == 1


def test_settings_by_hand():
    found = processes.settings(BY_HAND)
    assert found == dict(coordinator_address="h:1", num_processes=4, process_id=3)


def test_an_indexed_job_gives_the_id():
    environ = {k: v for k, v in BY_HAND.items() if k != "JAX_PROCESS_ID"} | {"JOB_COMPLETION_INDEX": "1"}
    assert processes.settings(environ)["process_id"] == 1


def found_by_jax(environ: dict[str, str], monkeypatch) -> tuple:
    """What JAX makes of `processes.settings`: coordinator, number of processes, number of this, devices."""
    from jax._src.clusters import ClusterEnv

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    names = "coordinator_address", "num_processes", "process_id", "local_device_ids"
    given = processes.settings(environ)
    unset = [given.get(name) for name in (*names, "cluster_detection_method")]
    return ClusterEnv.auto_detect_unset_distributed_params(*unset, initialization_timeout=1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[007-009,012],other", "node007"),
        ("node[3,5]", "node3"),
        ("gpu-a.local,gpu-b", "gpu-a.local"),
        ("one", "one"),
    ],
)
def test_slurm(nodes, host, monkeypatch):
    """One process a node has all of its devices."""
    assert found_by_jax(SLURM | {"SLURM_STEP_NODELIST": nodes}, monkeypatch) == (f"{host}:61441", 5, 2, [])


def test_slurm_with_several_tasks_a_node_has_a_device_a_task(monkeypatch):
    several = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
    assert found_by_jax(several, monkeypatch) == ("node007:61441", 5, 2, [2])


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not set"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "h"}, "host:port"),
        (BY_HAND | {"JAX_PROCESS_ID": "4"}, "ids are 0"),
    ],
)
def test_an_incomplete_description_is_refused(environ, said):
    with pytest.raises(ValueError, match=said):
        processes.settings(environ)


class _Placed:
    """A sharding of batches that gives the devices of each process these rows."""

    def __init__(self, *rows_of_processes):
        self.rows = rows_of_processes

    def devices_indices_map(self, shape):
        device = collections.namedtuple("Device", ["process_index", "number"])
        return {
            device(process, i): (slice(row, row + 1),)
            for process, rows in enumerate(self.rows)
            for i, row in enumerate(rows)
        }


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (([0, 1, 2, 3], [4, 5, 6, 7]), (0, 1, 2, 3)),
        (([4, 5, 6, 7], [0, 1, 2, 3]), (4, 5, 6, 7)),
        (([6, 6, 7, 7], [0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]), (6, 7)),  # pairs share the axis tensor
        (([3, 3], [3, 3], [0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]), (3,)),  # and so do processes
        (([4, 0], [1, 5], [2, 6], [3, 7]), (0, 4)),  # hosts of TPUs have squares of the torus
    ],
)
def test_the_parts_of_a_batch_follow_from_the_mesh(rows, parts, monkeypatch):
    monkeypatch.setattr(partition, "batch_sharding", lambda mesh: _Placed(*rows))
    assert partition.host_slice(partition.make_mesh()) == dict(parts=parts, num_parts=8)


@pytest.mark.parametrize("rows", [([0, 1], [1, 2]), ([0, 1, 2], [3])])
def test_a_mesh_whose_processes_share_some_examples_is_refused(monkeypatch, rows):
    monkeypatch.setattr(partition, "batch_sharding", lambda mesh: _Placed(*rows))
    with pytest.raises(ValueError, match="all need as many, the same ones or others"):
        partition.host_slice(partition.make_mesh())


def test_a_batch_of_processes_whose_devices_alternate_is_whole(tmp_path):
    """What each process has of it lies where `host_slice` says (tests/scattered.py)."""
    texts = run_processes(["tests.scattered"], 2, tmp_path / "log")
    assert "parts (0, 2): the batch is whole" in texts[0] and "parts (1, 3): the batch is whole" in texts[1]


def test_damage_that_one_process_sees_sends_both_to_the_checkpoint_before(workdir):
    """The second's part of the newest is cut (tests/one_sided_damage.py); the first reads its own whole."""
    texts = run_processes(["tests.one_sided_damage", str(workdir)], 2, workdir, devices=1)
    assert all("restored step 1" in text for text in texts), texts
    assert "checkpoints/2 is damaged: another process found it" in texts[0], texts[0]
    assert "checkpoints/2 cannot be read, it is incomplete or damaged" in texts[1], texts[1]
    assert [path.name.split("_")[0] for path in (workdir / "damaged").iterdir()] == ["2"]


def test_record_numbers_beyond_32_bits_are_gathered_whole():
    index = np.arange(8) + 2**40
    np.testing.assert_array_equal(partition.gather_index(index, partition.make_mesh()), index)


def launch(command: list[str], logs, count: int, devices: int) -> list[subprocess.Popen]:
    """`count` processes of so many devices each that run `python -m COMMAND`; process i writes LOGS.i.log."""
    port, started = free_port(), []
    for i in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
        }
        with open(logs.parent / f"{logs.name}.{i}.log", "w") as log:
            whole = [sys.executable, "-m", *command]
            started.append(
                subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def run_processes(command: list[str], count: int, logs, devices: int = 2, seconds: float = 400) -> list[str]:
    """`launch` and wait; what each of them said. All must end with status 0."""
    running = launch(command, logs, count, devices)
    try:
        codes = [process.wait(timeout=seconds) for process in running]
        texts = [said(logs, i) for i in range(count)]
        assert codes == [0] * count, "".join(texts)
        return texts
    finally:
        end(running)


def end(running) -> None:
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def train_command(config: dict, workdir, name: str = "upsampler256", **settings) -> list[str]:
    """`dalle2_jax.train` with the `debug` preset of a recipe, and what a config has that is not of it."""
    names = ("num_steps", "checkpoint_every", "eval_every", "sample_every", "keep_checkpoints")
    settings = {name: config[name] for name in names} | settings
    command = ["dalle2_jax.train", f"--config=configs/{name}.py:debug", f"--workdir={workdir}"]
    return command + [f"--config.{name}={value}" for name, value in settings.items()]


def start_processes(workdir, count: int, devices: int) -> list[subprocess.Popen]:
    """A run without end of `count` processes of so many devices each, with a checkpoint every second step."""
    config = recipe(100_000, checkpoint_every=2, keep_checkpoints=0)
    return launch(train_command(config, workdir), workdir, count, devices)


def said(workdir, i: int) -> str:
    return (workdir.parent / f"{workdir.name}.{i}.log").read_text()


def wait_until(condition, running, workdir, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said(workdir, 0)
        assert all(p.poll() is None for p in running), said(workdir, 0) + said(workdir, 1)
        time.sleep(0.1)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.mark.slow
def test_two_processes_train_stop_and_fail_as_one(workdir, tmp_path):
    """Two processes: their steps are those of one process with as many devices; SIGTERM to one stops both
    after a commit, with status 0; they go on from there; kill -9 of one ends the other with the cause."""
    running = []

    def logged_steps():
        return max(logged(workdir, "train/loss"), default=0) if (workdir / "metrics.jsonl").exists() else 0

    try:
        running = start_processes(workdir, 2, jax.device_count() // 2)
        wait_until(lambda: logged_steps() >= 2, running, workdir)
        running[1].send_signal(signal.SIGTERM)
        assert [p.wait(timeout=60) for p in running] == [0, 0], said(workdir, 0) + said(workdir, 1)
        stopped = checkpoint.Checkpointer(workdir, 3).latest_step()
        assert stopped == logged_steps() < 100_000
        for i in range(2):
            assert f"process {i} of 2" in said(workdir, i)
            assert f"stopped at step {stopped}" in said(workdir, i)
        lines = (workdir / "metrics.jsonl").read_text().count("train/loss")
        assert lines == stopped  # one writer

        loop.train(recipe(2), str(tmp_path / "one"))
        one, two = stored_state(tmp_path / "one", 2), stored_state(workdir, 2)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)

        running = start_processes(workdir, 2, jax.device_count() // 2)
        wait_until(lambda: logged_steps() >= stopped + 2, running, workdir)
        assert re.search(rf"steps {stopped} -> ", said(workdir, 0))
        running[1].kill()
        assert running[1].wait() == -signal.SIGKILL
        assert running[0].wait(timeout=processes.HEARTBEAT_SECONDS + 15) not in (0, None)
        assert "another process of the run was lost" in said(workdir, 0), said(workdir, 0)
    finally:
        end(running)


def test_a_save_that_fails_because_another_process_has_gone_is_told_as_that(monkeypatch):
    statuses = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", statuses.append)
    for cause in (jax.errors.JaxRuntimeError("UNKNOWN: Connection closed by peer"), ValueError("disk full")):
        error = checkpoint.SaveFailed("a checkpoint could not be written")
        error.__cause__ = cause
        processes.end_together(error, 1)
    assert statuses == [processes.LOST, 1]


def test_shares_are_taken_apart_again(monkeypatch):
    """Whatever does not divide: as many rows on every process, and all of them once."""
    for count, processes_ in ((7, 3), (8, 4), (2, 4), (1, 2)):
        shares = []
        for index in range(processes_):
            monkeypatch.setattr(jax, "process_count", lambda n=processes_: n)
            monkeypatch.setattr(jax, "process_index", lambda n=index: n)
            shares.append(processes.share(count))
        assert len({len(part) for part in shares}) == 1
        np.testing.assert_array_equal(np.concatenate(shares)[:count], np.arange(count))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3,), np.float64), ((3, 2, 2, 3), np.uint8), ((3, 0), np.float32), ((3, 4), np.int64)],
)
def test_rows_come_together_as_they_were(monkeypatch, shape, dtype):
    """Bit for bit, whatever their type, also rows that hold nothing; what was repeated is cut off."""
    from jax.experimental import multihost_utils

    first = np.arange(np.prod(shape)).reshape(shape).astype(dtype) + dtype(2) ** 7
    second = first + dtype(1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = np.ascontiguousarray(second).reshape(3, -1).view(np.uint8) if second.size else None
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x, tiled: np.concatenate([x, others]))
    monkeypatch.setattr(processes, "sync", lambda name: None)
    found = processes.gather(first, 5)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.concatenate([first, second])[:5])


def test_nested_work_is_split_over_processes_once(monkeypatch):
    """Within the function a process counts as the only one, so that what it calls is whole; a single row is
    made by every process, and nothing is gathered for it."""
    gathered = []

    def made_by_both(rows, count):
        gathered.append(rows.tolist())
        return np.arange(10, 10 + count)

    def function(rows):
        assert processes.share(7).tolist() == list(range(7))
        processes.sync("waits for nobody")
        inner = processes.split_over_processes(lambda some: some + 10, 7)
        return {"of rows": inner[rows]}

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "gather", made_by_both)
    assert processes.split_over_processes(function, 5)["of rows"].tolist() == [10, 11, 12, 13, 14]
    assert gathered == [[13, 14, 14]]
    assert processes.split_over_processes(function, 1)["of rows"].tolist() == [10] and len(gathered) == 1
    with pytest.raises(KeyError):
        processes.split_over_processes(lambda rows: {}["nothing"], 2)
    assert len(processes.share(7)) == 4  # also after an error this process is one of two


def test_what_fails_ends_one_process_with_a_line_and_several_at_once(monkeypatch, capsys):
    def fail(error, **settings):
        with processes.fail_together(**settings):
            raise error

    with pytest.raises(SystemExit) as ended:
        fail(ValueError("no such colour"))
    assert ended.value.code == 2 and ended.value.__cause__ is None
    assert capsys.readouterr().err == "error: no such colour\n"
    told = []
    with pytest.raises(SystemExit) as ended:
        fail(KeyError("k"), refused=(KeyError,), status=5, say=told.append, debug=True)
    assert ended.value.code == 5 and isinstance(ended.value.__cause__, KeyError) and told == ["'k'"]
    with pytest.raises(TypeError):
        fail(TypeError("a mistake of ours"))

    class Exited(BaseException):
        pass

    def leave(status):
        raise Exited(status)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: barrier failed")
    for error, status in ((ValueError("x"), 2), (TypeError("x"), 1), (lost, processes.LOST)):
        with pytest.raises(Exited, match=str(status)):
            fail(error)
    assert "TypeError: x" in capsys.readouterr().err
    waited = []
    monkeypatch.setattr(processes, "sync", waited.append)
    with processes.fail_together():
        assert not waited
    assert waited == ["done"]


def assert_alike(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def leave_out_key_biases(*states: dict) -> None:
    """Softmax does not see a bias of all keys: its gradient is rounding, some 1e-11, of which Adam makes
    steps as long as any. Such parameters become zero in all states, after a look at their gradients."""
    for name in [name for name in states[0] if "['mu']" in name and name.endswith("['kv']['bias']")]:
        leaf = name.partition("['mu']")[2]
        keys = np.s_[: states[0][name].shape[-1] // 2]
        for state in states:
            assert np.abs(state[name][keys]).max() < 1e-9 < np.abs(state[name]).max()
            for tree in ("['params']", "['ema_params']"):
                state[tree + leaf] = np.array(state[tree + leaf])
                state[tree + leaf][keys] = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (4, 2, dict(data=4, fsdp=2, tensor=1)),
        (4, 2, dict(data=1, fsdp=8, tensor=1)),  # parameters split over all processes
        (4, 1, dict(data=2, fsdp=1, tensor=2)),  # layers split over two, which read the same examples
        (2, 4, dict(data=1, fsdp=1, tensor=8)),  # and over all of them
    ],
)
def test_meshes_over_processes_train_as_one_device(workdir, tmp_path, count, devices, mesh):
    settings = {f"mesh.{axis}": size for axis, size in mesh.items()}
    run_processes(train_command(recipe(2), workdir, **settings), count, workdir, devices)
    loop.train(recipe(2), str(tmp_path / "alone"))
    assert_alike(stored_state(workdir, 2), stored_state(tmp_path / "alone", 2), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior", "ar_prior", "decoder64"])
def test_a_frozen_clip_and_measured_statistics_are_those_of_one_process(workdir, tmp_path, name):
    """What CLIP fills in, what `fit` finds in the data and what `measure` finds in the network."""
    clip = str(make_model(tmp_path / "model"))
    config = recipe(2)
    run_processes(train_command(config, workdir, name, clip=clip), 2, workdir, 4)
    plain = stage_recipe(name, clip=clip)
    kept = ("num_steps", "checkpoint_every", "eval_every", "sample_every", "keep_checkpoints")
    loop.train(plain | {key: config[key] for key in kept}, str(tmp_path / "alone"))
    found, expected = stored_state(workdir, 2), stored_state(tmp_path / "alone", 2)
    leave_out_key_biases(found, expected)
    assert_alike(found, expected, 1e-4)
    if name != "decoder64":
        assert any("stats" in key for key in found)


@pytest.mark.slow
def test_codes_of_two_processes_are_those_of_one(tmp_path):
    """The code book's sums, its restarted codes, a token model and a PixelSNAIL of the codes."""
    # Muon is off: it makes rounding of small gradients as large as any step.
    kept = {
        "num_steps": 3,
        "checkpoint_every": 3,
        "log_every": 1,
        "data.path": "debug_64",
        "optim.muon_learning_rate": 0.0,
        "optim.warmup_steps": 0,
    }
    tokenizer = {"model.net.channels": 16, "model.quantizer.num_codes": 16}
    tokenizer |= {"model.quantizer.decay": 0.5, "model.quantizer.restart": 2.0}
    codes = {"model.num_codes": (16,), "model.net.width": 32, "frozen.tokenizer": str(tmp_path / "vqvae")}
    snail = {"model.num_codes": (16,), "frozen.tokenizer": str(tmp_path / "vqvae")}
    for name, module, changes in (
        ("vqvae", vqvae_tiny, kept | tokenizer),
        ("dalle1", dalle1_tiny, kept | codes),
        ("prior", vqvae_tiny_prior, kept | snail),
    ):
        flags = [f"--config.{key}={value}" for key, value in changes.items()]
        path = module.__name__.replace(".", "/") + ".py"
        command = ["dalle2_jax.train", f"--config={path}", f"--workdir={tmp_path}/{name}2"]
        run_processes(command + flags, 2, tmp_path / f"{name}2", 4)
        config = module.get_config()
        config.update_from_flattened_dict(changes)
        loop.train(models.to_plain(config), str(tmp_path / name))
        found, expected = stored_state(tmp_path / f"{name}2", 3), stored_state(tmp_path / name, 3)
        leave_out_key_biases(found, expected)
        assert_alike(found, expected, 1e-4)
    assert max(logged(tmp_path / "vqvae2", "train/restarts").values()) > 0


@pytest.mark.slow
def test_two_processes_then_one_then_two_are_one_run(workdir, tmp_path):
    """Every resumption goes on with the next batch: losses and parameters are those of one process."""
    for steps, count in ((2, 2), (4, 1), (6, 2)):
        if count == 1:
            loop.train(recipe(steps), str(workdir))
        else:
            run_processes(train_command(recipe(steps), workdir), count, workdir, 4)
    loop.train(recipe(6), str(tmp_path / "alone"))
    losses = [logged(folder, "train/loss") for folder in (workdir, tmp_path / "alone")]
    assert list(losses[0]) == [1, 2, 3, 4, 5, 6] and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_alike(stored_state(workdir, 6), stored_state(tmp_path / "alone", 6), 1e-4)


@pytest.mark.slow
def test_the_loss_of_the_coordinator_ends_the_others_with_the_cause(workdir):
    running = []

    def logged_steps():
        return max(logged(workdir, "train/loss"), default=0) if (workdir / "metrics.jsonl").exists() else 0

    try:
        running = start_processes(workdir, 4, 1)
        wait_until(lambda: logged_steps() >= 2, running, workdir)
        running[0].kill()
        began = time.monotonic()
        codes = [process.wait(timeout=processes.HEARTBEAT_SECONDS + 15) for process in running]
        assert codes[0] == -signal.SIGKILL and 0 not in codes
        assert time.monotonic() - began < processes.HEARTBEAT_SECONDS + 15
        for i in (1, 2, 3):
            assert any(cause in said(workdir, i) for cause in CAUSES), said(workdir, i)
    finally:
        end(running)


@pytest.mark.slow
def test_processes_draw_and_measure_as_one(tmp_path):
    """Three processes: the pictures of one to the bit, its numbers, one that writes; then they go on.

    Micro-batches of two, so that those of a share are no smaller than those of one process.
    """
    model = make_model(tmp_path / "model")
    captions = ["a red star", "a blue ring", "a yellow circle", "a green cross"]
    draw = ["dalle2_jax.generate", f"--model={model}", *captions, "--n=2", "--seed=3", "--batch_size=2"]
    measure = ["dalle2_jax.evaluate", f"--model={model}", "--scenes=quickstart", "--n=14"]
    measure += ["--metrics=scenes,clip_frechet,clip_mmd,clip_precision_recall,clip_score,retrieval,loss"]
    measure += ["--batch_size=4"]
    for count in (1, 3):
        out = tmp_path / str(count)
        out.mkdir()
        for name, command in (("drawn", draw), ("measured", measure)):
            texts = run_processes([*command, f"--out={out / name}"], count, out / f"{name}_log")
            assert all("wrote" not in text and "pictures of" not in text for text in texts[1:]), texts
    one, three = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "drawn").glob("*.png")} for name in "13"
    )
    assert len(one) == 9 and one == three
    one, three = (json.loads((tmp_path / name / "measured" / "report.json").read_text()) for name in "13")
    for report in (one, three):
        del report["seconds"]
    np.testing.assert_allclose(*(numbers(report) for report in (one, three)), rtol=1e-5, atol=1e-6)

    from_reference = [
        "dalle2_jax.evaluate",
        f"--model={model}",
        "--scenes=quickstart",
        "--metrics=clip_mmd",
        "--n=9",
    ]
    from_reference.append(f"--out={tmp_path / 'resumed'}")
    run_processes(from_reference, 3, tmp_path / "first")
    pictures = sorted((tmp_path / "resumed" / "pictures").glob("*.png"))
    assert len(pictures) == 9
    before = [path.read_bytes() for path in pictures]
    pictures[4].unlink()
    run_processes(from_reference, 3, tmp_path / "second")
    assert [path.read_bytes() for path in pictures] == before

"""A run that is told to stop before its first step. Between steps: test_train.py, test_faults.py."""

import os
import shutil
import signal
import time

import pytest

from dalle2_jax.train import inputs, loop, stopping
from dalle2_jax.train.plan import Plan
from tests import tiny_run
from tests.tiny_run import assert_same, config, status, steps_of, stored_state

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of four steps, one checkpoint each."""
    return tiny_run.whole_run(data, 4, tmp_path_factory.mktemp("whole") / "run")


def test_signals_are_told_where_a_run_may_stop_and_handlers_come_back():
    before = [signal.getsignal(number) for number in stopping.Interrupted.SIGNALS]
    with stopping.Stopping() as stops:
        stops.check("quiet")
        assert stops.latest() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stops.latest():
            assert time.monotonic() < deadline
        assert stops.latest() == signal.SIGTERM
        with pytest.raises(stopping.Stopped, match="SIGTERM"):
            stops.check("told")
    assert [signal.getsignal(number) for number in stopping.Interrupted.SIGNALS] == before


@pytest.mark.parametrize(
    ("where", "number"),
    [(where, signal.SIGTERM) for where in ("make_datasets", "make_plan", "jit_step", "the compiler")]
    + [("the compiler", signal.SIGINT)],
)
def test_a_run_that_is_told_before_its_first_step_stops_without_it(
    data, whole, tmp_path, monkeypatch, caplog, where, number
):
    """What was saved before stands, and the same command goes on."""
    workdir, struck = tmp_path / "run", []

    def strike(function):
        def striking(*args, **options):
            struck.append(where)
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the watching thread has heard
            return function(*args, **options)

        return striking

    class Striking:
        def __init__(self, jitted):
            self.lower = strike(jitted.lower)

    jit_step = Plan.jit_step
    places = {"make_datasets": inputs, "make_plan": loop, "jit_step": Plan}
    for begun in (False, True):
        if begun:
            shutil.copytree(whole, workdir)
            for step in (3, 4):
                shutil.rmtree(workdir / "checkpoints" / str(step))
        struck.clear()
        with monkeypatch.context() as patched:
            if where == "the compiler":
                patched.setattr(Plan, "jit_step", lambda plan: Striking(jit_step(plan)))
            else:
                patched.setattr(places[where], where, strike(getattr(places[where], where)))
            assert status(config(data, 4), workdir, patched) == (0 if number == signal.SIGTERM else 130)
        assert struck == [where]
        assert "stopped before the first step; run the same command to go on" in caplog.messages
        assert steps_of(workdir) == ([1, 2] if begun else []) and not (workdir / "lock").exists()
        assert status(config(data, 4), workdir, monkeypatch) == 0
        assert_same(stored_state(whole, 4), stored_state(workdir, 4))
        shutil.rmtree(workdir)


def wait_for_lock(workdir, processes) -> None:
    deadline = time.monotonic() + 120
    while not (workdir / "lock").exists():
        said = open(f"{workdir}.log").read()
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, said
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_to_a_process_that_has_just_begun_ends_it_with_status_0(data, tmp_path, count):
    """Of two, it goes to the second: both end."""
    workdir = tmp_path / "run"
    started = tiny_run.start_together(count, workdir, data, num_steps=10**6)
    try:
        wait_for_lock(workdir, started)
        started[-1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    said = open(f"{workdir}.log").read()
    assert codes == [0] * count, said
    assert said.count("SIGTERM: stopping once nothing is lost by it") == 1
    assert said.count("stopped before the first step") == count
    assert steps_of(workdir) == [] and not (workdir / "lock").exists()

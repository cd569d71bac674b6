"""A workdir has one writer."""

import json
import subprocess
import sys
import time

import pytest

from dalle2_jax.train import lock

BEAT, SILENCE = 0.05, 1.0


def held_by(workdir, **changes) -> None:
    found = json.loads((workdir / "lock").read_text())
    (workdir / "lock").write_text(json.dumps(found | changes))


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    code = (
        "import sys, time; from dalle2_jax.train import lock; "
        f"lock.Lock({str(tmp_path)!r}, {BEAT}, {SILENCE}); print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"written by process {first.pid} on .*another --workdir"):
            lock.Lock(tmp_path, BEAT, SILENCE)
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / "lock").exists()  # it could not clean up
    began = time.monotonic()
    lock.Lock(tmp_path, BEAT, silence=30).release()
    assert time.monotonic() - began < 5 and not (tmp_path / "lock").exists()


def test_a_silent_lock_of_another_machine_is_taken_over(tmp_path):
    lock.Lock(tmp_path, BEAT, SILENCE)._released.set()
    held_by(tmp_path, machine="elsewhere", host="elsewhere")
    began = time.monotonic()
    second = lock.Lock(tmp_path, BEAT, SILENCE)
    assert time.monotonic() - began >= SILENCE
    second.release()


def test_an_owner_that_was_taken_for_dead_may_not_write(tmp_path):
    first = lock.Lock(tmp_path, beat=30, silence=SILENCE)
    first.check()
    held_by(tmp_path, host="elsewhere", pid=7, began=0)
    with pytest.raises(ValueError, match="taken over by process 7 on elsewhere"):
        first.check()
    first.release()
    assert (tmp_path / "lock").exists()  # it is the other's


def test_a_torn_lock_is_no_lock(tmp_path):
    (tmp_path / "lock").write_text('{"host": ')
    lock.Lock(tmp_path, BEAT, SILENCE).release()


STARTER = """
import json, sys, time
from dalle2_jax.train import lock
write = json.dumps
json.dumps = lambda *args: (time.sleep(0.1), write(*args))[1]  # of the lock: all look before the first writes
print("ready", flush=True)
sys.stdin.readline()
try:
    held = lock.Lock(sys.argv[1], 0.05, float(sys.argv[2]))
    print("won", flush=True)
    sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.fixture
def starters(tmp_path):
    """Four processes that will take the lock of a folder at a word, (workdir, silence) -> what each said.

    They live on, so that none that has won looks dead to the others."""
    running = []

    def start(workdir, silence):
        mine = [
            subprocess.Popen(
                [sys.executable, "-c", STARTER, str(workdir), str(silence)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            for _ in range(4)
        ]
        running.extend(mine)
        assert [process.stdout.readline() for process in mine] == ["ready\n"] * 4
        for process in mine:
            process.stdin.write("go\n")
        return [process.stdout.readline().strip() for process in mine]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("left", ["nothing", "a dead process's", "a torn one", "a silent machine's"])
def test_of_runs_that_start_together_one_wins(left, tmp_path, starters):
    if left != "nothing":
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        lock.Lock(tmp_path, BEAT, SILENCE)._released.set()
        held_by(tmp_path, pid=gone.pid, **({"machine": "elsewhere"} if "silent" in left else {}))
        if "torn" in left:
            (tmp_path / "lock").write_bytes(b'{"host": \r\n\xff')
    said = starters(tmp_path, silence=SILENCE)
    assert sorted(text == "won" for text in said) == [False] * 3 + [True], said
    assert sum("is being written by process" in text for text in said) == 3, said


def test_a_dead_lock_that_another_has_just_taken_over_is_not_taken_again(tmp_path, monkeypatch):
    """Both have found the first one's owner dead; the second to replace it looks again and is refused."""
    lock.Lock(tmp_path, BEAT, SILENCE)._released.set()
    held_by(tmp_path, machine="elsewhere")
    judge, overtaken = lock.Lock._dead, []

    def slowly(self, silence):
        found = judge(self, silence)
        if not overtaken:
            overtaken.append(None)
            overtaken[:] = [lock.Lock(tmp_path, BEAT, SILENCE)]
            overtaken[0]._owner |= dict(pid=1, host="faster", machine="another")  # as another process
            overtaken[0]._write()
        return found

    monkeypatch.setattr(lock.Lock, "_dead", slowly)
    with pytest.raises(ValueError, match="being written by process 1 on faster"):
        lock.Lock(tmp_path, BEAT, SILENCE)
    overtaken[0].check()
    overtaken[0].release()


def test_without_hard_links_one_wins_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(lock.os, "link", refuse)
    first = lock.Lock(tmp_path, BEAT, SILENCE)
    first._owner |= dict(machine="another")
    first._write()
    with pytest.raises(ValueError, match="being written by process"):
        lock.Lock(tmp_path, BEAT, SILENCE)
    first.release()
    assert not list(tmp_path.iterdir())

"""A workdir has one writer."""

import json
import subprocess
import sys
import time

import pytest

from dalle2_jax import lock

BEAT, SILENCE = 0.05, 1.0


def held_by(workdir, **changes) -> None:
    found = json.loads((workdir / "lock").read_text())
    (workdir / "lock").write_text(json.dumps(found | changes))


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    code = (
        "import sys, time; from dalle2_jax import lock; "
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

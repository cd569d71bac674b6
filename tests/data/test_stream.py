"""Batches that are read ahead by tf.data and by our own threads: the same; and the threads end."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dalle2_jax.data import stream
from dalle2_jax.data.order import Order

ORDER = dict(num_records=100, seed=0, batch_size=4, parts=(0,), num_parts=1, shuffle=True)
READING = dict(start_step=0, repeat=True, chunk=2, num_workers=2)


def stream_of(load, signature, **settings):
    """The batches of `load`; settings are of the order or of the reading."""
    order = Order(**{name: settings.pop(name, value) for name, value in (ORDER | dict(group=1)).items()})
    return stream.batches(load, signature, order, **(READING | settings))


@pytest.fixture(params=["tensorflow", "threads"])
def reader(request, monkeypatch):
    """Each way of reading ahead; tf.data's where TensorFlow is installed."""
    if request.param == "tensorflow":
        pytest.importorskip("tensorflow", reason="reads with tf.data")
    else:
        monkeypatch.setitem(sys.modules, "tensorflow", None)
    return request.param


def load(index, epoch):
    """Fields of every type that a data set has, after a while that differs."""
    time.sleep(float(index[0] % 3) / 1000)
    return {
        "index": index,
        "picture": (index[:, None, None] + np.arange(6).reshape(2, 3)).astype(np.uint8),
        "low_res": np.sqrt(index[:, None] + epoch[:, None], dtype=np.float32),
        "mask": np.stack([index % 2 == 0, epoch > 0], 1),
        "unasked": epoch,
    }


SIGNATURE = {
    "mask": (np.bool_, (2,)),
    "index": (np.int64, ()),
    "picture": (np.uint8, (2, 3)),
    "low_res": (np.float32, (1,)),
}


def assert_same(one, other):
    """Two lists of batches are equal to the bit, in the order of their fields, too."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype
            np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(chunk=3, batch_size=7),
        dict(chunk=32, num_workers=5),
        dict(batch_size=12, parts=(1, 4), num_parts=6, chunk=3, start_step=7),
        dict(group=3, num_records=23, batch_size=10, chunk=4),
        dict(group=200, num_records=23),
        dict(num_records=1, batch_size=5),
        dict(num_records=2, batch_size=5, seed=2**40 + 1),
        dict(shuffle=False, batch_size=30, chunk=8),
        dict(num_records=70_000, batch_size=5000, chunk=999, seed=-3),
        dict(repeat=False, batch_size=30, chunk=8),
        dict(repeat=False, batch_size=25, chunk=25),
        dict(repeat=False, batch_size=36, parts=(1, 4), num_parts=6, chunk=5),
        dict(repeat=False, batch_size=36, parts=(5,), num_parts=6, chunk=5),
        dict(repeat=False, batch_size=30, start_step=3, group=3),
        dict(repeat=False, batch_size=30, start_step=9),
        dict(repeat=False, batch_size=1000, parts=(1,), num_parts=2),
    ],
)
def test_threads_give_the_batches_of_tensorflow(settings, monkeypatch):
    pytest.importorskip("tensorflow", reason="compares with tf.data")
    runs = []
    for blocked in (False, True):
        if blocked:
            monkeypatch.setitem(sys.modules, "tensorflow", None)
        batches = stream_of(load, SIGNATURE, **settings)
        runs.append(list(itertools.islice(batches, 12)))
        batches.close()
    assert_same(*runs)
    expected = 12 if settings.get("repeat", True) else None
    assert expected in (None, len(runs[0]))


def test_without_tensorflow_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    lines = []
    monkeypatch.setattr(
        stream.logging, "log_first_n", lambda level, line, n, *args: lines.append((line % args, n))
    )
    stream_of(load, SIGNATURE).close()
    assert len(lines) == 1 and lines[0][1] == 1
    assert "TensorFlow cannot be imported" in lines[0][0] and "threads read the data" in lines[0][0]


def test_an_exception_reaches_the_consumer_and_ends_the_stream(reader):
    def broken(index, epoch):
        if 50 in index:
            raise ZeroDivisionError("in a reading thread")
        return load(index, epoch)

    batches = stream_of(broken, SIGNATURE)
    with pytest.raises(ZeroDivisionError, match="in a reading thread"):
        for _ in range(100):
            next(batches)
    assert list(batches) == []


def test_it_reads_ahead_but_not_without_end(reader):
    calls = []

    def counting(index, epoch):
        calls.append(len(index))
        return load(index, epoch)

    batches = stream_of(counting, SIGNATURE)
    next(batches)
    deadline = time.monotonic() + 20
    while sum(calls) < 3 * 4 and time.monotonic() < deadline:  # two batches lie ready
        time.sleep(0.01)
    time.sleep(0.1)
    assert 3 * 4 <= sum(calls) <= 6 * 4
    batches.close()


def test_closing_or_dropping_a_stream_ends_its_threads(reader):
    running = threading.Event()

    def slow(index, epoch):
        running.set()
        time.sleep(0.02)
        return {"x": index}

    for drop in (False, True):
        before = set(threading.enumerate())
        batches = stream_of(slow, {"x": (np.int64, ())})
        next(batches)
        own = [thread for thread in threading.enumerate() if thread not in before]
        if drop:
            del batches
            gc.collect()
        else:
            batches.close()
            assert list(batches) == []
        if reader == "threads":
            assert len(own) == 2
            for thread in own:
                thread.join(20)
                assert not thread.is_alive()
        time.sleep(0.1)
        running.clear()
        time.sleep(0.2)
        assert not running.is_set()


def test_closing_frees_who_waits(monkeypatch):
    """Another thread that closes the stream ends it for the one that waits for a batch."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    go, outcome = threading.Event(), []

    def stuck(index, epoch):
        go.wait(20)
        return {"x": index}

    batches = stream_of(stuck, {"x": (np.int64, ())}, batch_size=64)
    waiting = threading.Thread(target=lambda: outcome.append(next(batches, "ended")), daemon=True)
    waiting.start()
    time.sleep(0.1)
    batches.close()
    go.set()
    waiting.join(20)
    assert outcome == ["ended"]


# What follows the last batch that a program takes: nothing, an exception, a thread that waits for a batch.
ENDS = ("", "raise SystemExit(0)", "threading.Thread(target=next, args=(large, None), daemon=True).start()")


@pytest.mark.parametrize(("blocked", "end"), [(False, ENDS[0]), *((True, end) for end in ENDS)])
def test_a_program_ends_while_threads_read(blocked, end):
    """At its end Python keeps its lock from the reading threads: an open stream must not wait for them.

    Reading imports no Keras: TensorFlow would, in a third of its time.
    """
    program = (
        "import sys, threading, time\n"
        f"sys.modules.update({dict(tensorflow=None) if blocked else {}})\n"
        "import numpy as np\n"
        "from dalle2_jax.data import stream\n"
        "from dalle2_jax.data.order import Order\n"
        "def load(index, epoch):\n"
        "    time.sleep(0.05)\n"
        "    return {'x': index}\n"
        f"order, reading = {ORDER!r}, {READING!r}\n"
        "large = Order(**order | dict(batch_size=400))\n"
        "large = stream.batches(load, {'x': (np.int64, ())}, large, **reading)\n"
        "batches = stream.batches(load, {'x': (np.int64, ())}, Order(**order), **reading)\n"
        f"print(len(next(batches)['x']), 'keras' in sys.modules)\n{end}\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(stream.__file__)))
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0 and run.stdout == "4 False\n", run.stderr


def test_orders_are_random_and_independent_between_epochs_and_seeds():
    """Neighbours, epochs and seeds are uncorrelated: for random orders sqrt(n) r is normal(0, 1).

    TensorFlow's index shuffle with plain numbers as its keys fails this by tens of standard deviations.
    """
    n, epochs = 20_000, 8

    def orders(seed):
        settings = dict(num_records=n, seed=seed, batch_size=n, chunk=n, num_workers=1)
        batches = stream_of(lambda index, epoch: {"index": index}, {"index": (np.int64, ())}, **settings)
        return np.stack([batch["index"] for batch in itertools.islice(batches, epochs)])

    made_orders = [orders(seed) for seed in (0, 1, 2**32)]
    scaled = (np.concatenate(made_orders) - (n - 1) / 2) / (n**2 / 12) ** 0.5
    between = scaled @ scaled.T / n**0.5
    assert abs(between[np.triu_indices(len(scaled), 1)]).max() < 5
    neighbours = (scaled[:, 1:] * scaled[:, :-1]).sum(1) / n**0.5
    places = scaled @ np.linspace(-(3**0.5), 3**0.5, n) / n**0.5
    assert abs(neighbours).max() < 5 and abs(places).max() < 5

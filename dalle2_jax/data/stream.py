"""Batches in the order of `order`, read ahead by the threads of tf.data, or of Python without TensorFlow.

Both give the same batches, to the bit. tf.data is used nowhere else.
"""

import atexit
import collections
import contextlib
import itertools
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
from absl import logging

from dalle2_jax.data.order import Order

_BATCHES_AHEAD = 2  # that lie ready while the consumer works
_FOREVER = 2**62  # elements of a stream that repeats
_SECONDS_TO_JOIN = 10.0  # at the end of the program, for a thread to finish its call of `load`

_open: weakref.WeakSet = weakref.WeakSet()
_threads: weakref.WeakSet = weakref.WeakSet()

Batch = dict[str, np.ndarray]


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Keeps `import tensorflow` from importing Keras, pandas and SciPy, a third of its time.

    Keras can be imported afterwards, also by tf.keras.
    """
    modules: dict[str, Any] = sys.modules
    unloaded = not {"keras", "tensorflow"} & modules.keys()
    if unloaded:
        modules["keras"] = None  # Python refuses to import a module whose entry is None
    try:
        yield
    finally:
        if unloaded:
            modules.pop("keras", None)


def _tensorflow():
    """TensorFlow without accelerators, which JAX uses; None if it cannot be imported."""
    try:
        with _without_keras():
            import tensorflow as tf
    except Exception as error:  # not installed, or incompatible with another package: protobuf, numpy
        logging.log_first_n(
            logging.INFO, "TensorFlow cannot be imported (%s): Python's threads read the data", 1, error
        )
        return None
    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
    except (RuntimeError, ValueError) as error:  # it is already running
        logging.log_first_n(logging.WARNING, "TensorFlow keeps its devices: %s", 1, error)
    return tf


@atexit.register
def _close_all():
    """Stop the reading threads while they can still take Python's lock; later they would block."""
    for stream in list(_open):
        stream.close()
    for thread in list(_threads):
        thread.join(_SECONDS_TO_JOIN)


class Stream(Iterator):
    """An iterator over batches; its reading threads end with `close`, its deletion, or the program."""

    def __init__(self, batches: Iterator[Batch], end: Callable[[], None] = lambda: None):
        """end: stops the reading. Neither it nor `batches` references this stream, so that it can be
        freed."""
        self._batches: Iterator[Batch] | None = batches
        self._end = weakref.finalize(self, end)
        _open.add(self)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            return next(self._batches)
        except Exception:  # also StopIteration
            self.close()
            raise

    def close(self) -> None:
        """Stop reading; the next `next` raises StopIteration."""
        self._batches = None
        self._end()


def batches(
    load: Callable[[np.ndarray, np.ndarray], Batch],
    signature: dict[str, tuple],
    order: Order,
    *,
    start_step: int,
    repeat: bool,
    chunk: int,
    num_workers: int,
) -> Stream:
    """Stream the batches of `load` in this order, read by `num_workers` threads.

    Args:
        load: (record numbers int64 [n], epochs int64 [n]) -> stacked fields; called from several threads.
        signature: {field: (dtype, shape of one record)} of `load`.
        order: the order of records, and the batch size.
        start_step, repeat: see `pipeline.Dataset.batches`.
        chunk: the largest number of records a call of `load`.
    """
    first = start_step * order.local
    stop = _FOREVER if repeat else order.elements_of_a_pass()

    def read(begin: int, end: int) -> Batch:
        """The elements begin ... end - 1 of this host."""
        return load(*order.locate(np.arange(begin, end)))

    tf = _tensorflow()
    if tf is None:
        return _by_threads(read, signature, first, stop, order.local, chunk, num_workers)
    return _by_tensorflow(tf, read, signature, first, stop, order.local, chunk, num_workers)


def _by_tensorflow(tf, read, signature, first, stop, local, chunk, num_workers) -> Stream:
    """The elements first ... stop - 1 in batches of `local`, read by tf.data."""
    chunk = min(local, chunk)
    failures: list[Exception] = []

    def read_chunk(chunk_number):
        begin = first + int(chunk_number) * chunk
        try:
            made = read(begin, min(begin + chunk, stop))
            return [made[name] for name in signature]
        except Exception as error:  # raised by `raising`: here TensorFlow would wrap and print it
            failures.append(error)
            return [np.zeros((0, *shape), dtype) for dtype, shape in signature.values()]

    @tf.autograph.experimental.do_not_convert
    def chunk_of(chunk_number):
        dtypes = [dtype for dtype, _ in signature.values()]
        arrays = tf.numpy_function(read_chunk, [chunk_number], dtypes, stateful=False)
        return {
            name: tf.ensure_shape(array, (None, *shape))
            for array, (name, (_, shape)) in zip(arrays, signature.items(), strict=True)
        }

    num_chunks = max(0, -(-(stop - first) // chunk))
    dataset = tf.data.Dataset.range(num_chunks).map(
        chunk_of, num_parallel_calls=num_workers, deterministic=True
    )
    if chunk != local or stop != _FOREVER:
        dataset = dataset.rebatch(local, drop_remainder=False)
    options = tf.data.Options()
    options.autotune.enabled = False  # the cores are training's
    options.threading.private_threadpool_size = num_workers + 1
    options.threading.max_intra_op_parallelism = 1

    def raising(iterator):
        for batch in iterator:
            if failures:
                break
            yield batch
        if failures:
            raise failures[0]

    return Stream(raising(dataset.prefetch(_BATCHES_AHEAD).with_options(options).as_numpy_iterator()))


def _by_threads(read, signature, first, stop, local, chunk, num_workers) -> Stream:
    """The elements first ... stop - 1 in batches of `local`, read by Python's threads."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    ended = threading.Event()
    ahead = _BATCHES_AHEAD + -(-num_workers // -(-local // chunk))  # so that each thread has a chunk, too

    def submit(begin, end):
        future = Future()
        jobs.put((future, begin, end))
        return future

    def in_order():
        starts, waiting = iter(range(first, stop, local)), collections.deque()
        while True:
            for start in itertools.islice(starts, ahead - len(waiting)):
                end = min(start + local, stop)
                waiting.append([submit(begin, min(begin + chunk, end)) for begin in range(start, end, chunk)])
            if not waiting:
                return
            try:
                made = [future.result() for future in waiting.popleft()]
            except CancelledError:  # the stream was closed meanwhile
                return
            yield {name: np.concatenate([part[name] for part in made]) for name in signature}

    def end():
        ended.set()
        for _ in range(num_workers):
            jobs.put(None)

    # A daemon: Python would wait for another thread before it calls `_close_all`.
    for _ in range(num_workers):
        thread = threading.Thread(target=_work, args=(jobs, read, ended), daemon=True, name="reader")
        _threads.add(thread)
        thread.start()
    return Stream(in_order(), end)


def _work(jobs: queue.SimpleQueue, read: Callable[[int, int], Batch], ended: threading.Event) -> None:
    """Runs jobs in a reading thread until None. It references no stream, so that this can be freed."""
    while (job := jobs.get()) is not None:
        future, begin, end = job
        if ended.is_set():
            future.cancel()
            continue
        try:
            future.set_result(read(begin, end))
        except BaseException as error:  # `in_order` raises it
            future.set_exception(error)
        del job, future  # frees the batch before the wait

"""The order of examples, and the tf.data stream that follows it.

The record at position p (p = step * batch_size + slot, counted over all epochs) of N records is

    epoch = p // N,    record = permutation_{seed, epoch}(p mod N),

with TensorFlow's stateless index shuffle. With `group` g > 1 it is groups of g successive records that are
permuted, so that these meet in one batch; the N mod g records after the last whole group are left out.
There is no shuffle buffer to save, any step can be the first, and a host that reads slots [i b, (i + 1) b) of
each batch sees its slice of the same global batch, whatever the number of hosts.
"""

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

_open: weakref.WeakSet = weakref.WeakSet()


def _tensorflow():
    """TensorFlow, kept off the accelerators: they belong to JAX."""
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
    except (RuntimeError, ValueError) as error:  # it runs already: somebody else's choice stands
        logging.log_first_n(logging.WARNING, "TensorFlow keeps its devices: %s", 1, error)
    return tf


@atexit.register
def _close_all():
    """Stop the reading threads while they can still take Python's lock; later they would wait for ever."""
    for stream in list(_open):
        stream.close()


class Stream(Iterator):
    """An iterator over batches; its reading threads end with `close`, its deletion, or the program."""

    def __init__(self, dataset, failures: list[Exception]):
        """failures: where the reading threads put an exception, which `next` raises and the stream ends."""
        self._iterator = dataset.as_numpy_iterator()
        self._failures = failures
        _open.add(self)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator, None)
        if self._failures or batch is None:
            self.close()
            if self._failures:
                raise self._failures[0]
            raise StopIteration
        return batch

    def close(self) -> None:
        """Stop reading; the next `next` raises StopIteration."""
        self._iterator = None


def local_elements(num_records: int, batch_size: int, parts: Sequence[int], num_parts: int) -> int:
    """How many records of one pass a host reads: full batches' parts, and what its parts have of the last."""
    size, full, rest = batch_size // num_parts, num_records // batch_size, num_records % batch_size
    return sum(full * size + min(max(rest - part * size, 0), size) for part in parts)


def _shuffle(tf, index, epoch, seed: int, n: int):
    """permutation_{seed, epoch}(index) of 0 ... n - 1, for int64 vectors `index` and `epoch`.

    The op is a block cipher whose key should be random bits and whose default of 4 rounds is few: with
    plain numbers as keys, as tf.random.experimental.index_shuffle passes them, the orders of successive
    epochs are strongly correlated. So the keys are mixed (splitmix64) and the rounds are 24.
    """
    gamma, low = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFFFFFFFF)
    shift, xor = tf.bitwise.right_shift, tf.bitwise.bitwise_xor

    def mix(x):
        for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = xor(x, shift(x, tf.constant(bits, tf.uint64))) * np.uint64(factor)
        return xor(x, shift(x, tf.constant(31, tf.uint64)))

    seed_key = mix(tf.constant(seed % 2**64, tf.uint64) + gamma)
    key = mix(xor(seed_key, tf.cast(epoch + 1, tf.uint64) * gamma))
    words = [key & low, shift(key, tf.constant(32, tf.uint64)), mix(key + gamma) & low]
    words = tf.cast(tf.stack(words, axis=1), tf.uint32)
    last = tf.fill(tf.shape(index), tf.constant(n - 1, tf.int64))
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=words, max_index=last, rounds=24)


def batches(
    load: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    signature: dict[str, tuple],
    *,
    num_records: int,
    seed: int,
    batch_size: int,
    start_step: int,
    parts: Sequence[int],
    num_parts: int,
    repeat: bool,
    shuffle: bool,
    chunk: int,
    num_workers: int,
    group: int = 1,
) -> Stream:
    """Stream the batches of `load` in the order of this module, read by `num_workers` threads.

    Args:
        load: (record numbers int64 [n], epochs int64 [n]) -> the fields, stacked; called from several
        threads. signature: {field: (dtype, shape of one record)} of what it returns. batch_size, start_step,
        parts, num_parts, repeat, shuffle: see `pipeline.Dataset.batches`. chunk: at most so many records a
        call of `load`. group: see above.
    """
    tf = _tensorflow()
    group = min(group, num_records)
    size, n = batch_size // num_parts, num_records // group * group
    local = size * len(parts)
    chunk = min(local, chunk)
    # Local element e is slot e % local of this host's parts, one after the other, of step e // local.
    first = start_step * local
    stop = None if repeat else local_elements(n, batch_size, parts, num_parts)
    failures: list[Exception] = []

    def call_load(indices, epochs):
        try:
            made = load(indices, epochs)
            return [made[name] for name in signature]
        except Exception as error:  # handed over by Stream: raised here, TensorFlow would wrap and print it
            failures.append(error)
            return [np.zeros((0, *shape), dtype) for dtype, shape in signature.values()]

    def locate(chunk_number):
        element = first + chunk_number * chunk + tf.range(chunk, dtype=tf.int64)
        if stop is not None:
            element = element[: tf.maximum(stop - first - chunk_number * chunk, 0)]
        part = tf.gather(tf.constant(parts, tf.int64), element % local // size)
        position = element // local * batch_size + part * size + element % size
        epoch, index = position // n, position % n
        if shuffle and n > group:
            index = _shuffle(tf, index // group, epoch, seed, n // group) * group + index % group
        return index, epoch

    @tf.autograph.experimental.do_not_convert
    def read(chunk_number):
        dtypes = [dtype for dtype, _ in signature.values()]
        arrays = tf.numpy_function(call_load, locate(chunk_number), dtypes, stateful=False)
        return {
            name: tf.ensure_shape(array, (None, *shape))
            for array, (name, (_, shape)) in zip(arrays, signature.items(), strict=True)
        }

    num_chunks = 2**62 if stop is None else max(0, -(-(stop - first) // chunk))
    dataset = tf.data.Dataset.range(num_chunks).map(read, num_parallel_calls=num_workers, deterministic=True)
    if chunk != local or stop is not None:
        dataset = dataset.rebatch(local, drop_remainder=False)
    options = tf.data.Options()
    options.autotune.enabled = False  # the cores are training's
    options.threading.private_threadpool_size = num_workers + 1
    options.threading.max_intra_op_parallelism = 1
    return Stream(dataset.prefetch(2).with_options(options), failures)

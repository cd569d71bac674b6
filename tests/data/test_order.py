"""The order of examples is TensorFlow's index shuffle for every index, also where there is no TensorFlow."""

import hashlib

import numpy as np
import pytest

from dalle2_jax.data import order

KEY = (0x12345678, 0x9ABCDEF0, 0x0F1E2D3C)
# tf.raw_ops.RandomIndexShuffle (TensorFlow 2.21) with KEY and 24 rounds: where 0, 1, n // 2, n - 2, n - 1 go
KNOWN = {
    1: [0],
    2: [1, 0],
    3: [1, 2, 0],
    5: [1, 2, 3, 4, 0],
    16: [13, 2, 3, 0, 14],
    17: [13, 2, 3, 14, 9],
    1000: [137, 793, 918, 61, 225],
    65535: [38834, 44758, 35608, 6630, 28163],
    65536: [38834, 44758, 19702, 28163, 10903],
    65537: [38834, 44758, 19702, 10903, 38834],
    65538: [38234, 32193, 18914, 17218, 63220],
    100000: [38234, 77926, 91770, 81036, 51895],
    131072: [38234, 77926, 69118, 8533, 4044],
    262144: [142854, 77926, 36165, 152916, 13393],
    262145: [142854, 77926, 36165, 13393, 142854],
    1048575: [205366, 23254, 107578, 739147, 535762],
    3000000: [162513, 483181, 1474338, 2794765, 2659608],
    2147483648: [1343855680, 630722164, 2107243186, 2032935277, 1084049247],
    4294967297: [1343855680, 2760821251, 1163789075, 4105699053, 1343855680],
    1099511627775: [24128983858, 257131928056, 704128335920, 793037181534, 870948043763],
    1099511627776: [24128983858, 257131928056, 757712531045, 870948043763, 708770959351],
    1099511627777: [24128983858, 257131928056, 757712531045, 708770959351, 24128983858],
}
SHA256_OF_1000 = "ab5b1497c68d32992852ad27f7c83fedc199f383b5d372bd465674dda5ba4e64"
# The batch of step 3, ten records, of (seed, number of records), as it came with TensorFlow's op.
BATCHES = {
    (0, 10): [4, 8, 7, 9, 1, 0, 3, 2, 5, 6],
    (1, 10): [1, 3, 4, 2, 0, 9, 7, 5, 6, 8],
    (2**40 + 1, 10): [8, 4, 5, 2, 1, 6, 9, 3, 7, 0],
    (-1, 10): [8, 1, 7, 2, 0, 6, 5, 3, 9, 4],
    (7, 100_000): [84643, 95594, 10418, 66533, 13676, 70315, 4359, 69610, 30208, 99479],
}


def places(n: int) -> np.ndarray:
    """The indices that KNOWN tells of."""
    return np.array([0, 1, n // 2, n - 2, n - 1] if n > 4 else range(n))


@pytest.mark.parametrize("n", KNOWN)
def test_indices_go_where_tensorflow_sends_them(n):
    assert order.index_shuffle(places(n), KEY, n).tolist() == KNOWN[n]


def test_every_index_of_a_permutation():
    permuted = order.index_shuffle(np.arange(1000), KEY, 1000)
    assert hashlib.sha256(permuted.astype("<i8").tobytes()).hexdigest() == SHA256_OF_1000
    for n in (1, 2, 3, 7, 255, 65536, 65538, 70_000):
        for key in (KEY, (0, 0, 0), (2**32 - 1,) * 3):
            permuted = order.index_shuffle(np.arange(n), key, n)
            assert permuted.dtype == np.int64 and np.array_equal(np.sort(permuted), np.arange(n))
    backwards = order.index_shuffle(
        np.arange(70_000)[::-1], KEY, 70_000
    )  # an index goes there in any company
    assert np.array_equal(backwards[::-1], order.index_shuffle(np.arange(70_000), KEY, 70_000))


@pytest.mark.parametrize(("seed", "n"), BATCHES)
def test_batches_are_those_of_older_runs(seed, n):
    epochs = order.Order(n, seed, 10, (0,), 1, shuffle=True)
    assert epochs.locate(np.arange(30, 40))[0].tolist() == BATCHES[seed, n]


def test_tensorflow_permutes_the_same():
    tf = pytest.importorskip("tensorflow", reason="compares with TensorFlow")

    def theirs(index, key, n):
        """Of TensorFlow's op, one key for all indices."""
        words = tf.tile(tf.constant(np.array([key], np.uint32)), [len(index), 1])
        last = tf.fill([len(index)], tf.constant(n - 1, tf.int64))
        return tf.raw_ops.RandomIndexShuffle(index=index, seed=words, max_index=last, rounds=24).numpy()

    rng = np.random.default_rng(0)
    powers = {2**bits + off for bits in range(6, 41) for off in (-1, 0, 1)}
    for n in sorted({1, 2, 3, 4, 5, 17, *powers, *(10**digits for digits in range(3, 13))}):
        key = tuple(rng.integers(0, 2**32, 3).tolist())  # TensorFlow takes long for a small n
        index = np.arange(n) if n < 6 else np.unique([0, 1, n - 2, n - 1, *rng.integers(0, n, 8)])
        assert np.array_equal(theirs(index, key, n), order.index_shuffle(index, key, n)), (n, key)
    assert all(theirs(places(n), KEY, n).tolist() == known for n, known in KNOWN.items())

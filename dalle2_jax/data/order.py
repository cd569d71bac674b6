"""The order of examples: the record at each place of each batch.

The record at position p (p = step * batch_size + slot, counted over all epochs) of N records is

    epoch = p // N,    record = permutation_{seed, epoch}(p mod N),

with TensorFlow's stateless index shuffle, `tf.raw_ops.RandomIndexShuffle`, computed in numpy. With `group`
g > 1 groups of g successive records are permuted, so that these meet in one batch; the last N mod g records
are left out. There is no shuffle buffer to save, any step can be the first, and a host that reads slots [i b,
(i + 1) b) of each batch has its slice of the same global batch for any number of hosts.

With several sources (`mixture`) each position, or group of positions, has a source, so that each source has
its share of any stretch of positions to within one. The position within the source, which counts its own
positions, gives the record as above; so each source has epochs of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.splitmix import GAMMA, MASK, mix

ROUNDS = 24
_SCHEDULE_BITS = 0x7369F885192C0EF5  # one bit a round, from Simon's key schedule
# Many indices are permuted at once, since numpy takes as long for a few; the last results are cached.
_BLOCK, _TABLES = 4096, 64


def shuffle_key(seed: int, epoch: int) -> tuple[int, int, int]:
    """The three words of 32 bits that key the order of an epoch.

    The shuffle is a block cipher, which needs random bits as a key. With plain numbers and 4 rounds, the
    default of tf.random.experimental.index_shuffle, the orders of successive epochs are strongly correlated.
    So the keys are mixed (splitmix64) and the rounds are 24.
    """
    key = mix(mix((seed + GAMMA) & MASK) ^ ((epoch + 1) * GAMMA & MASK))
    last = mix((key + GAMMA) & MASK)
    return key & 0xFFFFFFFF, key >> 32, last & 0xFFFFFFFF


def _word_bits(n: int) -> int:
    """Half the bits of a block for the numbers 0 ... n - 1, n above 2^16 (below, a block has 16 bits).

    As in TensorFlow the logarithm is that of n - 1, though a block of 2k bits has no room for 2^(2k). So if n
    - 1 is a power of four above 2^15, one record comes twice in an epoch and another is missing.
    """
    bits = math.ceil(math.log2(n - 1))
    return (bits + bits % 2) // 2


def _round_keys(key: tuple[int, int, int], word_bits: int) -> tuple[int, ...]:
    """A word of `word_bits` bits for each round: the key schedule of the block cipher Simon."""
    mask = (1 << word_bits) - 1
    constant, bits = 0xFFFFFFFC & mask, _SCHEDULE_BITS & mask
    words = [word & mask for word in key]
    for i in range(3, ROUNDS):
        turned = [(words[-1] >> r | words[-1] << word_bits - r) & mask for r in (3, 4)]
        words.append(constant ^ bits & 1 ^ words[i - 3] ^ turned[0] ^ turned[1])
        bits >>= 1
    return tuple(words)


def _encrypt(x: np.ndarray, round_keys: tuple[int, ...], word_bits: int) -> np.ndarray:
    """The block cipher Simon, on blocks of two words, in any unsigned type with room for a block."""
    w, mask = word_bits, (1 << word_bits) - 1

    def turned(word):
        twice = word << w | word  # shifted right by w - r and cut, it is the word rotated left by r
        return ((twice >> w - 1) & (twice >> w - 8) ^ (twice >> w - 2)) & mask

    left, right = (x >> w) & mask, x & mask
    for first, second in zip(round_keys[::2], round_keys[1::2], strict=True):
        left = left ^ turned(right) ^ first
        right = right ^ turned(left) ^ second
    return left << w | right


@functools.lru_cache(_TABLES)
def _table(key: tuple[int, int, int], n: int) -> np.ndarray:
    """uint16 [n]: the permutation, for n up to 2^16.

    A block has 2^16 numbers. Numbers above n - 1 are permuted until they are below n. For small n that takes
    many steps, so each iteration doubles the number of steps in `follows`.
    """
    follows = _encrypt(np.arange(1 << 16, dtype=np.uint16), _round_keys(key, 8), 8)
    while (follows[:n] >= n).any():
        outside = np.flatnonzero(follows >= n)
        follows[outside] = follows[follows[outside]]
    return follows[:n].copy()


@functools.lru_cache(_TABLES)
def _block(key: tuple[int, int, int], n: int, number: int) -> np.ndarray:
    """int64 [_BLOCK]: the permutation of the indices from number * _BLOCK on, for n above 2^16."""
    word_bits = _word_bits(n)
    round_keys = _round_keys(key, word_bits)
    index = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, n), dtype=np.uint64)
    found = _encrypt(index, round_keys, word_bits)
    while (outside := np.flatnonzero(found >= n)).size:  # a block has at most 4 n numbers
        found[outside] = _encrypt(found[outside], round_keys, word_bits)
    return found.astype(np.int64)


def index_shuffle(index: np.ndarray, key: tuple[int, int, int], n: int) -> np.ndarray:
    """tf.raw_ops.RandomIndexShuffle(index, key, max_index=n - 1, rounds=24).

    index: int64 [k], each in 0 ... n - 1. key: three words of 32 bits. Returns int64 [k], the permuted
    indices.
    """
    if n == 1:
        return np.zeros_like(index)
    if n <= 1 << 16:
        return _table(key, n)[index].astype(np.int64)
    found = np.empty_like(index)
    numbers = index // _BLOCK
    for number in np.unique(numbers).tolist():
        here = numbers == number
        found[here] = _block(key, n, number)[index[here] - number * _BLOCK]
    return found


_WEIGHT_BITS = 20  # of a share; positions have 63 bits in all


def _share(mixture: Sequence[tuple[int, float]], number: int) -> int:
    """The weight of source `number` among it and the sources after it, in units of 2^-_WEIGHT_BITS."""
    rest = sum(weight for _, weight in mixture[number:])
    return min(max(round(mixture[number][1] / rest * 2**_WEIGHT_BITS), 1), 2**_WEIGHT_BITS)


def assign(position: np.ndarray, mixture: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(source number, position within it), int64 [k] both, of positions int64 [k] of a mixture.

    Of the first p positions source 0 has floor(p w), for its share w; position p is its own if that number
    grows there. The other positions are those of the next sources, by the same rule. Whole numbers: every
    machine computes the same.
    """
    source = np.full_like(position, len(mixture) - 1)
    within, waiting = position.copy(), np.arange(len(position))
    for number in range(len(mixture) - 1):
        share, at = _share(mixture, number), within[waiting]
        before, after = at * share >> _WEIGHT_BITS, (at + 1) * share >> _WEIGHT_BITS
        mine = after > before
        source[waiting[mine]] = number
        within[waiting] = np.where(mine, before, at - before)
        waiting = waiting[~mine]
    return source, within


@dataclasses.dataclass(frozen=True)
class Order:
    """The records of a host, which reads `parts` of the `num_parts` equal parts of each batch.

    Its element e is slot e mod `local` of its concatenated parts of step e // `local`. num_records, seed,
    group: see the module. shuffle: False: the order of the records. mixture: (number of records, weight) of
    each source, in the order of the records; (): one source.
    """

    num_records: int
    seed: int
    batch_size: int
    parts: Sequence[int]
    num_parts: int
    shuffle: bool
    group: int = 1
    mixture: tuple[tuple[int, float], ...] = ()

    @property
    def size(self) -> int:
        """The number of records of a part."""
        return self.batch_size // self.num_parts

    @property
    def local(self) -> int:
        """The number of records of a batch that this host reads."""
        return self.size * len(self.parts)

    @property
    def _group(self) -> int:
        return min(self.group, self.num_records, *(count for count, _ in self.mixture))

    @property
    def epoch_records(self) -> int:
        """The number of records of an epoch, in whole groups."""
        return self.num_records // self._group * self._group

    def elements_of_a_pass(self) -> int:
        """The number of this host's records of one pass: its parts of full batches and of the last one."""
        full, rest = divmod(self.epoch_records, self.batch_size)
        return sum(full * self.size + min(max(rest - p * self.size, 0), self.size) for p in self.parts)

    def locate(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(record numbers, epochs), int64 [k] both, of this host's elements int64 [k]."""
        step, slot = np.divmod(elements, self.local)
        part = np.asarray(self.parts, np.int64)[slot // self.size]
        position = step * self.batch_size + part * self.size + slot % self.size
        if not self.shuffle or len(self.mixture) < 2:
            return self._of_source(position, self.num_records, self.seed)
        found, epoch = np.empty_like(position), np.empty_like(position)
        source, within = assign(position // self._group, self.mixture)
        first = 0
        for number, (count, _) in enumerate(self.mixture):
            mine = source == number
            own = within[mine] * self._group + position[mine] % self._group
            found[mine], epoch[mine] = self._of_source(own, count, self.seed + number)
            found[mine] += first
            first += count
        return found, epoch

    def _of_source(self, position: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(record numbers, epochs) of the positions within a source of `count` records."""
        num_groups = count // self._group
        epoch, index = np.divmod(position, num_groups * self._group)
        if self.shuffle and num_groups > 1:
            permuted = index // self._group
            for one in np.unique(epoch):
                of_epoch = epoch == one
                key = shuffle_key(seed, int(one))
                permuted[of_epoch] = index_shuffle(permuted[of_epoch], key, num_groups)
            index = permuted * self._group + index % self._group
        return index, epoch

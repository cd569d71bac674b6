"""splitmix64 (Steele, Lea and Flood 2014): random bits as a pure function of integers."""

GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1  # a counter's step: 2^64 over the golden ratio, odd


def mix(x):
    """A bijection on 64 bits; every bit depends on all bits of `x`, an int or an array of uint64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31

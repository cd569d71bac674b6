"""Corruptions of the low-resolution picture in upsampler training; pictures are float32 [h, w, 3] in [0, 1].

The blur of the 64 -> 256 upsampler (the paper, Section 2.1 and Appendix C) is a Gaussian of 3 x 3
taps: g(k) = exp(-k^2 / (2 sigma^2)) / sum, k in {-1, 0, 1}; sigma 0.6 gives (0.1664, 0.6672, 0.1664).
"""

import math

import numpy as np


def gaussian_taps(sigma: float) -> tuple[float, float, float]:
    """The three taps of a Gaussian of width `sigma` pixels, summing to 1."""
    side = math.exp(-0.5 / sigma**2)
    return side / (1 + 2 * side), 1 / (1 + 2 * side), side / (1 + 2 * side)


def gaussian_blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Blur float32 [h, w, 3] with 3 x 3 Gaussian taps; the border is mirrored without repeating its pixel."""
    side, centre, _ = gaussian_taps(sigma)
    for axis in (0, 1):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(picture, pad, mode="reflect" if picture.shape[axis] > 1 else "edge")
        n = picture.shape[axis]
        before, after = (padded.take(range(start, start + n), axis) for start in (0, 2))
        picture = (centre * picture + side * (before + after)).astype(np.float32)
    return picture

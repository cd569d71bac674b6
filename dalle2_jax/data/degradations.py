"""Corruptions of the low-resolution picture in upsampler training; pictures are float32 [h, w, 3] in [0, 1].

The blur of the 64 -> 256 upsampler (the paper, Section 2.1 and Appendix C) is a Gaussian of 3 x 3 taps:
g(k) = exp(-k^2 / (2 sigma^2)) / sum, k in {-1, 0, 1}; sigma 0.6 gives (0.1664, 0.6672, 0.1664).

The 256 -> 1024 upsampler reads the BSR degradation (Zhang et al. 2021, in the variant of latent diffusion):
the large picture is blurred, reduced, made noisy and JPEG-compressed in random order, with random strengths.
With f the factor by which it shrinks,

    a quarter of the pictures is halved first, and f with it;
    then, shuffled, but reductions in this order:
      blur, twice     kernel of side 2 U{2..11} + 3; half of them anisotropic Gaussians with variances up to
                      4 + f, half isotropic with sigma up to 2 + 0.2 f
      reduce          by 1 .. 2 f (three quarters), or a Gaussian of sigma 0.1 .. 0.6 f and every f-th pixel
      reduce to size  to 1/f exactly
      noise           of U{2..25}/255: coloured, grey, or correlated between the channels
      JPEG            of quality U{30..95}, nine times in ten
    and JPEG of quality U{30..95} at the end.

The light variant has one blur of a quarter of the size, noise U{1..2}/255 and JPEG 80 .. 95.
"""

import io
import math

import numpy as np
from PIL import Image

BSR = ("full", "light")
_RESIZES = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)


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


def bsr(picture: np.ndarray, factor: int, rng: np.random.Generator, variant: str = "full") -> np.ndarray:
    """The degraded picture, float32 [h / factor, w / factor, 3] in [0, 1].

    picture: float32 [h, w, 3] in [0, 1], with sides that `factor` divides. variant: 'full' or 'light'.
    """
    height, width = picture.shape[:2]
    if height % factor or width % factor:
        raise ValueError(f"factor {factor} does not divide a picture of {height} x {width}")
    light, target = variant == "light", (height // factor, width // factor)
    least_quality = 80 if light else 30
    if factor == 4 and rng.random() < 0.25:
        picture, factor = resized(picture, (height // 2, width // 2), _random_resize(rng)), 2
    steps = ["blur", "reduce", "size", "noise", "jpeg"] + ([] if light else ["blur"])
    steps = [steps[i] for i in rng.permutation(len(steps))]
    first, second = sorted((steps.index("reduce"), steps.index("size")))
    steps[first], steps[second] = "reduce", "size"
    for step in steps:
        if step == "blur":
            picture = convolved(picture, _random_kernel(rng, factor, 0.25 if light else 1.0))
        elif step == "reduce" and rng.random() < 0.75:
            scale = rng.uniform(1, 2 * factor)
            size = tuple(max(1, round(side / scale)) for side in picture.shape[:2])
            picture = resized(picture, size, _random_resize(rng))
        elif step == "reduce":
            kernel = gaussian_kernel(25, (rng.uniform(0.1, 0.6 * factor) ** 2,) * 2, shift=(factor - 1) / 2)
            picture = convolved(picture, kernel)[::factor, ::factor]
        elif step == "size":
            picture = resized(picture, target, _random_resize(rng))
        elif step == "noise":
            picture = _noisy(picture, rng, *((1, 2) if light else (2, 25)))
        elif rng.random() < 0.9:
            picture = jpeg(picture, int(rng.integers(least_quality, 96)))
        picture = picture.clip(0, 1)
    return jpeg(picture, int(rng.integers(least_quality, 96)))


def resized(picture: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """float32 [h, w, 3] resized to `size` (height, width), without rounding to 8 bits."""
    channels = [Image.fromarray(picture[..., c]).resize(size[::-1], method) for c in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def gaussian_kernel(
    size: int, variances: tuple[float, float], angle: float = 0.0, shift: float = 0.0
) -> np.ndarray:
    """A Gaussian [size, size] that sums to 1, with these variances along axes turned by `angle`.

    Its centre is `shift` pixels below and right of the middle.
    """
    y, x = np.mgrid[:size, :size] - (size - 1) / 2 - shift
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    a, b = (max(variance, 1e-2) for variance in variances)
    kernel = np.exp(-0.5 * (along**2 / a + across**2 / b))
    return kernel / kernel.sum()


def convolved(picture: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The picture convolved with a kernel of odd side, float32; the border is mirrored."""
    from scipy import signal

    half = len(kernel) // 2
    padded = np.pad(picture, [(half, half), (half, half), (0, 0)], mode="reflect")
    flipped = kernel[::-1, ::-1, None].astype(np.float32)
    return signal.oaconvolve(padded, flipped, mode="valid", axes=(0, 1)).astype(np.float32)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """float32 [h, w, 3] after JPEG compression."""
    file = io.BytesIO()
    Image.fromarray(np.rint(picture.clip(0, 1) * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def _random_resize(rng: np.random.Generator) -> Image.Resampling:
    return _RESIZES[rng.integers(len(_RESIZES))]


def _random_kernel(rng: np.random.Generator, factor: int, strength: float) -> np.ndarray:
    size = 2 * int(rng.integers(2, 12)) + 3
    if rng.random() < 0.5:
        variances = tuple(strength * (4 + factor) * rng.random(2))
        return gaussian_kernel(size, variances, angle=math.pi * rng.random())
    return gaussian_kernel(size, ((strength * (2 + 0.2 * factor) * rng.random()) ** 2,) * 2)


def _noisy(picture: np.ndarray, rng: np.random.Generator, least: int, most: int) -> np.ndarray:
    level = rng.integers(least, most + 1) / 255
    kind = rng.random()
    if kind < 0.4:
        noise = rng.normal(size=picture.shape)
    elif kind < 0.8:
        noise = rng.normal(size=(*picture.shape[:2], 1))
    else:  # variances below 1 along random axes of colour space
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        noise = rng.normal(size=picture.shape) * np.sqrt(rng.random(3)) @ axes
    return (picture + level * noise).astype(np.float32)

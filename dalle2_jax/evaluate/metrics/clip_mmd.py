"""CMMD's formula on CLIP embeddings: MMD^2 with a Gaussian kernel, times 1000 (arXiv:2401.09603).

`clip_mmd` is biased, as CMMD is. `clip_mmd_unbiased` has the expectation 0 for equal distributions, so that
few pictures suffice, and may be negative.
"""

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry


def _cmmd(name: str, x: Features) -> dict[str, dict]:
    return {name: entry(*distances.cmmd(x.images, x.reference), at_least=0.0)}


def _unbiased(name: str, x: Features) -> dict[str, dict]:
    value, error = distances.mmd(x.images, x.reference, distances.gaussian_kernel)
    return {name: entry(1000 * value, 1000 * error)}


METRICS = {
    "clip_mmd": PictureMetric("1000 times the biased MMD^2 of CLIP embeddings, sigma 10", _cmmd),
    "clip_mmd_unbiased": PictureMetric("1000 times the unbiased MMD^2, sigma 10", _unbiased),
}

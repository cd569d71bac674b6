"""CMMD's formula on CLIP embeddings: biased MMD^2 with a Gaussian kernel, times 1000 (arXiv:2401.09603)."""

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry


def _cmmd(name: str, x: Features) -> dict[str, dict]:
    return {name: entry(*distances.cmmd(x.images, x.reference), at_least=0.0)}


METRICS = {"clip_mmd": PictureMetric("1000 times the biased MMD^2 of CLIP embeddings, sigma 10", _cmmd)}

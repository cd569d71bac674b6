"""Inception score: exp of the mean KL(p(label | picture) | p(label)), over ten splits (arXiv:1606.03498)."""

import math

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry

SPLITS = 10


def _score(name: str, x: Features) -> dict[str, dict]:
    value, spread = distances.inception_score(x.images, SPLITS)
    error = spread / math.sqrt(SPLITS - 1)  # of the mean of the splits; numpy's std divides by SPLITS
    return {name: entry(value, error, at_least=1.0, spread_of_splits=spread)}


METRICS = {
    "inception_score": PictureMetric(
        f"of Inception's labels, {SPLITS} splits", _score, "logits_unbiased", reference=False
    )
}

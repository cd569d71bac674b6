"""KID: unbiased MMD^2 of Inception's features, cubic kernel, mean over subsets (arXiv:1801.01401)."""

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry

SUBSET = 1000


def _kid(name: str, x: Features) -> dict[str, dict]:
    value, spread, error = distances.kid(x.images, x.reference, subset_size=SUBSET)
    return {name: entry(value, error, spread_of_subsets=spread, subset_size=SUBSET)}


def _refuse(name: str, fewest: int, images: int) -> str:
    too_few = f"{name} is a mean over subsets of {SUBSET} pictures: {fewest} are too few"
    return too_few if fewest < SUBSET else ""


METRICS = {
    "kid": PictureMetric(
        "unbiased MMD^2 of Inception's features, cubic kernel, mean over subsets",
        _kid,
        "pool",
        refuse=_refuse,
    )
}

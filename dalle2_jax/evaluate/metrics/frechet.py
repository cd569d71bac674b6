"""Frechet distances: FID, sFID and FID extrapolated, by Inception; the same formula by CLIP is no FID."""

import math

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.distances import Moments
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry

FID_PICTURES = 2048  # with fewer a covariance of 2048 features is singular


def frechet_name(with_inception: bool, *counts: int | None) -> str:
    """The name of the Frechet distance of sets of these sizes (None: unknown), by Inception or by CLIP."""
    if not with_inception:
        return "clip_frechet"
    return "fid" if min(n for n in counts if n is not None) >= FID_PICTURES else "fid_small"


def _frechet(name: str, x: Features) -> dict[str, dict]:
    if isinstance(x.reference, Moments):  # their standard error is unknown
        return {name: entry(distances.frechet_distance(Moments.of(x.images), x.reference), None)}
    return {name: entry(*distances.frechet_with_error(x.images, x.reference), at_least=0.0)}


def _infinity(name: str, x: Features) -> dict[str, dict]:
    is_moments = isinstance(x.reference, Moments)
    moments = x.reference if is_moments else Moments.of(x.reference)
    value, error_of_fit = distances.frechet_infinity(x.images, moments, seed=x.seed)
    error = None
    if not is_moments:
        error = math.hypot(error_of_fit, distances.frechet_with_error(x.images, x.reference)[1])
    return {name: entry(value, error, error_of_fit=error_of_fit)}


def _refuse(name: str, fewest: int, images: int) -> str:
    if fewest >= FID_PICTURES:
        return ""
    return (
        f"{name} of {fewest} pictures would not be FID: the covariance of fewer than {FID_PICTURES} is "
        "singular, and the distance depends on their number; give more, or measure fid_small or kid"
    )


def _refuse_infinity(name: str, fewest: int, images: int) -> str:
    if images // 10 > FID_PICTURES:
        return ""
    return f"{name} needs more than {10 * FID_PICTURES} pictures, not {images}"


METRICS = {
    "fid": PictureMetric(
        "Frechet distance of Inception's features", _frechet, "pool", statistics=True, refuse=_refuse
    ),
    "fid_small": PictureMetric(
        "the same of too few pictures to be called FID", _frechet, "pool", statistics=True
    ),
    "sfid": PictureMetric(
        "Frechet distance of 17 x 17 x 7 positions of Inception's Mixed_6d",
        _frechet,
        "spatial",
        statistics=True,
        refuse=_refuse,
    ),
    "fid_infinity": PictureMetric(
        "FID extrapolated to infinitely many generated pictures",
        _infinity,
        "pool",
        statistics=True,
        refuse=_refuse_infinity,
    ),
    "clip_frechet": PictureMetric("Frechet distance of CLIP embeddings", _frechet),
}

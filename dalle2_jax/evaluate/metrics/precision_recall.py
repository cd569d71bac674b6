"""Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) by nearest neighbours."""

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry, share_entry

NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


def _neighbours(name: str, x: Features) -> dict[str, dict]:
    prefix = name.removesuffix("precision_recall")
    near = distances.neighbourhoods(x.images, x.reference, NEIGHBOURS)
    wide = distances.neighbourhoods(x.images, x.reference, DENSITY_NEIGHBOURS)
    density, error = wide["density"], wide["density_error"]
    return {
        f"{prefix}precision": share_entry(near["precision"], len(x.images), neighbours=NEIGHBOURS),
        f"{prefix}recall": share_entry(near["recall"], len(x.reference), neighbours=NEIGHBOURS),
        f"{prefix}density": entry(density, error, at_least=0.0, neighbours=DENSITY_NEIGHBOURS),
        f"{prefix}coverage": share_entry(wide["coverage"], len(x.reference), neighbours=DENSITY_NEIGHBOURS),
    }


def _refuse(name: str, fewest: int, images: int) -> str:
    return f"{name} needs more than {fewest} pictures" if fewest <= DENSITY_NEIGHBOURS else ""


METRICS = {
    "precision_recall": PictureMetric(
        "neighbours of Inception's features; density and coverage too", _neighbours, "pool", refuse=_refuse
    ),
    "clip_precision_recall": PictureMetric("neighbours of CLIP embeddings", _neighbours, refuse=_refuse),
}

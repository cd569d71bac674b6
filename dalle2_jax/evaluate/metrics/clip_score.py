"""CLIP score: how well pictures fit their captions, by CLIP embeddings, in three conventions.

With c_i the cosine of picture i and its caption,

    raw           mean of c_i
    hessel        mean of 2.5 max(c_i, 0), captions prefixed by "A photo depicts "  arXiv:2104.08718
    torchmetrics  100 max(mean of c_i, 0): clipped after the mean, no prefix

A CLIP score is comparable only between numbers of one CLIP.
"""

import numpy as np

from dalle2_jax.evaluate.metric import Features, PictureMetric, entry

PREFIX = "A photo depicts "
HESSEL_SCALE = 2.5
CONVENTIONS = ("raw", "hessel", "torchmetrics")


def cosines(image_embed: np.ndarray, text_embed: np.ndarray) -> np.ndarray:
    """Cosines [N] float64 of image and text embeddings [N, E] of any norm."""
    x, y = np.asarray(image_embed, np.float64), np.asarray(text_embed, np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"pictures {list(x.shape)} and texts {list(y.shape)} must both be [N, E]")
    return (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))


def clip_score(cosine: np.ndarray, convention: str) -> tuple[float, float]:
    """(score, standard error) of cosines [N]; for 'hessel' the captions begin with PREFIX."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")
    cosine = np.asarray(cosine, np.float64)
    if convention == "hessel":
        cosine = HESSEL_SCALE * np.maximum(cosine, 0)
    scale = 100.0 if convention == "torchmetrics" else 1.0
    mean = cosine.mean() * scale
    error = cosine.std(ddof=1) * scale / np.sqrt(len(cosine)) if len(cosine) > 1 else float("inf")
    return float(max(mean, 0.0) if convention == "torchmetrics" else mean), float(error)


def _clip_score(name: str, x: Features) -> dict[str, dict]:
    captions, size = x.pictures.captions(), x.networks.batch_size
    (texts, _), _ = x.networks.clip.encode_text(captions, size)
    (prefixed, _), _ = x.networks.clip.encode_text([PREFIX + caption for caption in captions], size)
    found = {}
    for convention in CONVENTIONS:
        cosine = cosines(x.images, prefixed if convention == "hessel" else texts)
        value, error = clip_score(cosine, convention)
        least = -1.0 if convention == "raw" else 0.0
        found[f"{name}_{convention}"] = entry(value, error, at_least=least, convention=convention)
    return found


METRICS = {
    "clip_score": PictureMetric(
        "cosine of CLIP embeddings of picture and caption", _clip_score, reference=False, captions=True
    )
}

"""How well pictures fit their captions, by CLIP's embeddings: one number has three conventions.

With c_i the cosine of picture i and its caption,

    raw           mean of c_i
    hessel        mean of 2.5 max(c_i, 0), captions behind "A photo depicts "       arXiv:2104.08718
    torchmetrics  100 max(mean of c_i, 0): cut after the mean, no words in front

None means anything without the CLIP's name. R-precision: the share of pictures whose own caption is the
nearest of R, the others drawn at random from the captions of the other pictures.
"""

import numpy as np

PREFIX = "A photo depicts "
HESSEL_SCALE = 2.5
CONVENTIONS = ("raw", "hessel", "torchmetrics")


def cosines(image_embed: np.ndarray, text_embed: np.ndarray) -> np.ndarray:
    """[N] float64 cosines of rows [N, E] of pictures and of texts, of any norm."""
    x, y = np.asarray(image_embed, np.float64), np.asarray(text_embed, np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"pictures {list(x.shape)} and texts {list(y.shape)} must both be [N, E]")
    return (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))


def clip_score(cosine: np.ndarray, convention: str) -> tuple[float, float]:
    """(score, standard error) of cosines [N]; for 'hessel' those of captions behind PREFIX."""
    if convention not in CONVENTIONS:
        raise ValueError(
            f"CLIP score's convention {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}"
        )
    cosine = np.asarray(cosine, np.float64)
    if convention == "hessel":
        cosine = HESSEL_SCALE * np.maximum(cosine, 0)
    scale = 100.0 if convention == "torchmetrics" else 1.0
    mean = cosine.mean() * scale
    error = cosine.std(ddof=1) * scale / np.sqrt(len(cosine)) if len(cosine) > 1 else float("inf")
    return float(max(mean, 0.0) if convention == "torchmetrics" else mean), float(error)


def r_precision(
    image_embed: np.ndarray, text_embed: np.ndarray, captions: list[str], candidates: int = 100, seed: int = 0
) -> tuple[int, int]:
    """(right, N): pictures [N, E] whose own caption beats `candidates` - 1 other captions, strictly.

    The others are distinct captions that differ from its own. Raises ValueError where there are too few.
    """
    captions = list(captions)
    different, place = np.unique(captions, return_inverse=True)
    if not 2 <= candidates <= len(different):
        raise ValueError(
            f"R-precision among {candidates} captions needs as many different ones, not {len(different)}"
        )
    image, text = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (np.asarray(image_embed, np.float64), np.asarray(text_embed, np.float64))
    )
    first = {text_number: row for row, text_number in reversed(list(enumerate(place)))}
    rows_of = np.array([first[number] for number in range(len(different))])
    draw, right = np.random.default_rng(seed), 0
    for i, own in enumerate(place):
        others = draw.choice(len(different) - 1, candidates - 1, replace=False)
        others += others >= own
        right += bool(image[i] @ text[i] > (text[rows_of[others]] @ image[i]).max())
    return right, len(captions)

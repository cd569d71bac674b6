"""R-precision by CLIP: the share of pictures whose caption is the nearest of R random captions of the set."""

import numpy as np

from dalle2_jax.evaluate.metric import Features, PictureMetric, share_entry

CANDIDATES = 100


def r_precision(
    image_embed: np.ndarray, text_embed: np.ndarray, captions: list[str], candidates: int = 100, seed: int = 0
) -> tuple[int, int]:
    """(right, N): how many pictures [N, E] are nearer to their caption than to `candidates` - 1 others.

    The others are distinct captions, drawn at random. Raises ValueError for too few captions.
    """
    captions = list(captions)
    different, place = np.unique(captions, return_inverse=True)
    if not 2 <= candidates <= len(different):
        raise ValueError(f"R-precision of {candidates} needs as many different ones, not {len(different)}")
    image, text = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (np.asarray(image_embed, np.float64), np.asarray(text_embed, np.float64))
    )
    first = {text_number: row for row, text_number in reversed(list(enumerate(place)))}
    rows_of = np.array([first[number] for number in range(len(different))])
    draw, right = np.random.default_rng(seed), 0
    for i, caption in enumerate(place):
        others = draw.choice(len(different) - 1, candidates - 1, replace=False)
        others += others >= caption
        right += bool(image[i] @ text[i] > (text[rows_of[others]] @ image[i]).max())
    return right, len(captions)


def _r_precision(name: str, x: Features) -> dict[str, dict]:
    captions = x.pictures.captions()
    (texts, _), _ = x.networks.clip.encode_text(captions, x.networks.batch_size)
    candidates = min(CANDIDATES, len(set(captions)))
    right, count = r_precision(x.images, texts, captions, candidates, x.seed)
    return {name: share_entry(right / count, count, candidates=candidates)}


METRICS = {
    "clip_r_precision": PictureMetric(
        f"its caption the nearest of {CANDIDATES}, by CLIP", _r_precision, reference=False, captions=True
    )
}

"""Memorised: drawings beside the nearest picture of the training data, by the cosine of CLIP embeddings.

A drawing counts as memorised if it is nearer to its nearest training picture than that one is to any other
training picture (authenticity, arXiv:2102.08921, section 3.3). Real pictures that training did not have give
the number to compare with: the same metric of --images=VALIDATION.
"""

import json

import numpy as np
from etils import epath

from dalle2_jax.evaluate import picture_sets
from dalle2_jax.evaluate.metric import Features, PictureMetric, share_entry
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.runtime import metrics

_CHUNK = 1024  # rows of a block of cosines
SAMPLE = 4096  # training pictures, at most, whose nearest other ones give the quantiles
QUANTILES = (0.05, 0.5, 0.95, 1.0)
PAIRS = 24  # on the contact sheet
SIDE = 128


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(x: np.ndarray, y: np.ndarray, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(row of y with the highest cosine, that cosine) of each row of x [N, D], for y [M, D].

    own: rows of y [N] that do not count, such as each row of x itself; None: all count.
    """
    x, y = _unit(x), _unit(y)
    rows, cosines = [], []
    for start in range(0, len(x), _CHUNK):
        block = x[start : start + _CHUNK] @ y.T
        if own is not None:
            block[np.arange(len(block)), own[start : start + _CHUNK]] = -np.inf
        rows.append(block.argmax(axis=1))
        cosines.append(block.max(axis=1))
    return np.concatenate(rows), np.concatenate(cosines)


def _memorised(name: str, x: Features) -> dict[str, dict]:
    rows, cosines = nearest(x.images, x.reference)
    places = np.unique(rows)
    _, between = nearest(x.reference[places], x.reference, places)
    copied = cosines > between[np.searchsorted(places, rows)]
    some = np.random.default_rng(x.seed).permutation(len(x.reference))[:SAMPLE]
    _, others = nearest(x.reference[some], x.reference, some)
    shown = {
        kind: {f"{q:g}": round(float(np.quantile(found, q)), 4) for q in QUANTILES}
        for kind, found in (("drawings", cosines), ("reference", others))
    }
    pairs = list(zip(rows.tolist(), cosines.tolist(), copied.tolist(), strict=True))
    return {name: share_entry(float(copied.mean()), len(copied), cosine_quantiles=shown, pairs=pairs)}


def _write(found: dict[str, dict], images, reference, out: epath.Path) -> None:
    """Write memorised.jsonl, a line a drawing, and memorised_pairs.png, the drawings that are nearest."""
    pairs = found["memorised"].pop("pairs")
    keys = [[item.key for item in pictures.items()] for pictures in (images, reference)]
    captions = [pictures.texts or ("",) * pictures.count for pictures in (images, reference)]
    lines = [
        {
            "picture": keys[0][i],
            "caption": captions[0][i],
            "nearest": keys[1][j],
            "nearest_caption": captions[1][j],
            "cosine": round(cosine, 4),
            "memorised": copied,
        }
        for i, (j, cosine, copied) in enumerate(pairs)
    ]
    order = sorted(range(len(pairs)), key=lambda i: -pairs[i][1])
    text = "".join(json.dumps(lines[i], ensure_ascii=False) + "\n" for i in order)
    (epath.Path(out) / "memorised.jsonl").write_text(text)
    shown = order[:PAIRS]
    drawn = picture_sets.numbered(images, shown)
    real = picture_sets.numbered(reference, (pairs[i][0] for i in shown))
    cells, labels = [], []
    for i in shown:
        line = lines[i]
        cells += [square_picture(item.picture(), SIDE) for item in (drawn[i], real[pairs[i][0]])]
        labels += [line["caption"] or line["picture"], f"{line['cosine']:.3f}: {line['nearest_caption']}"]
    metrics.save_png(
        epath.Path(out) / "memorised_pairs.png",
        metrics.labelled_grid(np.stack(cells), labels, 8),
        {"pairs": json.dumps([lines[i] for i in shown])},
    )


METRICS = {
    "memorised": PictureMetric(
        "share nearer to a reference picture than that one is to another", _memorised, write=_write
    )
}

"""LAION's aesthetic score of a picture, by a small head on CLIP's image embedding: about 1 (ugly) to 10.

The head of the second version (sac+logos+ava1-l14-linearMSE.pth) has five linear layers 768, 1024, 128, 64,
16, 1 with dropout alone between them. It reads unit embeddings of OpenAI's ViT-L/14 and of no other CLIP.
"""

import os
import re

import numpy as np

from dalle2_jax.convert.tensors import open_tensors
from dalle2_jax.evaluate.metric import Features, PictureMetric, entry
from dalle2_jax.runtime import files


def load(path: str | os.PathLike, embed_dim: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(weight [E], bias [], sha256): the layers of a state dictionary, composed into one affine map.

    Raises FileNotFoundError, or ValueError for layers that do not fit each other or `embed_dim`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    state = open_tensors(path)
    numbers = sorted(
        {int(m[1]) for m in (re.fullmatch(r"layers\.(\d+)\.weight", name) for name in state) if m}
    )
    if not numbers or len(state) != 2 * len(numbers) or f"layers.{numbers[-1]}.bias" not in state:
        raise ValueError(f"{path} is no head of an aesthetic score: only layers.N.weight and .bias are read")
    weight, bias = np.zeros((0, 0)), np.zeros(0)
    for number in numbers:
        w, b = (state[f"layers.{number}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        if number == numbers[0] and w.ndim == 2:  # the identity before the first layer
            weight, bias = np.eye(w.shape[1]), np.zeros(w.shape[1])
        if w.ndim != 2 or b.shape != w.shape[:1] or w.shape[1] != len(bias):
            raise ValueError(f"{path}: layer {number}, {list(w.shape)}, does not fit behind the one before")
        weight, bias = w @ weight, w @ bias + b
    if weight.shape[0] != 1:
        raise ValueError(f"{path} ends in {weight.shape[0]} numbers, a score is one")
    if weight.shape[1] != embed_dim:
        sizes = f"CLIP embeddings of {weight.shape[1]} entries, the CLIP's have {embed_dim}"
        raise ValueError(f"{path} reads {sizes}: it is for OpenAI's ViT-L/14")
    return weight[0], bias[0], files.sha256(path)


def score(embeds: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The scores [N] of image embeddings [N, E], which are normalised first."""
    embeds = np.asarray(embeds, np.float64)
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True) @ weight + bias


def _aesthetic(name: str, x: Features) -> dict[str, dict]:
    weight, bias, head_sha256 = x.networks.head
    scores = score(x.images, weight, bias)
    return {name: entry(scores.mean(), scores.std(ddof=1) / np.sqrt(len(scores)), head_sha256=head_sha256)}


METRICS = {
    "aesthetic": PictureMetric(
        "LAION's head on CLIP's image embeddings, mean", _aesthetic, reference=False, head=True
    )
}

"""Pictures ranked by CLIP: which embeddings are closest to that of the caption (DALL-E 1, section 2.6)."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dalle2_jax.generate.pipeline import Pipeline
    from dalle2_jax.generate.result import Result

NAME = "rerank"  # of its entry in the settings of a result


def scores(clip: "Pipeline", images, captions: Sequence[str], batch_size: int | None = None) -> np.ndarray:
    """The cosine [N] of the embeddings of N pictures, uint8 [H, W, 3] or PIL pictures, and their captions.

    clip: a model with a CLIP.
    """
    texts = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    (embeds, _), _ = clip.encode_text([*texts], batch_size)
    pictures = clip.encode_image(images, batch_size)
    wanted = embeds[[texts[caption] for caption in captions]]
    norms = np.linalg.norm(pictures, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return (pictures * wanted).sum(axis=-1) / norms


def clip_of(model: "Pipeline", clip: "Pipeline | None") -> "Pipeline":
    """The model whose CLIP ranks: `clip`, or the model itself, or the one of the package."""
    if clip is None and "encode_image" not in model.actions:
        clip = type(model).load()
    clip = clip or model
    for action in ("encode_text", "encode_image"):
        clip.steps(action)  # raises ValueError for a model without CLIP
    return clip


def drawn(
    model: "Pipeline",
    captions: Sequence[str],
    candidates: int,
    clip: "Pipeline | None" = None,
    *,
    n: int = 1,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    **options,
) -> "Result":
    """The n pictures of each caption that CLIP finds closest to it among `candidates`, the closest first.

    They keep their numbers among the candidates, with which they can be drawn again alone. With `numbers`,
    one a caption, picture k is the closest of the candidates k c .. k c + c - 1. options: of
    `Pipeline.text_to_image`.

    Raises ValueError for a model without captions or CLIP, and for fewer candidates than pictures.
    """
    if isinstance(captions, str) or not len(captions):
        raise ValueError("reranking needs captions: CLIP compares pictures with them")
    if n > candidates:
        raise ValueError(f"rerank {candidates} draws too few candidates for {n} pictures a caption")
    clip = clip_of(model, clip)
    if numbers is None:
        numbers = list(range(candidates)) * len(captions)
    else:
        n, numbers = 1, [k * candidates + i for k in numbers for i in range(candidates)]
    texts = [caption for caption in captions for _ in range(candidates)]
    result = model.text_to_image(texts, numbers=numbers, batch_size=batch_size, **options)
    found = scores(clip, result.images, texts, batch_size).reshape(-1, candidates)
    best = np.argsort(-found, axis=1, kind="stable")[:, :n]  # [captions, n]
    kept = (best + np.arange(len(best))[:, None] * candidates).reshape(-1)
    return dataclasses.replace(
        result,
        captions=tuple(result.captions[i] for i in kept),
        numbers=tuple(result.numbers[i] for i in kept),
        settings=result.settings | {NAME: {"candidates": candidates, "clip": clip.name}},
        **{name: getattr(result, name)[kept] for name in ("image_embeds", "base", "images")},
    )

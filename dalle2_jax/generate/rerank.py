"""Pictures ranked: by CLIP, which embeddings are closest to the caption's (DALL-E 1, section 2.6), or by a
classifier, which pictures are likeliest of their class (VQ-VAE-2, section 3.4)."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dalle2_jax.generate.pipeline import Pipeline
    from dalle2_jax.generate.result import Result

NAME = "rerank"  # of its entry in the settings of a result


def scores(judge: "Pipeline", images, captions: Sequence[str], batch_size: int | None = None) -> np.ndarray:
    """How well N pictures, uint8 [H, W, 3] or PIL pictures, fit their captions: float [N], more is better.

    judge: a model with a CLIP, for the cosine of embeddings, or a classifier, for log p(class | picture).
    """
    if "encode_image" not in judge.actions:
        return judge.score(images, captions, batch_size)
    texts = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    (embeds, _), _ = judge.encode_text([*texts], batch_size)
    pictures = judge.encode_image(images, batch_size)
    wanted = embeds[[texts[caption] for caption in captions]]
    norms = np.linalg.norm(pictures, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return (pictures * wanted).sum(axis=-1) / norms


def judge_of(model: "Pipeline", judge: "Pipeline | None") -> "Pipeline":
    """The model that ranks: `judge`, or else the model itself if it can, or else the one of the package.

    Raises ValueError for a judge without CLIP and classifier.
    """
    able = {"encode_image", "score"}
    if judge is None:
        judge = model if able & model.actions.keys() else type(model).load()
    if not able & judge.actions.keys():
        judge.steps("encode_image")  # says what it lacks
    return judge


def drawn(
    model: "Pipeline",
    captions: Sequence[str],
    candidates: int,
    judge: "Pipeline | None" = None,
    *,
    n: int = 1,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    **options,
) -> "Result":
    """The n pictures of each caption that score best among `candidates`, the best first; see `scores`.

    They keep their numbers among the candidates, with which they can be drawn again alone. With `numbers`,
    one a caption, picture k is the best of the candidates k c .. k c + c - 1. options: of
    `Pipeline.text_to_image`.

    Raises ValueError for a model without captions or judge, and for fewer candidates than pictures.
    """
    if isinstance(captions, str) or not len(captions):
        raise ValueError("reranking needs captions: pictures are compared with them")
    if n > candidates:
        raise ValueError(f"rerank {candidates} draws too few candidates for {n} pictures a caption")
    judge = judge_of(model, judge)
    if numbers is None:
        numbers = list(range(candidates)) * len(captions)
    else:
        n, numbers = 1, [k * candidates + i for k in numbers for i in range(candidates)]
    texts = [caption for caption in captions for _ in range(candidates)]
    result = model.text_to_image(texts, numbers=numbers, batch_size=batch_size, **options)
    found = scores(judge, result.images, texts, batch_size).reshape(-1, candidates)
    best = np.argsort(-found, axis=1, kind="stable")[:, :n]  # [captions, n]
    kept = (best + np.arange(len(best))[:, None] * candidates).reshape(-1)
    return dataclasses.replace(
        result,
        captions=tuple(result.captions[i] for i in kept),
        numbers=tuple(result.numbers[i] for i in kept),
        settings=result.settings | {NAME: {"candidates": candidates, "judge": judge.name}},
        **{name: getattr(result, name)[kept] for name in ("image_embeds", "base", "images")},
    )

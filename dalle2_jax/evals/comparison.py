"""Ways of drawing the same captions, side by side: how right, how varied, how close to the caption, how fast.

Of each caption several pictures are drawn. With z_i the unit CLIP embeddings of a caption's n pictures and y
that of the caption,

    diversity = mean over captions of the mean of 1 - z_i . z_j over i != j
    clip      = mean of z_i . y
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.editing import unit
from dalle2_jax.evals import scene_scores


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of drawing.

    Attributes:
      name: what to call it.
      pictures: how many were judged.
      named, correct: shares in 0 .. 1, as `scene_scores` counts them. interval: Wilson's, of `named`.
      diversity, clip: see the module.
      seconds: a picture, all stages, without compiling.
    """

    name: str
    pictures: int
    named: float
    interval: tuple[float, float]
    correct: float
    diversity: float
    clip: float
    seconds: float


def diversity(embeds: np.ndarray) -> float:
    """Mean of 1 - cosine over the pairs of a caption's pictures, [captions, n >= 2, E] of unit norm."""
    count = embeds.shape[1]
    if count < 2:
        raise ValueError("diversity needs 2 or more pictures a caption")
    # sum over i != j of z_i . z_j = |sum of z|^2 - n
    together = (embeds.sum(axis=1) ** 2).sum(axis=-1) - count
    return float(1 - np.mean(together) / (count * (count - 1)))


def measure(
    name: str,
    model: pipeline.UnCLIP,
    captions: Sequence[str],
    check: Callable,
    *,
    n: int = 4,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    progress=None,
) -> tuple[Row, pipeline.Result]:
    """Draw `n` pictures of each caption with `settings` of `UnCLIP.text_to_image` and judge them.

    `check(image, caption)` is `evals.scenes.check`.
    """
    result = model.text_to_image(
        captions, seed=seed, n=n, batch_size=batch_size, progress=progress, **(settings or {})
    )
    verdicts = [
        scene_scores.verdict_aspects(check(image, caption))
        for image, caption in zip(result.images, result.captions, strict=True)
    ]
    count = len(verdicts)
    named = sum(verdict["named"] for verdict in verdicts)
    images = unit(model.encode_image(result.images, batch_size)).reshape(len(captions), n, -1)
    (texts, _), _ = model.encode_text(captions, batch_size)
    texts = unit(texts)
    row = Row(
        name=name,
        pictures=count,
        named=named / count,
        interval=scene_scores.wilson(named, count),
        correct=sum(verdict["correct"] for verdict in verdicts) / count,
        diversity=diversity(images),
        clip=float((images * texts[:, None]).sum(axis=-1).mean()),
        seconds=sum(timing.seconds for timing in result.timings.values()) / count,
    )
    return row, result


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | pictures | all named (95 %) | correct | diversity | CLIP cosine | s a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.interval
        lines.append(
            f"| {row.name} | {row.pictures} | {row.named:.2f} ({low:.2f} .. {high:.2f}) "
            f"| {row.correct:.2f} | {row.diversity:.3f} | {row.clip:.3f} | {row.seconds:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write a PNG: share of right pictures, with its interval, against their diversity, one point a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    x, y = [row.diversity for row in rows], [row.named for row in rows]
    spread = [[row.named - row.interval[0] for row in rows], [row.interval[1] - row.named for row in rows]]
    axes.errorbar(x, y, spread, marker="o", linewidth=1, elinewidth=0.6, capsize=2)
    for row in rows:
        axes.annotate(
            row.name, (row.diversity, row.named), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    axes.set_xlabel("diversity (1 - CLIP cosine of pictures of one caption)")
    axes.set_ylabel("share of pictures with all that is named")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    with open(os.fspath(path), "wb") as file:
        figure.savefig(file, format="png", dpi=120)

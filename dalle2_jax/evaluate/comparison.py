"""Ways of drawing the same captions, side by side: how right, how varied, how real, how fast.

Of each caption several pictures are drawn. With z_i the unit CLIP embeddings of a caption's n pictures and y
that of the caption,

    diversity = mean over captions of the mean of 1 - z_i . z_j over i != j
    clip      = mean of z_i . y

Against pictures that are real, the entries of `fidelity.measure`: a Frechet distance, precision and recall.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.edit.latents import unit
from dalle2_jax.evaluate import fidelity, scene_scores
from dalle2_jax.evaluate.picture_sets import PictureSet, of_images

FRECHET = {"fid": "FID", "fid_small": "FID of few pictures", "clip_frechet": "Frechet distance (CLIP)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of drawing.

    Attributes:
      name: what to call it.
      pictures: how many were judged.
      named, correct: shares in 0 .. 1, as `scene_scores` counts them. interval: Wilson's, of `named`. None
        without a checker.
      diversity, clip: see the module.
      seconds: a picture, all stages, without compiling.
      fidelity: entries of `fidelity.measure`.
    """

    name: str
    pictures: int
    named: float | None
    interval: tuple[float, float] | None
    correct: float | None
    diversity: float
    clip: float
    seconds: float
    fidelity: dict[str, dict] = dataclasses.field(default_factory=dict)

    def frechet(self) -> tuple[str, dict]:
        """(name of the metric, its entry). Raises ValueError where none was measured."""
        for name in FRECHET:
            if name in self.fidelity:
                return name, self.fidelity[name]
        raise ValueError(f"{self.name} was not compared with a reference")

    def neighbours(self, name: str) -> dict:
        """The entry of 'precision' or 'recall', by CLIP's features or Inception's."""
        return self.fidelity.get(name) or self.fidelity[f"clip_{name}"]


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
    check: Callable | None,
    *,
    n: int = 4,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    progress=None,
    fidelity_of: Callable[[PictureSet], dict[str, dict]] | None = None,
) -> tuple[Row, pipeline.Result]:
    """Draw `n` pictures of each caption with `settings` of `UnCLIP.text_to_image` and judge them.

    Args:
      check: (image, caption) -> verdict, `evals.scenes.check`; None: nobody says what is right.
      fidelity_of: the pictures as a set -> entries of `fidelity.measure`.
    """
    result = model.text_to_image(
        captions, seed=seed, n=n, batch_size=batch_size, progress=progress, **(settings or {})
    )
    count, judged = len(result.images), dict(named=None, interval=None, correct=None)
    if check is not None:
        verdicts = [
            scene_scores.verdict_aspects(check(image, caption))
            for image, caption in zip(result.images, result.captions, strict=True)
        ]
        named, correct = (sum(verdict[key] for verdict in verdicts) for key in ("named", "correct"))
        judged = dict(
            named=named / count, interval=scene_scores.wilson(named, count), correct=correct / count
        )
    images = unit(model.encode_image(result.images, batch_size)).reshape(len(captions), n, -1)
    (texts, _), _ = model.encode_text(captions, batch_size)
    texts = unit(texts)
    row = Row(
        name=name,
        pictures=count,
        **judged,
        diversity=diversity(images),
        clip=float((images * texts[:, None]).sum(axis=-1).mean()),
        seconds=sum(timing.seconds for timing in result.timings.values()) / count,
        fidelity=fidelity_of(of_images(name, result.images, result.captions)) if fidelity_of else {},
    )
    return row, result


def against(
    reference: PictureSet | fidelity.Stats, pictures: int, model: pipeline.UnCLIP, **options
) -> Callable[[PictureSet], dict[str, dict]]:
    """`fidelity_of` for `measure`: Frechet distance, precision and recall of `pictures` against a reference.

    model: whose CLIP reads them, for every way the same; options: of `fidelity.measure`, `weights` among them
    for Inception in its place. The reference is read once. Of statistics there are no neighbours.

    Raises ValueError for what cannot be measured, before anything is drawn.
    """
    weights = options.get("weights")
    names = [fidelity.frechet_name(weights is not None, pictures, reference.count)]
    if fidelity.pictures_of(reference) is not None:
        names.append("clip_precision_recall" if weights is None else "precision_recall")
    planned = PictureSet("pictures", "drawn", pictures, lambda: iter(()))
    preset = options.get("preset", "ttur")
    fidelity.check(names, planned, reference, preset=preset, with_inception=weights is not None)
    return functools.partial(
        fidelity.measure, reference=reference, metrics=names, model=model, known={}, **options
    )


def columns(rows: Sequence[Row]) -> dict[str, list]:
    """Heading -> a value for each row, of what was measured of the first."""
    first = rows[0]
    found = {"": [row.name for row in rows], "pictures": [row.pictures for row in rows]}
    if first.named is not None:
        shares = ["{:.2f} ({:.2f} .. {:.2f})".format(row.named, *row.interval) for row in rows]
        found |= {"all named (95 %)": shares, "correct": [f"{row.correct:.2f}" for row in rows]}
    found["diversity"] = [f"{row.diversity:.3f}" for row in rows]
    found["CLIP cosine"] = [f"{row.clip:.3f}" for row in rows]
    if first.fidelity:
        found[FRECHET[first.frechet()[0]]] = [_with_interval(row.frechet()[1]) for row in rows]
        for name in ("precision", "recall"):
            if any(key.endswith(name) for key in first.fidelity):
                found[name] = ["{:.2f}".format(row.neighbours(name)["value"]) for row in rows]
    return found | {"s a picture": [f"{row.seconds:.2f}" for row in rows]}


def _with_interval(entry: dict) -> str:
    between = entry["interval"] and " ({:.3g} .. {:.3g})".format(*entry["interval"])
    return f"{entry['value']:.3g}{between or ''}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    found = columns(rows)
    lines = [found, *zip(*found.values(), strict=True)]
    head, *body = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return "\n".join([head.replace("|  |", "| |"), "|" + "---|" * len(found), *body])


def plot(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write a PNG with a point a row, joined in their order: right pictures against diversity where they were
    judged; distance from the reference against CLIP cosine and recall, and precision against recall."""
    from matplotlib.figure import Figure

    panels = []
    if rows[0].named is not None:
        shares = [(row.diversity, row.named, row.interval) for row in rows]
        panels.append(
            ("diversity (1 - CLIP cosine of a caption's pictures)", "share with all that is named", shares)
        )
    if rows[0].fidelity:
        label, recalls = FRECHET[rows[0].frechet()[0]], None
        entries = [row.frechet()[1] for row in rows]
        of = [(entry["value"], entry["interval"]) for entry in entries]
        panels.append(
            (
                "CLIP cosine of picture and caption",
                label,
                [(row.clip, *y) for row, y in zip(rows, of, strict=True)],
            )
        )
        if any(key.endswith("recall") for key in rows[0].fidelity):
            recalls = [row.neighbours("recall")["value"] for row in rows]
            panels.append(("recall", label, [(x, *y) for x, y in zip(recalls, of, strict=True)]))
            near = [row.neighbours("precision") for row in rows]
            points = [(x, y["value"], y["interval"]) for x, y in zip(recalls, near, strict=True)]
            panels.append(("recall", "precision", points))
    down = -(-len(panels) // 2)
    across = min(2, len(panels))
    figure = Figure(figsize=(5.6 * across, 4.2 * down), layout="constrained")
    for axes, (x_label, y_label, points) in zip(
        figure.subplots(down, across, squeeze=False).flat, panels, strict=False
    ):
        x, y, intervals = zip(*points, strict=True)
        spread = None
        if all(intervals):
            ends = np.array(intervals).T
            spread = np.maximum(0, [np.array(y) - ends[0], ends[1] - np.array(y)])
        axes.errorbar(x, y, spread, marker="o", linewidth=1, elinewidth=0.6, capsize=2)
        for row, place in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(row.name, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set(xlabel=x_label, ylabel=y_label)
        if y_label.startswith(("share", "precision")):
            axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    with open(os.fspath(path), "wb") as file:
        figure.savefig(file, format="png", dpi=120)

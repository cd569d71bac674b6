"""Ways of drawing the same captions, side by side: share that is right, diversity, fidelity, speed.

Several pictures are drawn of each caption. With z_i the unit CLIP embeddings of a caption's n pictures and y
that of the caption,

    diversity = mean over captions of the mean of 1 - z_i . z_j over i != j
    clip      = mean of z_i . y

Fidelity to reference pictures: the entries of `fidelity.measure` for a Frechet distance, precision and
recall.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from dalle2_jax import pipeline
from dalle2_jax.edit.latents import unit
from dalle2_jax.evaluate import drawing, fidelity, page, picture_sets
from dalle2_jax.evaluate.evaluate import GRID_PICTURES, open_networks
from dalle2_jax.evaluate.metric import Request, wilson
from dalle2_jax.evaluate.metrics import scenes as scenes_metric
from dalle2_jax.evaluate.metrics.frechet import frechet_name
from dalle2_jax.evaluate.networks import Networks, has_clip
from dalle2_jax.evaluate.picture_sets import PassLines, PictureSet, of_images
from dalle2_jax.evaluate.reference import Stats, pictures_of
from dalle2_jax.generate import output
from dalle2_jax.generate.flags import sampling_settings
from dalle2_jax.generate.output import StageLines
from dalle2_jax.runtime import extras, metrics, processes

FRECHET = {"fid": "FID", "fid_small": "FID of few pictures", "clip_frechet": "Frechet distance (CLIP)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of drawing.

    Attributes:
      pictures: number of drawn pictures.
      named, correct: shares in 0 .. 1, see `metrics.scenes`; interval: Wilson's (low, high) of `named`; None
        without a checker.
      diversity, clip: see the module.
      seconds: per picture, all stages, without compiling.
      fidelity: entries of `fidelity.measure`.
    """

    name: str
    pictures: int
    named: Any
    interval: Any
    correct: Any
    diversity: float
    clip: float
    seconds: float
    fidelity: dict[str, dict] = dataclasses.field(default_factory=dict)

    def frechet(self) -> tuple[str, dict]:
        """(name of the metric, its entry). Raises ValueError if none was measured."""
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
    sums = (embeds.sum(axis=1) ** 2).sum(axis=-1) - count
    return float(1 - np.mean(sums) / (count * (count - 1)))


def parse_way(text: str, model_dir: str | None) -> tuple[str, str | None, dict]:
    """'NAME: guidance_scale=2 model=DIR' as (name, model directory, keywords of `text_to_image`).

    Name and settings may be absent; the bundled model is None. Raises ValueError for anything else.
    """
    name, _, settings = text.rpartition(":")
    parts = [part.partition("=") for part in settings.split()]
    if any(not equals for _, equals, _ in parts):
        raise ValueError(f"--compare={text!r} must be settings like 'guidance_scale=2 prior_steps=64'")
    changes = {setting: value for setting, _, value in parts}
    directory = changes.pop("model", model_dir)
    return name.strip() or text or "as it is", directory, sampling_settings(changes)


def measure(
    name: str,
    result: pipeline.Result,
    clip: pipeline.Pipeline,
    check: Callable | None,
    fidelity_of: Callable[[PictureSet], dict[str, dict]],
    batch_size: int | None = None,
) -> Row:
    """The row of drawn pictures, several of each caption side by side.

    Args:
      clip: the model whose CLIP measures diversity and cosine.
      check: (image, caption) -> verdict, `evaluate.scenes.check`; None: no checker reads these captions.
      fidelity_of: a picture set -> entries of `fidelity.measure`.
    """
    count = len(result.images)
    judged: dict[str, Any] = dict(named=None, interval=None, correct=None)
    if check is not None:
        verdicts = list(map(scenes_metric.verdict_aspects, map(check, result.images, result.captions)))
        named, correct = (sum(bool(verdict[key]) for verdict in verdicts) for key in ("named", "correct"))
        judged = dict(named=named / count, interval=wilson(named, count), correct=correct / count)
    n = output.per_caption(result)
    captions = result.captions[::n]
    images = unit(clip.encode_image(result.images, batch_size)).reshape(len(captions), n, -1)
    (texts, _), _ = clip.encode_text(captions, batch_size)
    texts = unit(texts)
    return Row(
        name=name,
        pictures=count,
        **judged,
        diversity=diversity(images),
        clip=float((images * texts[:, None]).sum(axis=-1).mean()),
        seconds=sum(timing.seconds for timing in result.timings.values()) / count,
        fidelity=fidelity_of(of_images(name, result.images, result.captions)),
    )


def compare_with(
    reference: PictureSet | Stats, pictures: int, networks: Networks, seed: int
) -> Callable[[PictureSet], dict[str, dict]]:
    """`fidelity_of` for `measure`: Frechet distance, precision and recall of `pictures` against a reference.

    Inception reads them, or else CLIP; the reference is read once. Statistics have no neighbours.

    Raises ValueError for metrics that cannot be measured, before anything is drawn.
    """
    with_inception = networks.inception is not None
    names = [frechet_name(with_inception, pictures, reference.count)]
    if pictures_of(reference) is not None:
        names.append("precision_recall" if with_inception else "clip_precision_recall")
    planned = PictureSet("pictures", "drawn", pictures, lambda: iter(()))
    fidelity.check(names, planned, reference, networks)
    measured = functools.partial(fidelity.measure, reference=reference, names=names, networks=networks)
    return functools.partial(measured, seed=seed, reference_features={})


def compare(
    ways: Sequence[str],
    request: Request,
    out: epath.Path,
    *,
    model_dir: str | None,
    pictures: int,
    load: Callable[[Any], pipeline.Pipeline] = pipeline.UnCLIP.load,
    judge: pipeline.Pipeline | None = None,
) -> list[Row]:
    """Draw `request.n` captions, `pictures` each, in every one of `ways`; writes tables, plot and grids.

    Args:
      ways: see `parse_way`.
      model_dir: of the ways without a model. load: opens a model directory.
      judge: its CLIP reads all pictures. None: each model's CLIP measures diversity and cosine, that of
        `model_dir` the fidelity.

    Raises ValueError for an unknown setting, and for a model without CLIP and judge, before anything is
    drawn.
    """
    extras.check("--compare, which draws a plot,", "matplotlib")
    if pictures < 2:
        raise ValueError("--compare measures how pictures of a caption differ: give --pictures=2 or more")
    parsed = [parse_way(way, model_dir) for way in ways]
    directories = dict.fromkeys([model_dir, *(directory for _, directory, _ in parsed)])
    models = {directory: load(directory) for directory in directories}
    for model in models.values():
        if not has_clip(judge or model):
            where = f"the judge {judge.name!r}" if judge else f"model {model.name!r}"
            raise ValueError(f"--compare needs a CLIP, and {where} has none: give --judge=DIR")
    settings = [models[directory].settings(**changes) for _, directory, changes in parsed]
    networks = open_networks(models[model_dir], request, judge)
    check, captions, reference = _captions(models[model_dir], request, pictures)
    fidelity_of = compare_with(reference, len(captions) * pictures, networks, request.seed)
    common: dict[str, Any] = dict(seed=request.seed, batch_size=request.batch_size, progress=StageLines())
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"seed": request.seed, "captions": len(captions)}
    report |= {"reference": reference.summary()} | ({"judge": networks.judge_summary()} if judge else {})
    rows, described = [], []
    for (name, directory, changes), used in zip(parsed, settings, strict=True):
        print(f"{name}:", flush=True)
        model = models[directory]
        result = model.text_to_image(captions, n=pictures, **common, **changes)
        rows.append(measure(name, result, judge or model, check, fidelity_of, request.batch_size))
        described.append(dataclasses.asdict(rows[-1]) | {"model": model.name, "settings": used})
        shown = slice(0, GRID_PICTURES // pictures * pictures)
        grid = metrics.labelled_grid(result.images[shown], result.captions[shown], pictures)
        metrics.save_png(out / f"comparison_{len(rows)}.png", grid, {"way": name})
        # after every way, so that an interrupted comparison keeps its rows
        (out / "comparison.json").write_text(json.dumps(report | {"rows": described}, indent=2) + "\n")
        line = (
            "\nCLIP of the judge {name}, sha256 {weights_sha256}\n".format(**report["judge"]) if judge else ""
        )
        (out / "comparison.md").write_text(table(rows) + "\n" + line)
        plot(rows, out / "comparison.png")
    return rows


def _captions(
    model: pipeline.Pipeline, request: Request, pictures: int
) -> tuple[Callable | None, list[str], PictureSet | Stats]:
    """(checker, captions, reference): those of scenes, or without a checker those of `request.reference`."""
    if request.reference is None:
        check = scenes_metric.load_checker()
        config, side = drawing.scenes_of(model, request.scenes)
        captions, _ = scenes_metric.draw_captions(config, request.n, request.seed)
        drawn = scenes_metric.draw_scenes(config, request.n, pictures, request.seed)
        return check, captions, picture_sets.rendered("scenes of the captions", drawn, side)
    reference = picture_sets.open_pictures(request.reference, PassLines("pictures checked"))
    print(f"reference: {reference.describe()}", flush=True)
    return None, drawing.some_captions(reference, request.n, request.seed), reference


def write_report(out: epath.Path, rows: Sequence[Row], html: str | None = None) -> None:
    """Print the table of `compare`, and write the page `html`; process 0 alone writes it."""
    text = (out / "comparison.md").read_text().rstrip()
    print(text)
    print(f"wrote {out / 'comparison.json'}, comparison.md and comparison.png")
    if html and processes.is_first():
        shown, report = columns(rows), json.loads((out / "comparison.json").read_text())
        numbers = page.table(list(shown), list(zip(*shown.values(), strict=True)))
        title = f"{len(rows)} ways of drawing {report['captions']} captions, {rows[0].pictures} pictures each"
        checked = [
            page.Figure(f"{row.name}: all named", row.named, row.interval, True)
            for row in rows
            if row.interval
        ]
        found = checked or [page.Figure(f"{row.name}: CLIP cosine", row.clip) for row in rows]
        shares = {f.name: (f.value, f.interval) for f in checked if f.interval}
        chart = page.intervals(shares) if shares else ""
        page.write(html, title, numbers + chart, text, sorted(out.glob("comparison*.png")), report, found)


def columns(rows: Sequence[Row]) -> dict[str, list]:
    """Heading -> a value for each row; the headings are those of the first row's numbers."""
    first = rows[0]
    found: dict[str, list] = {"": [row.name for row in rows], "pictures": [row.pictures for row in rows]}
    if first.named is not None:
        shares = ["{:.2f} ({:.2f} .. {:.2f})".format(row.named, *row.interval) for row in rows]
        found |= {"all named (95 %)": shares, "correct": [f"{row.correct:.2f}" for row in rows]}
    found["diversity"] = [f"{row.diversity:.3f}" for row in rows]
    found["CLIP cosine"] = [f"{row.clip:.3f}" for row in rows]
    if first.fidelity:
        found[FRECHET[first.frechet()[0]]] = [_with_interval(**row.frechet()[1]) for row in rows]
        for name in ("precision", "recall"):
            if any(key.endswith(name) for key in first.fidelity):
                found[name] = ["{:.2f}".format(row.neighbours(name)["value"]) for row in rows]
    return found | {"s a picture": [f"{row.seconds:.2f}" for row in rows]}


def _with_interval(value: float, interval: Sequence[float] | None, **_) -> str:
    return f"{value:.3g}" + (" ({:.3g} .. {:.3g})".format(*interval) if interval else "")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    found = columns(rows)
    lines = [found, *zip(*found.values(), strict=True)]
    head, *body = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return "\n".join([head.replace("|  |", "| |"), "|" + "---|" * len(found), *body])


def plot(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write a PNG with a point a row, connected in their order: share of right pictures against diversity (if
    checked); distance from the reference against CLIP cosine and recall; precision against recall."""
    from matplotlib.figure import Figure

    panels = []  # (label of x, label of y, [(x, y, interval of y)])
    if rows[0].named is not None:
        shares = [(row.diversity, row.named, row.interval) for row in rows]
        panels += [
            ("diversity (1 - CLIP cosine of a caption's pictures)", "share with all that is named", shares)
        ]
    if rows[0].fidelity:
        label, found = FRECHET[rows[0].frechet()[0]], [row.frechet()[1] for row in rows]
        panels.append(
            ("CLIP cosine of picture and caption", label, _points([row.clip for row in rows], found))
        )
        if any(key.endswith("recall") for key in rows[0].fidelity):
            recalls = [row.neighbours("recall")["value"] for row in rows]
            panels.append(("recall", label, _points(recalls, found)))
            near = [row.neighbours("precision") for row in rows]
            panels.append(("recall", "precision", _points(recalls, near)))
    down, across = -(-len(panels) // 2), min(2, len(panels))
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
        axes.margins(x=0.25)  # room for the names
        axes.locator_params(axis="x", nbins=4)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    with open(os.fspath(path), "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _points(x: Sequence[float], entries: Sequence[dict]) -> list[tuple]:
    return [(x, entry["value"], entry["interval"]) for x, entry in zip(x, entries, strict=True)]

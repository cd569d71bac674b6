"""Pictures through a tokenizer and back: error, structure, use of the codes, and whether scenes stay right.

    psnr    10 log10(255^2 / mean squared error) of each picture, in dB
    ssim    structural similarity (Wang et al. 2004): Gaussian windows of 11 x 11, of each channel
    usage   share of each level's book among the codes of the pictures; perplexity of the codes

Pictures are scenes, --images or --reference, cut and resized to the tokenizer's size: these are what
reconstructions are compared with, also by FID (then called rFID) and the other metrics of pictures. With
captions of scenes the checker reads originals and reconstructions.
"""

from typing import Any

import numpy as np

from dalle2_jax.evaluate.metric import Inputs, ModelMetric, entry, share_entry
from dalle2_jax.evaluate.metrics.scenes import load_checker, verdict_aspects
from dalle2_jax.evaluate.picture_sets import PictureSet, chosen, of_images, scene_pictures
from dalle2_jax.evaluate.reference import pictures_of
from dalle2_jax.generate.output import StageLines
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.generate.pipeline import Pipeline, Running
from dalle2_jax.runtime import grid, processes

GRID_PICTURES = 32
_RADIUS, _SIGMA, _K1, _K2 = 5, 1.5, 0.01, 0.03  # of SSIM


def psnr(images: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [N] in dB of pictures uint8 [N, H, W, 3]; 100 at most."""
    error = np.square(images.astype(np.float64) - true).mean(axis=(1, 2, 3))
    return np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-12)), 100.0)


def ssim(images: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Structural similarity [N] of pictures uint8 [N, H, W, 3] with sides of 11 or more."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    taps = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    taps /= taps.sum()

    def blurred(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            windows = np.lib.stride_tricks.sliding_window_view(x, len(taps), axis=axis)
            x = windows @ taps
        return x

    x, y = images.astype(np.float64), true.astype(np.float64)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(axis=(1, 2, 3))


def used_codes(drawn: np.ndarray, grids, num_codes) -> dict[str, dict]:
    """'level_L' -> share of the book that is used, perplexity and number of the codes int32 [N, L]."""
    found, start = {}, 0
    for level, ((height, width), size) in enumerate(zip(grids, num_codes, strict=True)):
        counts = np.bincount(drawn[:, start : start + height * width].ravel(), minlength=size)
        start += height * width
        p = counts[counts > 0] / counts.sum()
        perplexity = float(np.exp(-(p * np.log(p)).sum()))
        of_level = {"usage": float((counts > 0).mean()), "perplexity": perplexity}
        found[f"level_{level}"] = of_level | {"codes": int(counts.sum()), "book": size}
    return found


def measure(
    model: Pipeline, pictures: PictureSet, *, n: int = 128, seed: int = 0, batch_size: int | None = None
) -> tuple[dict, np.ndarray, np.ndarray, list[str]]:
    """(JSON values, reconstructions and originals uint8 [N, S, S, 3], captions) of at most `n` pictures.

    Raises ValueError for a model without a tokenizer.
    """
    steps = model.steps("reconstruct")
    stage = model.engine.stage("tokenizer")
    images, rows = chosen(pictures, np.arange(pictures.count), n, seed)
    true = np.stack([square_picture(image, stage.image_size) for image in images])

    def reconstruct(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        how = Running(batch_size=batch_size, progress=StageLines())
        found, _ = model.run(steps, {f"{steps[0].name}.image": true[numbers]}, {}, how)
        return found[f"{steps[-1].name}.image"], found[f"{steps[0].name}.codes"]

    made, drawn = processes.split_over_processes(reconstruct, len(true))
    texts = [pictures.texts[row] for row in rows] if pictures.texts else []
    found: dict[str, Any] = {
        name: entry(values.mean(), values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None)
        for name, values in (("psnr", psnr(made, true)), ("ssim", ssim(made, true)))
    }
    found |= {
        "n": len(true),
        "pictures": pictures.name,
        "codes": used_codes(drawn, stage.grids, stage.num_codes),
    }
    if pictures.kind == "scenes" and texts:
        check = load_checker()
        for name, some in (("correct", made), ("correct_originals", true)):
            verdicts = [check(image, text) for image, text in zip(some, texts, strict=True)]
            right = [bool(verdict_aspects(verdict)["correct"]) for verdict in verdicts]
            found[name] = share_entry(float(np.mean(right)), len(right))
    return found, made, true, texts


def table(found: dict) -> str:
    """The values of `measure` as lines of text."""
    lines = [f"{'reconstructions':26}{'value':>11}   {'95 %':24}{'N':>7}"]
    for name in ("psnr", "ssim", "correct", "correct_originals"):
        if name in found:
            low_high = found[name]["interval"]
            shown = "" if low_high is None else "{:.4g} .. {:.4g}".format(*low_high)
            lines.append(f"{name:26}{found[name]['value']:>11.4f}   {shown:24}{found['n']:>7}")
    for name, level in found["codes"].items():
        lines.append(
            f"{name:26}{level['usage']:>11.4f} of {level['book']} codes used among {level['codes']}, "
            f"perplexity {level['perplexity']:.1f}"
        )
    return "\n".join(lines)


def _pictures(inputs: Inputs) -> PictureSet:
    """The pictures to reconstruct: --images, those of --reference, or unseen scenes."""
    found = inputs.images or pictures_of(inputs.reference)
    return found or scene_pictures(*inputs.scenes, inputs.request.n, inputs.request.seed)


def _measure(inputs: Inputs) -> tuple[dict, str]:
    request = inputs.request
    how: dict[str, Any] = dict(n=request.n, seed=request.seed, batch_size=request.batch_size)
    found, made, true, texts = measure(inputs.model, _pictures(inputs), **how)
    inputs.drawn = of_images("reconstructions", made, texts)
    pairs = np.concatenate([true, made], axis=2)[:GRID_PICTURES]
    labels = texts[: len(pairs)] or [str(i) for i in range(len(pairs))]
    grid.save_png(inputs.out / "reconstruction_pairs.png", grid.labelled_grid(pairs, labels))
    return found, table(found)


def _compared(inputs: Inputs) -> tuple[list[str], PictureSet]:
    """(captions, or "" for each, the originals at the tokenizer's size)."""
    request, pictures = inputs.request, _pictures(inputs)
    images, rows = chosen(pictures, np.arange(pictures.count), request.n, request.seed)
    side = inputs.model.engine.stage("tokenizer").image_size
    texts = [pictures.texts[row] for row in rows] if pictures.texts else [""] * len(rows)
    originals = [square_picture(image, side) for image in images]
    return texts, of_images(f"originals of {pictures.name}", originals, texts if pictures.texts else ())


METRICS = {
    "reconstruction": ModelMetric(
        _measure, needs_tokenizer=True, reads_reference=True, compare_with=_compared
    )
}

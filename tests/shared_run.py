"""What several processes draw, edit and measure together, through the functions that the commands call.

python -m tests.shared_run MODEL INCEPTION OUT    writes OUT/I.npz, all that process I got; process 0 the rest
"""

import functools
import sys
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.convert import inception_weights
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import fidelity, picture_sets, prompts
from dalle2_jax.evaluate.metrics import edits, retrieval, zero_shot
from dalle2_jax.evaluate.networks import Networks
from dalle2_jax.evaluate.scenes import check
from dalle2_jax.runtime import partition, processes
from tests.tiny_model import CAPTIONS

CAPTION = CAPTIONS[0]


def numbers(tree) -> list[float]:
    """Every number of JSON values, in the order of their names."""
    if isinstance(tree, dict):
        return [n for name in sorted(tree) for n in numbers(tree[name])]
    if isinstance(tree, list):
        return [n for item in tree for n in numbers(item)]
    return [float(tree)] if isinstance(tree, int | float) else []


class Rows:
    """Counts the rows that this process ran of each stage since it was last asked."""

    def __init__(self):
        self._rows = {}

    def __call__(self, stage: str, done: int, total: int, seconds: float = 0.0) -> None:
        self._rows[stage] = total

    def taken(self, stage: str) -> int:
        return self._rows.pop(stage)


def draw(model: pipeline.UnCLIP) -> dict[str, np.ndarray]:
    """Pictures and latents; under 'rows/...' how many rows were this process's own."""
    rows = Rows()
    common = dict(seed=3, batch_size=2, progress=rows)
    found = {}

    def keep(name: str, result: pipeline.Result) -> None:
        for part in ("image_embeds", "base", "images"):
            found[f"{name}/{part}"] = getattr(result, part)
        found[f"rows/{name}"] = np.array([rows.taken("decoder"), rows.taken("upsampler32")])

    keep("one caption", model.text_to_image([CAPTION], n=5, **common))
    keep("captions", model.text_to_image([*CAPTIONS, CAPTION], n=2, **common))
    pictures = list(model.text_to_image(CAPTIONS, seed=4, batch_size=2).images)
    few = common | dict(num_steps=4)
    keep("variations", model.variations(pictures[0], n=3, **few))
    keep("begun as a picture", model.variations(pictures[0], n=3, strength=0.5, **few))
    keep("path", model.interpolate(pictures[0], CAPTION, frames=5, **few))
    keep("text diff", model.textdiff(pictures[0], CAPTIONS[1], CAPTION, frames=3, **few))
    box = np.zeros((32, 32), bool)
    box[:16] = True
    keep("repainted", model.inpaint(pictures[0], box, CAPTION, n=3, resample=2, **few))
    latents = model.invert(pictures, num_steps=4, batch_size=2, progress=rows)
    found |= {"latents/x_T": latents.x_T, "latents/z": latents.image_embeds}
    found["rows/inversion"] = np.array([rows.taken("inversion")])
    found["order"] = model.rank(pictures, CAPTION, batch_size=2)
    return found


def measure(model: pipeline.UnCLIP, weights: inception_weights.Weights, out: Path) -> dict[str, np.ndarray]:
    """Numbers, and the pictures that edits were judged by."""
    config, found, rows = scenes.preset("quickstart"), {}, Rows()
    judged, shown = edits.measure(model, config, check, n=3, progress=rows)
    found["edits"] = np.array(numbers(judged))
    for way, (images, _) in shown.items():
        found[f"edits/{way}"] = np.stack(images)
        found[f"rows/edits {way}"] = np.array([rows.taken(way)])
    unseen = retrieval.unseen_pictures(config, 32, n=7)
    found["retrieval"] = np.array(numbers(retrieval.measure(model, unseen)))
    unseen = zero_shot.unseen_pictures(config, 32, n=7)
    found["zero_shot"] = np.array(numbers(zero_shot.measure(model, *unseen)))
    suite = [{"prompt": text} for text in CAPTIONS]
    prompts.draw(model, suite, out / "prompts", n=2, batch_size=2)
    images = picture_sets.scene_pictures(config, 32, 7, 1)
    entries = fidelity.measure(
        images,
        picture_sets.scene_pictures(config, 32, 6, 2),
        ["fid_small", "precision_recall", "clip_mmd", "clip_score"],
        Networks(weights, clip=model, batch_size=2),
        stats_out=out / "stats.npz",
    )
    found["fidelity"] = np.array(numbers(entries))
    return found


def main(model: str, inception_file: str, out: str) -> None:
    partition.initialise()
    with processes.fail_together():
        processes.join()
        opened, folder = pipeline.UnCLIP.load(model), Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        measured = functools.partial(measure, opened, inception_weights.load(inception_file), folder)
        np.savez(folder / f"{jax.process_index()}.npz", **draw(opened), **measured())


if __name__ == "__main__":
    main(*sys.argv[1:])

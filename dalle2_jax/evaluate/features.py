"""Features of sets of pictures, on all devices; each picture is decoded once for all networks.

Several processes share the pictures; every process gets all features.

An extractor is a pair of functions of numpy arrays: prepare(picture) on the host, and run(list of prepared
pictures) -> features by name.
"""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.convert import inception_weights
from dalle2_jax.evaluate import inception
from dalle2_jax.evaluate.picture_sets import Item, PictureSet
from dalle2_jax.evaluate.presets import PRESETS
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.runtime import processes
from dalle2_jax.runtime.batch import as_floats
from dalle2_jax.runtime.batched import Batched

BATCH_SIZE = 32
Extractor = tuple[Callable[[np.ndarray], np.ndarray], Callable[[list], dict[str, np.ndarray]]]


def inception_extractor(
    weights: inception_weights.Weights, preset: str, batch_size: int, mesh=None
) -> Extractor:
    """The extractor of FID's Inception; `preset` is a name in PRESETS."""
    compiled = Batched(inception.features, weights.params, batch_size, mesh)
    square, rule = PRESETS[preset].square, PRESETS[preset].rule
    return lambda picture: inception.prepare(square(picture), rule), lambda batch: compiled(np.stack(batch))


def clip_extractor(model: pipeline.Pipeline, batch_size: int) -> Extractor:
    """The extractor of a model's CLIP, which prepares pictures as `UnCLIP.encode_image` does."""
    size = model.engine.stage("clip").image_size

    def run(prepared: list) -> dict[str, np.ndarray]:
        padded = prepared + prepared[-1:] * (batch_size - len(prepared))  # one program for all batches
        return {"clip": model.encode_image(np.stack(padded), batch_size)[: len(prepared)]}

    return lambda picture: square_picture(picture, size, halve=False), run


def classifier_extractor(model: pipeline.Pipeline, batch_size: int) -> Extractor:
    """The extractor of a model's classifier, log p of each class; pictures are cut as in its training."""
    stage = model.engine.stage("classifier")

    def classify(params, batch):
        return {"classes": stage.classify(params, batch["image"])}

    compiled = Batched(classify, model.engine.params("classifier"), batch_size, prepare=as_floats)

    def run(prepared: list) -> dict[str, np.ndarray]:
        return compiled({"image": np.stack(prepared)})

    return lambda picture: square_picture(picture, stage.image_size), run


def extract(
    pictures: PictureSet,
    extractors: Sequence[Extractor],
    wanted: Iterable[str],
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """The `wanted` features [N, D] float32 of all pictures, by name.

    Threads decode and resize pictures while the devices compute. Raises ValueError for an unreadable picture.
    """
    wanted = frozenset(wanted)

    def prepare(item: Item) -> list[np.ndarray]:
        picture = item.picture()
        return [before(picture) for before, _ in extractors]

    def extract_share(rows: np.ndarray) -> dict[str, np.ndarray]:
        first, last = int(rows[0]), int(rows[-1]) + 1
        items, done = itertools.islice(pictures.items(), first, last), 0
        found: dict[str, list[np.ndarray]] = {}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def submit_batch() -> list[concurrent.futures.Future]:
                return [pool.submit(prepare, item) for item in itertools.islice(items, batch_size)]

            waiting = submit_batch()
            while waiting:
                following = submit_batch()
                prepared = [future.result() for future in waiting]
                for (_, run), column in zip(extractors, zip(*prepared, strict=True), strict=True):
                    for name, value in run(list(column)).items():
                        if name in wanted:
                            found.setdefault(name, []).append(np.asarray(value, np.float32))
                done, waiting = done + len(prepared), following
                if progress is not None:
                    progress(done, last - first)
        if done != last - first:
            raise ValueError(f"{pictures.name} gave {first + done} of {pictures.count} pictures")
        return {name: np.concatenate(parts)[rows - first] for name, parts in found.items()}

    return processes.split_over_processes(extract_share, pictures.count)

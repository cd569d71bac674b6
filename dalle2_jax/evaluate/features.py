"""Features of sets of pictures: each is decoded once, whatever networks read it, on all devices.

Of several processes each reads its share of the pictures; every one gets all features.

An extractor is (what a picture becomes on the host, features of a list of what became): numpy in, numpy out.
"""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.convert import inception_weights
from dalle2_jax.evaluate import inception
from dalle2_jax.evaluate.picture_sets import Item, PictureSet
from dalle2_jax.evaluate.presets import PRESETS
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.runtime import partition, processes

BATCH_SIZE = 32


class Batches:
    """A compiled function of micro-batches of one size that are split over the devices."""

    def __init__(self, function: Callable, params, batch_size: int = BATCH_SIZE, mesh=None):
        self._mesh = partition.local_mesh() if mesh is None else mesh
        shards = partition.batch_shards(self._mesh)
        self.size = -(-batch_size // shards) * shards
        self._params = jax.device_put(params, partition.replicated(self._mesh))
        self._function = jax.jit(function, out_shardings=partition.batch_sharding(self._mesh))

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of up to `size` rows; copies of the last fill the batch and are cut off again."""
        whole = rows[np.minimum(np.arange(self.size), len(rows) - 1)]
        with partition.use_mesh(self._mesh):
            outputs = self._function(self._params, partition.to_global({"x": whole}, self._mesh)["x"])
        return {name: value[: len(rows)] for name, value in partition.to_host(outputs).items()}


Extractor = tuple[Callable[[np.ndarray], np.ndarray], Callable[[list], dict[str, np.ndarray]]]


def inception_extractor(
    weights: inception_weights.Weights, preset: str, batch_size: int, mesh=None
) -> Extractor:
    """(what a picture becomes on the host, features of a list of these)."""
    batches = Batches(inception.features, weights.params, batch_size, mesh)
    chosen = PRESETS[preset]

    def run(prepared: list) -> dict[str, np.ndarray]:
        parts = [batches(np.stack(part)) for part in _batched(prepared, batches.size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return lambda picture: inception.prepare(chosen.square(picture), chosen.rule), run


def clip_extractor(model: pipeline.UnCLIP, batch_size: int) -> Extractor:
    """The same of a model's CLIP, which has its own way with pictures, see `UnCLIP.encode_image`."""
    size = model.engine.stage("clip").image_size

    def run(prepared: list) -> dict[str, np.ndarray]:
        whole = prepared + prepared[-1:] * (batch_size - len(prepared))  # one program for all batches
        return {"clip": model.encode_image(np.stack(whole), batch_size)[: len(prepared)]}

    return lambda picture: square_picture(picture, size, halve=False), run


def _batched(rows: Iterable, size: int):
    """Lists of `size` rows; the last may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def extract(
    pictures: PictureSet,
    extractors: Sequence[Extractor],
    wanted: Iterable[str],
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> dict[str, np.ndarray]:
    """Features [N, D] float32 by name, those `wanted`, of all pictures, each decoded once.

    Pictures are decoded and resized in threads while the devices compute. Raises ValueError for one that
    cannot be read.
    """
    wanted = set(wanted)

    def prepare(item: Item) -> list[np.ndarray]:
        picture = item.picture()
        return [before(picture) for before, _ in extractors]

    def own(rows: np.ndarray) -> dict[str, np.ndarray]:
        first, last = int(rows[0]), int(rows[-1]) + 1
        found: dict[str, list] = {}
        done = 0
        with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            batches = _batched(itertools.islice(pictures.items(), first, last), batch_size)
            waiting = [pool.submit(prepare, item) for item in next(batches, ())]
            while waiting:
                following = [pool.submit(prepare, item) for item in next(batches, ())]
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

    return processes.in_shares(own, pictures.count)

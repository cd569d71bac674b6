"""The loss of every stage at fixed times with fixed noise, on unseen scenes or --images.

Pictures, times, noise and windows are the same in every run and nothing is sampled, so this is the cheapest
number to compare two checkpoints of one recipe by. The parameters are those of the model directory (averages,
if training made it). The times of a batch are spread evenly over the schedule. Low-resolution inputs of an
upsampler are not degraded. CLIP's contrastive loss depends on the batch size, which is reported.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from dalle2_jax.evaluate.metric import Inputs, ModelMetric, entry
from dalle2_jax.evaluate.picture_sets import PassLines, PictureSet, chosen, scene_pictures
from dalle2_jax.evaluate.stage_examples import StageExamples
from dalle2_jax.generate.engine import Engine
from dalle2_jax.runtime import partition, processes


def measure(
    model: Engine,
    pictures: PictureSet,
    *,
    n: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict]:
    """Stage -> {'value', 'standard_error', 'interval', 'n', 'batch_size', 'scalars'}.

    Measured on at most `n` of the captioned `pictures`, drawn at random by `seed`, in full batches; several
    processes share the batches. Standard error and 95 % interval are those over batches; `scalars` are the
    parts of the loss.

    Raises ValueError for fewer than two batches of pictures and for pictures without captions.
    """
    captions = pictures.captions()
    mesh = partition.local_mesh()
    shards = partition.batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    count = min(n, len(captions)) // batch_size * batch_size
    if count < 2 * batch_size:
        few = f"the loss of {min(n, len(captions))} pictures is not 2 batches of {batch_size}"
        raise ValueError(f"{few}: give a larger --n or a smaller --batch_size")
    losses = {name: stage for name, stage in model.stages.items() if hasattr(stage, "loss")}
    readers = [name for name, stage in losses.items() if "clip" in model.system.uses(stage)]
    if readers and "clip" not in model.stages:
        raise ValueError(f"the loss of {', '.join(readers)} needs a CLIP, and model {model.name!r} has none")
    images, rows = chosen(pictures, np.arange(len(captions)), count, seed)
    texts = [captions[row] for row in rows]
    found = {}
    for name, stage in model.stages.items():
        if not hasattr(stage, "loss") or getattr(stage, "vision", True) is None:
            continue  # no loss, such as the text tower of a CLIP

        def batches(numbers: np.ndarray, name: str = name) -> dict[str, np.ndarray]:
            parts = []
            for scalars in _of_stage(model, name, images, texts, batch_size, numbers, seed, mesh):
                parts.append({key: float(value) for key, value in scalars.items()})
                if progress is not None:
                    progress(name, len(parts) * batch_size, len(numbers) * batch_size)
            return {key: np.array([part[key] for part in parts]) for key in sorted(parts[0])}

        scalars = processes.split_over_processes(batches, count // batch_size)
        values = scalars["loss"]
        value, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
        means = {key: float(column.mean()) for key, column in scalars.items()}
        found[name] = entry(value, error, n=count, batch_size=batch_size, scalars=means)
        found[name]["pictures"] = pictures.name
    return found


def _of_stage(model: Engine, name: str, images, captions, batch_size: int, numbers, seed: int, mesh):
    """Yields the scalars of a stage's loss for each batch of these numbers."""
    stage, examples = model.stage(name), StageExamples(model, name)
    frozen_params = {called: model.params(used) for called, used in examples.uses.items()}

    @functools.partial(jax.jit, compiler_options=partition.compiler_options())
    def loss(params, frozen_params, number, batch):
        batch = examples.frozen.encode_batch(frozen_params, batch)
        key = jax.random.fold_in(jax.random.key(seed), number)
        loss = stage.loss(params, key, batch, train=False)
        return {"loss": loss.value} | loss.scalars

    for start in (int(number) * batch_size for number in numbers):
        part = slice(start, start + batch_size)
        batch = examples.make(images[part], captions[part], seed, start)
        with partition.use_mesh(mesh):
            number = np.uint32(start // batch_size)
            on_devices = partition.on_devices(batch, mesh)
            yield jax.device_get(loss(model.params(name), frozen_params, number, on_devices))


def table(losses: dict[str, dict]) -> str:
    """The losses as lines of text."""
    lines = [f"{'validation loss':26}{'value':>11}   {'95 %':24}{'N':>7}"]
    for name, loss in losses.items():
        shown = "{:.4g} .. {:.4g}".format(*loss["interval"])
        lines.append(f"{name:26}{loss['value']:>11.5f}   {shown:24}{loss['n']:>7}")
    return "\n".join(lines)


def _measure(inputs: Inputs) -> tuple[dict, str]:
    request = inputs.request
    pictures = inputs.images or scene_pictures(*inputs.scenes, request.n, request.seed)
    size = dict(batch_size=request.batch_size) if request.batch_size else {}
    progress = PassLines("pictures through its loss")
    found = measure(inputs.model.engine, pictures, n=request.n, seed=request.seed, progress=progress, **size)
    return found, table(found)


METRICS = {"loss": ModelMetric(_measure)}

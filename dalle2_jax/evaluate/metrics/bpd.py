"""Bits per dimension: how well the base stage of a diffusion model compresses held-out pictures.

The number is the variational bound on -log2 p(picture) of `models.diffusion.likelihood`, divided by the
number of values of a picture (Ho et al. 2020, section 4.3). It has three terms:

    prior         how far the noised picture is from pure noise
    transitions   the sum over all steps but the last
    decoder       the last step, over the 256 levels of every value

A conditional model's pictures are coded given their own captions, classes or CLIP image embeddings, without
guidance. A walk of fewer steps has a looser bound; numbers of different `num_steps` cannot be compared.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.evaluate.metric import Inputs, ModelMetric, entry
from dalle2_jax.evaluate.picture_sets import PictureSet, chosen, scene_pictures
from dalle2_jax.evaluate.reference import pictures_of
from dalle2_jax.evaluate.stage_examples import StageExamples
from dalle2_jax.generate.engine import Engine, Task
from dalle2_jax.generate.output import StageLines
from dalle2_jax.generate.tasks import picture_keys
from dalle2_jax.runtime.batch import as_floats

STAGE = "decoder"  # the base stage of every diffusion system
BATCH_SIZE = 32
TRAINING_SCENES = 512  # for `histogram_bits`


def bits_of(
    model: Engine,
    batch: dict[str, np.ndarray],
    examples: StageExamples,
    *,
    seed: int = 0,
    num_steps: int = 0,
    batch_size: int | None = None,
    progress: Callable | None = None,
) -> dict[str, np.ndarray]:
    """'bpd', 'prior', 'transitions', 'decoder' [N] float32 of the pictures of a batch of `examples`.

    batch: also has `number` [N], which with the seed fixes the noise of a picture. num_steps: 0: all.
    """
    stage, others = model.stage(STAGE), tuple(examples.uses.values())

    def function(params, batch, scalars):
        params = params if others else {STAGE: params}
        keys = picture_keys(scalars["seed"], batch["number"], 0)
        fields = as_floats({name: x for name, x in batch.items() if name != "number"})
        frozen = {called: params[name] for called, name in examples.uses.items()}
        fields = examples.frozen.encode_batch(frozen, fields)
        found = stage.bits_per_dim(params[STAGE], keys, fields, num_steps or None)
        terms = {"transitions": found["terms"][:-1].sum(axis=0), "decoder": found["terms"][-1]}
        return {name: x.astype(jnp.float32) for name, x in (found | terms).items() if x.ndim == 1}

    specs = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    steps = num_steps or stage.diffusion.schedule.num_timesteps
    task = Task(STAGE, function, ("bpd", steps), specs, {"seed": np.uint32(seed)}, steps, "bpd", others)
    return model.run(task, batch, batch_size=batch_size or BATCH_SIZE, progress=progress)[0]


def histogram_bits(training: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Bits per dimension [N] of `pictures` uint8 [N, H, W, C] by one histogram for each channel.

    The histograms count the values of `training` uint8 [M, h, w, C], each of the 256 once more.
    """
    channels = range(training.shape[-1])
    counts = np.stack([np.bincount(training[..., c].ravel(), minlength=256) for c in channels]) + 1.0
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    coded = np.stack([bits[c][pictures[..., c]] for c in channels], axis=-1)
    return coded.reshape(len(pictures), -1).mean(axis=1)


def measure(
    model: Engine,
    pictures: PictureSet,
    training: PictureSet | None = None,
    *,
    n: int = 128,
    num_steps: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable | None = None,
) -> dict:
    """The entry of bits per dimension of at most `n` of `pictures`, drawn at random by `seed`.

    Beside value, standard error and interval it has 'terms', 'n', 'num_steps', 'num_timesteps', 'pictures'
    and, with `training` pictures, 'pixel_histogram': the entry of `histogram_bits`, a baseline.

    num_steps: of the bound, evenly spaced; 0: all.

    Raises ValueError for a model without a diffusion decoder, fewer than two pictures, and pictures without
    the captions or classes that the decoder reads.
    """
    stage = model.stage(STAGE)
    if not hasattr(stage, "bits_per_dim"):
        kind = model.configs[STAGE]["stage"]
        raise ValueError(f"bpd needs a {STAGE} that draws by Gaussian diffusion: this one is a {kind!r}")
    timesteps = stage.diffusion.schedule.num_timesteps
    if not 0 <= num_steps <= timesteps:
        raise ValueError(f"bpd_steps {num_steps} must be between 0, for all, and num_timesteps = {timesteps}")
    examples = StageExamples(model, STAGE)
    texts = pictures.captions() if examples.reads_captions else ()
    images, rows = chosen(pictures, np.arange(pictures.count), n, seed)
    if len(rows) < 2:
        raise ValueError(f"bpd needs two pictures or more: {pictures.name} has {pictures.count}")
    batch = examples.make(images, [texts[row] for row in rows] if texts else (), seed)
    if "label" in batch and (batch["label"] < 0).any():
        row = rows[int(np.argmax(batch["label"] < 0))]
        raise ValueError(
            f"the {STAGE} draws classes, and caption {texts[row]!r} does not name exactly one of data.classes"
        )
    batch["number"] = rows.astype(np.uint32)
    how: dict[str, Any] = dict(seed=seed, num_steps=num_steps, batch_size=batch_size, progress=progress)
    bits = bits_of(model, batch, examples, **how)
    found = _entry(bits["bpd"], num_steps=num_steps or timesteps, num_timesteps=timesteps)
    found["terms"] = {name: float(bits[name].mean()) for name in ("prior", "transitions", "decoder")}
    found["pictures"] = pictures.name
    if training is not None:
        seen = examples.make([item.picture() for item in training.items()], training.texts, seed)
        found["pixel_histogram"] = _entry(
            histogram_bits(seen["image"], batch["image"]), training_pictures=training.count
        )
    return found


def _entry(bits: np.ndarray, **more) -> dict:
    """The entry of a mean over pictures."""
    bits = np.asarray(bits, np.float64)
    error = bits.std(ddof=1) / np.sqrt(len(bits))
    return entry(bits.mean(), error, at_least=0.0, n=len(bits), **more)


def table(found: dict) -> str:
    """The entry of `measure` as lines of text."""
    steps, terms = f"{found['num_steps']} of {found['num_timesteps']} steps", found["terms"]
    lines = [f"{'bits per dimension':26}{'value':>11}   {'95 %':24}{'N':>7}"]
    for name, one in ((f"{STAGE}, {steps}", found), ("pixel histogram", found.get("pixel_histogram"))):
        if one:
            shown = "{:.4g} .. {:.4g}".format(*one["interval"])
            lines.append(f"{name:26}{one['value']:>11.5f}   {shown:24}{one['n']:>7}")
    lines.append("  " + ", ".join(f"{name} {value:.5f}" for name, value in terms.items()))
    return "\n".join(lines)


def _measure(inputs: Inputs) -> tuple[dict, str]:
    request, training = inputs.request, None
    pictures = inputs.images or (pictures_of(inputs.reference) if request.reference else None)
    if pictures is None and request.reference:
        raise ValueError(f"{request.reference} holds statistics, and bpd reads pictures: give --images=SRC")
    if pictures is None:
        of_split = functools.partial(scene_pictures, *inputs.scenes, seed=request.seed)
        pictures = of_split(count=request.n, splits=("validation",))
        training = of_split(count=TRAINING_SCENES, splits=("train",))
    how: dict[str, Any] = dict(n=request.n, num_steps=request.bpd_steps, batch_size=request.batch_size)
    found = measure(inputs.model.engine, pictures, training, seed=request.seed, progress=StageLines(), **how)
    return found, table(found)


METRICS = {"bpd": ModelMetric(_measure, reads_reference=True)}

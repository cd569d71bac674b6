"""Validation during training: the loss on fixed batches, and samples for fixed captions: those of the first
validation records, or `sample_captions`. The image embeddings of the latter are those of `sample_prior`.

All processes run the sampler; process 0 alone makes the labels and the grid. A failure there is a warning,
and training goes on.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dalle2_jax.models import models
from dalle2_jax.models.frozen import Frozen
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.batch import field, stills
from dalle2_jax.runtime.grid import labelled_grid
from dalle2_jax.train.plan import Plan


class Validation:
    """Validation loss at fixed timesteps with fixed noise, and samples for fixed captions, both from the
    average."""

    def __init__(self, plan: Plan, dataset):
        config, mesh, stage, encoders = plan.config, plan.mesh, plan.stage, plan.frozen
        shows = next((do for do in ("sample", "reconstruct") if hasattr(stage, do)), None)
        self._draws = stage.ops[shows].writes[0] if shows else None
        batches = dataset.batches(config["batch_size"], **partition.host_slice(mesh))
        raw = [next(batches) for _ in range(config["eval_batches"])]
        self._batches = [partition.on_devices(batch, mesh) for batch in raw]
        captions = list(config.get("sample_captions", ()))[: config["batch_size"]]
        count = len(captions) or min(config["num_samples"], config["batch_size"])
        self._count, self._dataset = count, dataset
        self._labels: list[str] | None = captions or None
        # drawn without conditions, a picture has nothing to do with its record's caption
        self._unconditional = shows == "sample" and not getattr(stage, "conditional", True)
        self._sampled = self._batches[0]
        by_prior = captions and "image_embed" in stage.batch_spec(1)
        prior = Prior.load(config["sample_prior"], plan) if by_prior else None
        self._prior_params = prior.params if prior else {}
        if captions:
            self._sampled = partition.on_devices(_captioned(raw[0], captions, dataset, config, mesh), mesh)
        self._warned: set[type] = set()
        self._indices = partition.gather_index(raw[0]["index"], mesh)[:count]

        @functools.partial(jax.jit, compiler_options=partition.compiler_options())
        def evaluate(params, frozen, batch, step):
            batch, params = encoders.encode_batch(frozen, batch), encoders.whole(params, frozen)
            keywords = encoders.loss_keywords(frozen)
            return stage.loss(params, jax.random.key(0), batch, step=step, train=False, **keywords).scalars

        @functools.partial(jax.jit, compiler_options=partition.compiler_options())
        def sample(params, frozen, prior_params, batch):
            batch = {name: value[:count] for name, value in batch.items()}
            if prior:
                keys = jax.random.split(jax.random.fold_in(jax.random.key(config["seed"]), 1), count)
                batch["image_embed"] = prior.sample(prior_params, frozen, keys, batch)
            batch, params = encoders.encode_batch(frozen, batch), encoders.whole(params, frozen)
            keys = jax.random.split(jax.random.key(config["seed"]), count)
            if shows == "sample":
                drawn = stage.sample(params, keys, batch)
            else:  # beside the original
                drawn = jnp.concatenate([batch["image"], stage.reconstruct(params, batch["image"])], axis=2)
            return dict([encoders.decoded(frozen, self._draws, drawn)]), batch

        self._evaluate, self._sample = evaluate, sample

    def losses(self, params, frozen, step: int) -> dict:
        """Mean of the stage's scalars over the fixed validation batches; `step` are the steps taken."""
        taken = np.int32(step)
        results = [partition.to_host(self._evaluate(params, frozen, x, taken)) for x in self._batches]
        return {f"eval/{name}": float(np.mean([r[name] for r in results])) for name in results[0]}

    def samples(self, params, frozen, writer, step) -> None:
        """What the stage draws (the field that its `sample` writes) or reconstructs, codes as the picture
        that a frozen stage decodes: of images and videos a labelled grid, of an embedding the cosine to the
        true one, of other kinds nothing.

        Raises what the sampler raises, and OSError where the grid cannot be written (a full disk).
        """
        if self._draws is None or not self._count:
            return
        made, batch = partition.to_host(self._sample(params, frozen, self._prior_params, self._sampled))
        ((name, drawn),) = made.items()
        images = stills(name, drawn)
        if images is not None:
            made = self._labelled(images) if jax.process_index() == 0 else None
            if made is not None:
                writer.grid(step, "samples", *made)
        elif field(name).kind == "embedding":
            true = batch[name]
            cosine = (drawn * true).sum(-1) / np.linalg.norm(drawn, axis=-1) / np.linalg.norm(true, axis=-1)
            writer.scalars(step, {"eval/sample_cosine": float(cosine.mean())})

    def _labelled(self, images: np.ndarray) -> tuple[np.ndarray, list[str] | None] | None:
        """(grid, its labels, if it has some) of the samples; None where that fails, with a warning for each
        kind of error."""
        try:
            if self._unconditional:
                return labelled_grid(images), None
            if self._labels is None:
                self._labels = self._dataset.labels(self._indices)
            return labelled_grid(images, self._labels), self._labels
        except Exception as error:
            if type(error) not in self._warned:
                self._warned.add(type(error))
                logging.warning(
                    "no grid of samples could be made (%s: %s); training goes on without, and says this once",
                    type(error).__name__,
                    error,
                )
            return None


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """The prior of `sample_prior`: draws the image embeddings of captions.

    Attributes:
      encoders: what CLIP computes for the prior. params: of the prior, on the devices.
    """

    encoders: Frozen
    params: dict

    @staticmethod
    def load(path: str, plan: Plan) -> "Prior":
        """Reads it from a workdir or a model directory; raises what `models.load_stage` does."""
        stage, _, params = models.load_stage(path, "prior", keep_dtype=True)
        encoders = Frozen(stage, {"clip": plan.frozen_stages["clip"]})
        return Prior(encoders, jax.device_put(params, partition.shardings(params, plan.mesh)))

    def sample(self, params: dict, frozen: dict, keys: jax.Array, batch: dict) -> jax.Array:
        """Image embeddings [B, E] of a batch's captions; frozen: parameters of the frozen CLIP."""
        stage = self.encoders.stage
        tokens, mask = models.crop_tokens(batch["tokens"], batch["token_mask"], stage.context_length)
        unread = jax.numpy.zeros((len(keys), stage.embed_dim))  # else CLIP would encode the records' pictures
        read = dict(tokens=tokens, token_mask=mask, image_embed=unread)
        return stage.sample(params, keys, self.encoders.encode_batch(frozen, read))


def _captioned(batch: dict, captions: list[str], dataset, config: dict, mesh) -> dict:
    """This host's part of a batch with these captions, in turn, in place of its own. Raises ValueError for a
    caption that names no class, where the stage reads classes."""
    from dalle2_jax.data import pipeline

    places = partition.host_slice(mesh)
    size = config["batch_size"] // places["num_parts"]
    slots = [slot for part in places["parts"] for slot in range(part * size, (part + 1) * size)]
    stored = {name for name in batch if field(name).kind in ("embedding", "states")}
    if config.get("sample_prior"):
        stored.discard("image_embed")  # the prior draws another one
    if stored:
        raise ValueError(
            f"sample_captions: the data bring {', '.join(sorted(stored))} of other captions; leave them out"
        )
    found, written = dict(batch), [captions[slot % len(captions)] for slot in slots]
    if "tokens" in batch:
        found["tokens"], found["token_mask"] = dataset.settings.tokenizer(written)
    if "label" in batch:
        labels = [pipeline.label_of(caption, dataset.classes) for caption in written]
        if -1 in labels:
            unknown, shown = written[labels.index(-1)], ", ".join(dataset.classes[:20])
            raise ValueError(f"sample_captions: {unknown!r} names none, or several, of the classes {shown}")
        found["label"] = np.array(labels, np.int32)
    return found

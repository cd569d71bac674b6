"""What a stage has beside its trained weights: statistics that are fitted to the data before training, or
measured on the trained network after it; the frozen CLIP's null caption."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dalle2_jax.models import models, null_caption
from dalle2_jax.runtime import modeldir, partition
from dalle2_jax.train.plan import Plan
from dalle2_jax.train.step import TrainState

MEASURE_ROWS = 1024  # examples over which a trained stage measures itself


def fit(plan: Plan, params: dict, frozen: dict, dataset) -> dict:
    """`params` with the statistics that the stage fits to the embeddings of the first training batches."""
    encode, batch_size = jax.jit(plan.frozen.encode_batch), plan.config["batch_size"]

    def batches():
        stream = dataset.batches(batch_size, **partition.host_slice(plan.mesh))
        for _ in range(-(-plan.stage.fit_rows // batch_size)):
            batch = encode(frozen, partition.on_devices(next(stream), plan.mesh))
            yield {n: partition.to_host(x) for n, x in batch.items() if n in ("image_embed", "text_embed")}

    params, scalars = plan.stage.fit(params, batches)
    logging.info(
        "fitted to the data: %s", ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
    )
    return params


def with_null_caption(plan: Plan, params: dict, frozen: dict, tokenizer) -> dict:
    """`params` with the null caption "" as the frozen CLIP encodes it; see `models.null_caption`.

    Raises ValueError if "" has another number of tokens than `model.text.null_tokens`.
    """
    stage, leaves = plan.stage, null_caption.LEAVES[plan.config["stage"]]
    made = null_caption.encode(plan.frozen_stages["clip"], frozen["clip"], tokenizer)
    embed, states = partition.to_host(made)
    count = len(states)
    if count != stage.null_tokens:
        raise ValueError(
            f"model.text.null_tokens is {stage.null_tokens}, but the caption '' has {count} tokens: "
            f"give {count}"
        )
    scale = stage.net.embed_scale if plan.config["stage"] == "decoder" else stage.embed_scale.factor
    values = dict(zip(leaves, (scale * embed, states), strict=True))
    return modeldir.unflatten(modeldir.flatten(params) | values)


def make_measure(plan: Plan, dataset, frozen: dict) -> Callable[[TrainState], TrainState]:
    """Returns measure(state): the state with the statistics of its averaged network on training data.

    They are the mean over the first MEASURE_ROWS examples of the run.
    """
    stage, config, mesh = plan.stage, plan.config, plan.mesh
    example = models.zeros(stage.batch_spec(1))
    if not hasattr(stage, "measure") or not jax.eval_shape(
        stage.measure, models.abstract_params(stage), jax.random.key(0), example
    ):
        return lambda state: state

    @jax.jit
    def compiled(params, frozen, key, batch):
        batch = plan.frozen.encode_batch(frozen, batch)
        return stage.measure(plan.frozen.whole(params, frozen), key, batch)

    def measure(state: TrainState) -> TrainState:
        batches = dataset.batches(config["batch_size"], **partition.host_slice(mesh))
        parts = []
        for i in range(-(-MEASURE_ROWS // config["batch_size"])):
            key = jax.random.fold_in(jax.random.key(config["seed"]), i)
            batch = partition.on_devices(next(batches), mesh)
            parts.append(partition.to_host(compiled(state.ema_params, frozen, key, batch)))
        values = jax.tree.map(lambda *x: np.mean(x, axis=0, dtype=np.float64).astype(np.float32), *parts)
        values = jax.device_put(values, partition.replicated(mesh))

        def updated(params):
            return params | {"stats": params["stats"] | jax.tree.map(jnp.copy, values)}

        return dataclasses.replace(state, params=updated(state.params), ema_params=updated(state.ema_params))

    return measure

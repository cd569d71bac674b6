"""Statistics that a stage has beside its weights: fitted to the data before training, measured on the trained
network after it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dalle2_jax.models import models
from dalle2_jax.runtime import partition
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

        return state.replace(params=updated(state.params), ema_params=updated(state.ema_params))

    return measure

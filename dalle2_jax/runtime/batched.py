"""A compiled function of any number of examples, run in micro-batches that are split over the devices."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.runtime import partition


def micro_batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Yields the example numbers of each micro-batch, int64 [size]; the last number fills the last one."""
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


class Batched:
    """A function of a batch, compiled once.

    Args:
      function: (params, batch) -> a tree of arrays [size, ...]. A batch is a tree of arrays [size, ...].
      batch_size: examples of a micro-batch, rounded up to `size`, a multiple of the mesh's batch shards.
      mesh: None: the devices of this process.
      prepare: applied to each batch on the devices, outside of the compiled program.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        params: Any,
        batch_size: int,
        mesh: Mesh | None = None,
        *,
        prepare: Callable[[Any], Any] = lambda batch: batch,
        compiler_options: dict | None = None,
    ):
        self._mesh = partition.local_mesh() if mesh is None else mesh
        shards = partition.batch_shards(self._mesh)
        self.size = -(-batch_size // shards) * shards
        self.params = jax.device_put(params, partition.replicated(self._mesh))
        self._split, self._prepare = partition.batch_sharding(self._mesh), prepare
        self._function = jax.jit(function, out_shardings=self._split, compiler_options=compiler_options)

    def __call__(self, examples: Any) -> Any:
        """The function's outputs, numpy [n, ...], for a tree of numpy arrays [n, ...]."""
        count, parts = len(jax.tree.leaves(examples)[0]), []
        with partition.use_mesh(self._mesh):
            for rows in micro_batches(count, self.size):
                chosen = jax.tree.map(lambda x, rows=rows: x[rows], examples)
                batch = self._prepare(jax.device_put(chosen, self._split))
                parts.append(partition.to_host(self._function(self.params, batch)))
        return jax.tree.map(lambda *outputs: np.concatenate(outputs)[:count], *parts)

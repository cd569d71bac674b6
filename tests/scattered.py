"""A batch of two processes whose devices alternate in the mesh: `python -m tests.scattered`, each of them."""

import jax
import numpy as np

from dalle2_jax.runtime import partition, processes

if __name__ == "__main__":
    processes.join()
    own, others = ([d for d in jax.devices() if d.process_index == process] for process in (0, 1))
    alternating = [device for pair in zip(own, others, strict=True) for device in pair]
    mesh = partition.make_mesh(1, -1, 1, devices=alternating)
    mine, batch = partition.host_slice(mesh), np.arange(24).reshape(8, 3)
    rows = np.isin(np.arange(8) // (8 // mine["num_parts"]), mine["parts"])
    found = partition.to_global({"x": batch[rows]}, mesh)["x"]
    np.testing.assert_array_equal(partition.to_host(found), batch)
    np.testing.assert_array_equal(partition.gather_index(batch[rows, 0], mesh), batch[:, 0])
    print(f"parts {mine['parts']}: the batch is whole", flush=True)

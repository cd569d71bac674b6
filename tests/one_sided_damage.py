"""Damage that one of two processes sees: `python -m tests.one_sided_damage WORKDIR`, each of them.

Each holds half of the one leaf. They save steps 1 and 2, spoil the second's half of step 2, and restore.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np

from dalle2_jax.runtime import checkpoint, partition, processes

WHOLE = np.arange(2.0**14, dtype=np.float32).reshape(256, 64)  # what is small is not in files of its own

if __name__ == "__main__":
    workdir = Path(sys.argv[1])
    processes.join()
    halves = partition.shardings({"kernel": WHOLE}, partition.make_mesh(1, 2))["kernel"]
    saver = checkpoint.Checkpointer(workdir)
    for step in (1, 2):
        kernel = jax.make_array_from_callback(
            WHOLE.shape, halves, lambda index, step=step: WHOLE[index] + step
        )
        saver.save(step, {"kernel": kernel}, {"at": step})
    saver.wait()
    if processes.is_first():
        spoilt = list((workdir / "checkpoints" / "2" / "state" / "ocdbt.process_1" / "d").iterdir())
        assert spoilt
        for path in spoilt:
            os.truncate(path, path.stat().st_size // 2)
    processes.sync("spoilt")
    abstract = {"kernel": jax.ShapeDtypeStruct(WHOLE.shape, WHOLE.dtype, sharding=halves)}
    step, state, meta = saver.restore_newest(abstract)
    assert meta == {"at": step}
    (half,) = state["kernel"].addressable_shards
    assert half.data.shape == (128, 64)
    np.testing.assert_array_equal(half.data, WHOLE[half.index] + step)
    print(f"restored step {step}", flush=True)
    processes.sync("done")

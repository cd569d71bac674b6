"""Every test sees 8 CPU devices and a cache of compiled programs; both must be set before JAX starts.

Most of the suite's time goes to XLA, which compiles thousands of programs that run for milliseconds. So LLVM
optimises them less, and those of training and sampling, which run for a few steps here, not at all. XLA's own
passes are as ever.
"""

import functools
import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the tests' numbers are those of a CPU
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1"  # also of the processes that tests start
# Hundreds of programs are compiled in each process: what that leaves behind goes back to the system.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.perturb=0")  # glibc's default; see partition.make_mesh

import jax  # noqa: E402 (after the platform is chosen)
import pytest  # noqa: E402

from dalle2_jax.runtime import partition, programs  # noqa: E402

partition.initialise(cpu_devices=8)
programs.KEEP = False  # tests replace functions of the package

_compiler_options = partition.compiler_options


@functools.wraps(_compiler_options)
def _of_few_steps(once=False, mesh=None):
    cpu = all(device.platform == "cpu" for device in ([] if mesh is None else mesh.devices.flat))
    return _compiler_options(once=once or cpu, mesh=mesh)


partition.compiler_options = _of_few_steps  # in this process; those that tests start have the product's own


def pytest_collection_finish():
    """What has been imported stays, and is not looked through for garbage again; nor is it often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module")
def one_device():
    """A mesh of all devices is one of the first alone, in modules whose subject is not the mesh.

    Programs then compile in two thirds of the time, and a checkpoint has no shards to cut.
    """
    make_mesh, all_devices = partition.make_mesh, jax.devices()

    @functools.wraps(make_mesh)
    def of_one(*sizes, devices=None, **axes):
        devices = all_devices if devices is None else devices
        return make_mesh(*sizes, **axes, devices=devices[:1] if devices == all_devices else devices)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(partition, "make_mesh", of_one)
        yield

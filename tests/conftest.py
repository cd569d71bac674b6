"""Every test sees 8 CPU devices and a cache of compiled programs; both must be set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the tests' numbers are those of a CPU
# Hundreds of programs are compiled in each process: what that leaves behind goes back to the system.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.perturb=0")  # glibc's default; see partition.make_mesh

from dalle2_jax import partition  # noqa: E402 (after the platform is chosen)

partition.initialise(cpu_devices=8)

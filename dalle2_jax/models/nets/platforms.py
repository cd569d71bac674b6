"""What a program is traced for: the one place where `nets` asks for the platform."""

import contextlib
import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device: 'cpu', 'gpu' or 'tpu', and of NVIDIA's GPUs the compute capability, 9.0 as (9, 0)."""

    platform: str
    capability: tuple[int, int] | None = None


# Inside `with assumed(Target(...)):` programs are traced for such devices, whatever there is here, and may be
# lowered for them and looked at. Part of JAX's cache keys.
assumed = jax.make_user_context(None)


def target() -> Target:
    """What is traced will run on these: the mesh's devices, or else the default ones."""
    if assumed.value is not None:
        return assumed.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return Target(platform, _capability() if platform == "gpu" else None)


def _capability() -> tuple[int, int] | None:
    """Of the first GPU here; None for one that is not NVIDIA's, and where only the mesh knows of any."""
    with contextlib.suppress(RuntimeError):
        gpu = jax.local_devices(backend="gpu")[0]
        found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(gpu, "compute_capability", "")))
        return found and (int(found[1]), int(found[2]))
    return None

"""Meshes and shardings: the only file that depends on the number of devices.

A mesh has three axes. `data` repeats the parameters and splits the batch; `fsdp` splits the batch as well,
and the parameters (each device gathers a layer when it needs it); `tensor` splits the parameters and with
them the work inside a layer. So the batch is split over (data, fsdp), a parameter over (fsdp, tensor):

    expanding layer  [.., in, out]: (fsdp, tensor)    its output is split by channel over `tensor`
    contracting layer [.., in, out]: (tensor, fsdp)   consumes that split; one all-reduce per pair of layers

`RULES` says which parameter is which, by name. The optimizer's moments and the EMA hold the parameters' tree
inside, so the same rules (which look at the end of a path) shard the whole train state alike.

Everything runs under `jax.jit` with `NamedSharding`s; on one device all of this is the identity.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dalle2_jax.runtime import machine
from dalle2_jax.runtime.batch import as_floats, field

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (regex on the end of the path 'a/b/kernel', spec). First match wins. A spec speaks of the last axes of an
# array, so one rule serves Dense [in, out] and Conv [kh, kw, in, out] kernels, and layers stacked by a scan.
# Arrays of rank 0 and 1 (gains, biases, temperatures, counters) are always replicated.
RULES = (
    # Adafactor's means of squared gradients over rows and columns: small, with one axis less than a parameter
    (r"(^|/)v_(row|col)/", P()),
    # statistics of the data: the autoregressive prior's principal components
    (r"(^|/)stats/\w+$", P()),
    # positions and learned stand-ins [L, D]: few rows, added to activations, which must not inherit a split
    (r"(^|/)(position(_bias)?|padding|query|class_token|null_\w+)(/embedding)?$", P()),
    # tables looked up by id [V, D]: were D over `fsdp`, every device would gather the whole output gradient
    (r"(^|/|_)embedding$", P("fsdp", "tensor")),
    # kernels that close a pair of layers
    (r"(^|/)(out|fc2|\w+_fc2|conv2|conv_out|patches_out|skip)/kernel$", P("tensor", "fsdp")),
    # any other kernel opens a pair: qkv, q, k, v, kv, text_kv, fc1, conv1, conv_in, emb_proj, proj ...
    (r"(^|/)kernel$", P("fsdp", "tensor")),
)


def initialise(cpu_devices: int | None = None) -> None:
    """Sets up JAX for this machine; call it before anything is computed. Repeated calls are harmless.

    - A CPU becomes one XLA device a core, a power of two and at most 8: XLA uses several threads inside one
    CPU
      device poorly, so sharding the batch is 1.4-2 times faster. `cpu_devices`, JAX_NUM_CPU_DEVICES and
      --xla_force_host_platform_device_count in XLA_FLAGS take precedence.
    - Compiled programs are cached in $JAX_COMPILATION_CACHE_DIR, else $DALLE2_JAX_CACHE/xla, else
      ~/.cache/dalle2_jax/xla. DALLE2_JAX_CACHE= (empty): no cache.
    """
    machine.set_cpu_devices(cpu_devices)
    machine.set_compilation_cache()


def compiler_options(once: bool = False, mesh: Mesh | None = None) -> dict | None:
    """`compiler_options` of `jax.jit` for a large program; mesh None: this machine's devices.

    CPU: compiles in a fifth less time, and schedules for least memory, which saves a tenth of a decoder's
    step on two devices. once: compiles in half the time and runs slower. TPU: split kernels are gathered
    whole, not passed round in pieces, whose products have few channels (docs/scaling.md). Several GPUs:
    communication overlaps with computation.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}  # larger than any activation
    if platform == "gpu" and mesh is not None and mesh.size > 1:
        return {"xla_gpu_enable_latency_hiding_scheduler": True}
    if platform != "cpu":
        return None
    if once:
        return {"xla_backend_optimization_level": 0}
    order = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return {"xla_llvm_disable_expensive_passes": True, "xla_cpu_scheduler_type": order}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of all devices (or of `devices`) with axes data, fsdp, tensor; one size may be -1: the rest.

    Only `data` extends over several slices of TPUs, one slice after the other: it needs the network between
    them for one sum of gradients a step.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the slices;
        the message lists sizes that fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(not isinstance(size, int | np.integer) or size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh ({shown}): sizes are whole numbers >= 1, or -1 for 'the rest'")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh ({shown}): only one axis may be -1, here {' and '.join(free)} are")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    count, slices = len(devices), num_slices(devices)
    if count % fixed or (not free and fixed != count):
        raise ValueError(
            f"mesh ({shown}) does not fit the {count} {devices[0].platform} device(s) here: data * fsdp * "
            f"tensor must be {count}. For instance: {_fitting(sizes, count, slices)} (-1: the rest)"
        )
    if free:
        sizes[free[0]] = count // fixed
    if devices[0].platform == "cpu":
        machine.keep_freed_memory()
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh ({shown}) does not fit {slices} slices of {count // slices} devices: only data goes over "
            f"slices, so it must be a multiple of {slices}. For instance: {_fitting(sizes, count, slices)}"
        )
    shape = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])  # of a slice
    if slices > 1:
        over = slices, 1, 1
        arranged = mesh_utils.create_hybrid_device_mesh(shape, over, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_slices(devices: list) -> int:
    """The number of TPU slices (with fast links inside) that these devices are in; 1 for other devices."""
    if devices[0].platform != "tpu":  # a GPU's slice_index is its machine
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def local_mesh() -> Mesh:
    """A mesh of this process's devices."""
    return make_mesh(devices=jax.local_devices())


def _fitting(sizes: Mapping[str, int], count: int, slices: int) -> str:
    each = count // slices
    divisors = [n for n in range(1, each + 1) if each % n == 0]
    meshes = [(count // (f * t), f, t) for f in divisors for t in divisors if each % (f * t) == 0]
    target = [count if sizes[axis] == -1 else sizes[axis] for axis in AXES]
    meshes.sort(key=lambda mesh: sum(abs(np.log2(a / b)) for a, b in zip(mesh, target, strict=True)))
    return " | ".join(f"data={d} fsdp={f} tensor={t}" for d, f, t in meshes[:4])


def use_mesh(mesh: Mesh):
    """Context in which `constrain` acts: `with use_mesh(mesh): step(state, batch)`."""
    return jax.set_mesh(mesh)


def shardings(abstract_tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedShardings by `RULES` for a tree of arrays or ShapeDtypeStructs.

    The tree may be parameters or contain them (a train state, an optimizer state). Mesh axes that do not
    divide an array's axis are left out there, so that any mesh works with any width. Raises ValueError,
    naming the leaf, if no rule matches one of rank 2 or more.
    """

    def one(path, leaf):
        name = path_name(path)
        return NamedSharding(mesh, fit(spec_for(name, len(leaf.shape)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, abstract_tree)


def spec_for(name: str, rank: int) -> P:
    """The spec, one entry an axis, of the first of `RULES` that matches the leaf 'a/b/kernel'."""
    if rank < 2:
        return P(*(None,) * rank)
    rule = _rule_for(name)
    if rule is not None:
        spec = rule[1]
        return P(*(None,) * (rank - len(spec)), *tuple(spec)[-rank:])
    raise ValueError(
        f"no sharding rule matches the parameter {name!r} (rank {rank}): give the leaf one of the usual "
        "names (kernel, bias, scale, embedding, positional) or add a line to partition.RULES"
    )


def _rule_for(name: str) -> tuple[str, P] | None:
    return next((rule for rule in RULES if re.search(rule[0], name)), None)


def check_rules(trees: Iterable[Any]) -> None:
    """Raises ValueError naming the RULES that no leaf of these trees (of parameters or shapes) uses."""
    used = set()
    for tree in trees:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        used |= {_rule_for(path_name(path)) for path, leaf in leaves if len(leaf.shape) > 1}
    unused = [pattern for pattern, spec in RULES if (pattern, spec) not in used]
    if unused:
        raise ValueError(
            f"no parameter uses the sharding rules {', '.join(map(repr, unused))}: take them out of "
            "partition.RULES, or mend their patterns"
        )


def fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` without the mesh axes that do not divide their array axis, which is then replicated."""
    entries = [
        axes if axes is not None and size and size % _size(mesh, axes) == 0 else None
        for axes, size in zip(tuple(spec) + (None,) * (len(shape) - len(spec)), shape, strict=True)
    ]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def path_name(path: tuple) -> str:
    """'a/b/kernel' for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _size(mesh: Any, axes: str | tuple[str, ...]) -> int:
    axes = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: axis 0 split over (data, fsdp)."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def all_devices(mesh: Mesh) -> NamedSharding:
    """The sharding of an array with one row a device: axis 0 split over all axes."""
    return NamedSharding(mesh, P(AXES))


def batch_shards(mesh: Mesh | None = None) -> int:
    """data * fsdp, which must divide a global batch. mesh None: that of `use_mesh`, 1 if none is set."""
    if mesh is None:
        return _size(jax.sharding.get_abstract_mesh(), _auto_axes(BATCH_AXES))
    return _size(mesh, BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raises ValueError with sizes that fit, unless a global batch of that size splits over the mesh."""
    shards = batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        below = batch_size // shards * shards
        near = " or ".join(str(n) for n in (below, below + shards) if n)
        raise ValueError(
            f"{name}={batch_size} does not split over the mesh's {shards} batch shards "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}): use {near}, or another mesh"
        )


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays over (data, fsdp) from this process's rows of a batch (numpy, axis 0: examples).

    With several processes the rows are the parts of `host_slice`, in its order. Does not wait for the copies.
    """
    sharding, mine = batch_sharding(mesh), host_slice(mesh)
    result = {}
    for name, value in batch.items():
        value = np.asarray(value)
        rows = value.shape[0] * mine["num_parts"] // len(mine["parts"]) if value.ndim else 0
        check_batch_size(rows, mesh, f"rows of batch[{name!r}]")
        result[name] = jax.make_array_from_process_local_data(sharding, value)
    return result


def without_index(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch without its record numbers (`index`, int64), which stay on the host."""
    return {name: value for name, value in batch.items() if field(name).kind != "index"}


def host_slice(mesh: Mesh) -> dict:
    """The rows of each batch that this process reads: `parts`, ascending, of `num_parts` equal ones.

    They follow from the places of its devices: a TPU host has a square of the torus, in v5p:4x4x4 parts such
    as 0, 4, 16 and 20 of 64. Processes that share the axis `tensor` read the same parts. Raises ValueError
    for processes with different numbers of parts, or with only some in common.
    """
    shards, parts = batch_shards(mesh), collections.defaultdict(set)
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((shards,))
    for device, rows in places.items():
        parts[device.process_index].add(rows[0].start or 0)
    mine = parts[jax.process_index()]
    for process, theirs in parts.items():
        if len(theirs) != len(mine) or (theirs != mine and theirs & mine):
            raise ValueError(
                f"the mesh gives process {jax.process_index()} the parts {sorted(mine)} of {shards} of a "
                f"batch and process {process} {sorted(theirs)}: all need as many, the same ones or others. "
                "Let data * fsdp be a multiple of the number of processes"
            )
    return dict(parts=tuple(sorted(mine)), num_parts=shards)


def gather_index(index: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The record numbers int64 [B] of the global batch from this process's int64 [b]; all must call it."""
    halves = np.ascontiguousarray(index, np.int64).view(np.int32).reshape(-1, 2)  # JAX has no int64 here
    return to_host(to_global({"index": halves}, mesh))["index"].reshape(-1).view(np.int64)


def on_devices(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """A host batch as global arrays without record numbers; images and videos as floats in [-1, 1]."""
    return as_floats(to_global(without_index(batch), mesh))


def to_host(tree: Any) -> Any:
    """The tree with global arrays in numpy, on every process; all must call it."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def constrain(x: jax.Array, tensor_axis: int | None = None) -> jax.Array:
    """Keeps an activation [B, ...] split over (data, fsdp) along axis 0; the identity without a mesh.

    Called at the edges of blocks: otherwise XLA may propagate the parameters' split over `fsdp` into
    activations and gather these ("full rematerialization") instead of a kernel. tensor_axis (attention heads)
    is split over `tensor` if that divides it.
    """
    axes = _auto_axes(BATCH_AXES)
    if not axes or x.ndim == 0 or x.shape[0] % batch_shards():
        return x
    spec = [axes] + [None] * (x.ndim - 1)
    if tensor_axis is not None:
        tensor = _auto_axes(("tensor",))
        if tensor and x.shape[tensor_axis] % _size(jax.sharding.get_abstract_mesh(), tensor) == 0:
            spec[tensor_axis] = tensor
    return jax.lax.with_sharding_constraint(x, P(*spec))


def _auto_axes(names: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of the mesh that XLA splits over; none inside a shard_map over them."""
    mesh = jax.sharding.get_abstract_mesh()
    types = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in names if types.get(axis) == AxisType.Auto)

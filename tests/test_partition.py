"""Meshes, sharding rules and batches, on the 8 virtual CPU devices of conftest.py."""

import collections
import ctypes
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dalle2_jax.runtime import machine, partition
from dalle2_jax.runtime.batch import to_uint8


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def mlp_params(width=16):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "block": {
            "fc1": {"kernel": jax.random.normal(keys[0], (8, width)) / 3, "bias": jnp.zeros(width)},
            "fc2": {"kernel": jax.random.normal(keys[1], (width, 8)) / 4, "bias": jnp.zeros(8)},
        }
    }


def mlp_loss(params, x):
    block = params["block"]
    h = jax.nn.gelu(x @ block["fc1"]["kernel"] + block["fc1"]["bias"])
    y = partition.constrain(h @ block["fc2"]["kernel"] + block["fc2"]["bias"])
    return jnp.mean((y - x) ** 2)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks a TPU chip, without one."""

    slice_index: int
    coords: tuple[int, int, int]
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


def tpu(slice_index: int, x: int, y: int) -> Chip:
    return Chip(slice_index, (x, y, 0), 4 * slice_index + 2 * x + y)


def of_torus(x: int, y: int, z: int) -> Chip:
    """A chip of a slice of 4 x 4 x 4, whose hosts have 2 x 2 x 1."""
    host = 4 * z + 2 * (y // 2) + x // 2
    return Chip(0, (x, y, z), 16 * z + 4 * y + x, device_kind="TPU v5", process_index=host)


class TestMesh:
    @pytest.mark.parametrize(
        ("asked", "sizes"),
        [
            ({}, (8, 1, 1)),
            ({"data": 1, "fsdp": -1}, (1, 8, 1)),
            ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
            ({"data": -1, "tensor": 4}, (2, 1, 4)),
        ],
    )
    def test_sizes(self, asked, sizes):
        mesh = partition.make_mesh(**asked)
        assert mesh.axis_names == ("data", "fsdp", "tensor")
        assert tuple(mesh.shape.values()) == sizes
        assert partition.batch_shards(mesh) == sizes[0] * sizes[1]

    def test_devices_can_be_given(self):
        mesh = partition.make_mesh(fsdp=2, devices=jax.devices()[:4])
        assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}

    @pytest.mark.parametrize("asked", [{"data": 3}, {"data": 4}, {"data": 16}, {"fsdp": 3}, {"data": 1}])
    def test_sizes_that_do_not_fit_are_refused_with_some_that_do(self, asked):
        with pytest.raises(ValueError, match="must be 8") as error:
            partition.make_mesh(**asked)
        suggestion = str(error.value).split("For instance: ")[1].split(" (-1")[0].split(" | ")[0]
        sizes = dict(entry.split("=") for entry in suggestion.split())
        partition.make_mesh(**{axis: int(size) for axis, size in sizes.items()})  # the advice works

    def test_nonsense_is_refused(self):
        with pytest.raises(ValueError, match="only one axis"):
            partition.make_mesh(-1, -1, 1)
        with pytest.raises(ValueError, match="whole numbers"):
            partition.make_mesh(0, 1, 1)
        with pytest.raises(ValueError, match="whole numbers"):
            partition.make_mesh(2.0, 4, 1)

    def test_data_goes_over_slices(self):
        """Two slices of 2 x 2 chips, given mixed: each half of `data` is one slice, in its order."""
        devices = [tpu(slice_index, x, y) for x in range(2) for slice_index in (1, 0) for y in range(2)]
        for asked in ({"data": 2, "fsdp": -1}, {"data": -1, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
            mesh = partition.make_mesh(**asked, devices=devices)
            assert set(mesh.axis_types) == set(partition.make_mesh().axis_types)
            assert partition.num_slices(devices) == 2 and mesh.size == 8
            halves = np.split(mesh.devices, 2)
            assert [{device.slice_index for device in half.flat} for half in halves] == [{0}, {1}]
            assert all(len({device.coords for device in half.flat}) == 4 for half in halves)

    @pytest.mark.parametrize(
        ("asked", "why"),
        [
            ({"data": 1, "fsdp": -1}, "3 slices of 4 devices: only data goes over slices"),
            ({"data": 4, "fsdp": 3}, "it must be a multiple of 3"),
            ({"data": 1}, "must be 12"),
        ],
    )
    def test_another_axis_over_slices_is_refused_with_meshes_that_fit(self, asked, why):
        devices = [tpu(slice_index, x, y) for slice_index in range(3) for x in range(2) for y in range(2)]
        with pytest.raises(ValueError, match=why) as error:
            partition.make_mesh(**asked, devices=devices)
        for suggestion in str(error.value).split("For instance: ")[1].split(" (-1")[0].split(" | "):
            sizes = dict(entry.split("=") for entry in suggestion.split())
            made = partition.make_mesh(**{a: int(size) for a, size in sizes.items()}, devices=devices)
            assert made.shape["data"] % 3 == 0

    def test_hosts_of_other_devices_are_no_slices(self):
        devices = [dataclasses.replace(tpu(host, 0, y), platform="gpu") for host in (0, 1) for y in (0, 1)]
        assert partition.num_slices(devices) == 1
        assert list(partition.make_mesh(1, -1, 1, devices=devices).devices.flat) == devices


class TestRules:
    @pytest.mark.parametrize(
        ("name", "rank", "spec"),
        [
            ("a/qkv/kernel", 2, P("fsdp", "tensor")),
            ("a/fc1/kernel", 2, P("fsdp", "tensor")),
            ("block_0/attn/text_kv/kernel", 2, P("fsdp", "tensor")),
            ("emb_proj/kernel", 2, P("fsdp", "tensor")),
            ("conv_in/kernel", 4, P(None, None, "fsdp", "tensor")),
            ("down_0/conv1/kernel", 4, P(None, None, "fsdp", "tensor")),
            ("some_new_layer/kernel", 2, P("fsdp", "tensor")),
            ("a/out/kernel", 2, P("tensor", "fsdp")),
            ("mlp/fc2/kernel", 2, P("tensor", "fsdp")),
            ("down_0/conv2/kernel", 4, P(None, None, "tensor", "fsdp")),
            ("conv_out/kernel", 4, P(None, None, "tensor", "fsdp")),
            ("layers/fc2/kernel", 3, P(None, "tensor", "fsdp")),  # stacked by a scan
            ("token_embedding/embedding", 2, P("fsdp", "tensor")),
            ("position/embedding", 2, P(None, None)),
            ("position", 3, P(None, None, None)),
            ("class_token/embedding", 2, P(None, None)),
            ("null_text_states/embedding", 2, P(None, None)),
            ("params/stats/components", 2, P(None, None)),
            ("norm1/scale", 1, P(None)),
            ("logit_scale", 0, P()),
            ("opt_state/1/0/mu/block/fc2/kernel", 2, P("tensor", "fsdp")),
            ("opt_state/1/0/v_row/conv2/kernel", 3, P(None, None, None)),
            ("opt_state/1/0/v/conv2/kernel", 4, P(None, None, "tensor", "fsdp")),
        ],
    )
    def test_spec_of(self, name, rank, spec):
        assert partition.spec_for(name, rank) == spec

    def test_names_that_only_resemble_a_closing_layer_are_not_one(self):
        assert partition.spec_for("without/kernel", 2) == P("fsdp", "tensor")
        assert partition.spec_for("conv21/kernel", 4) == P(None, None, "fsdp", "tensor")

    def test_leaf_without_a_rule_is_named(self):
        tree = {"net": {"mystery": shape(4, 4)}}
        with pytest.raises(ValueError, match="'net/mystery'.*RULES"):
            partition.shardings(tree, partition.make_mesh())

    def test_axes_that_do_not_divide_are_left_out(self):
        mesh = partition.make_mesh(1, 4, 2)
        got = partition.shardings(
            {"conv_in": {"kernel": shape(3, 3, 3, 6)}, "fc1": {"kernel": shape(8, 5)}}, mesh
        )
        assert got["conv_in"]["kernel"].spec == P(None, None, None, "tensor")  # 3 channels over 4
        assert got["fc1"]["kernel"].spec == P("fsdp")
        assert partition.fit(P("fsdp"), (0,), mesh) == P()
        assert partition.fit(P(("fsdp", "tensor")), (12,), mesh) == P()
        assert partition.fit(P(("fsdp", "tensor")), (16,), mesh) == P(("fsdp", "tensor"))

    def test_optimizer_and_average_lie_as_the_parameters_do(self):
        mesh = partition.make_mesh(2, 2, 2)
        params = jax.eval_shape(mlp_params)
        opt_state = jax.eval_shape(optax.adamw(1e-3).init, params)
        state = {"params": params, "ema_params": params, "opt_state": opt_state, "step": shape()}
        got = partition.shardings(state, mesh)
        assert got["params"]["block"]["fc1"]["kernel"].spec == P("fsdp", "tensor")
        assert got["ema_params"] == got["params"]
        assert got["opt_state"][0].mu == got["params"]
        assert got["opt_state"][0].nu == got["params"]
        assert got["step"].spec == P() and got["opt_state"][0].count.spec == P()

    def test_parameters_are_really_split(self):
        mesh = partition.make_mesh(1, 4, 2)
        params = mlp_params()
        placed = jax.device_put(params, partition.shardings(params, mesh))
        kernel = placed["block"]["fc1"]["kernel"]
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 8)}
        np.testing.assert_array_equal(
            partition.to_host(placed)["block"]["fc1"]["kernel"], params["block"]["fc1"]["kernel"]
        )

    def test_a_rule_that_nothing_uses_is_named(self, monkeypatch):
        """Its pattern matches nothing, or only what an earlier rule takes, or only arrays that need none."""
        rules = ((r"fc1/kernel$", P("fsdp", "tensor")), (r"fc2/kernel$", P("tensor", "fsdp")))
        monkeypatch.setattr(partition, "RULES", rules)
        partition.check_rules([{"fc1": {"kernel": shape(4, 4)}}, {"fc2": {"kernel": shape(4, 4)}}])
        for dead in (r"fc3/kernel$", r"block/fc1/kernel$", r"fc1/bias$"):
            monkeypatch.setattr(partition, "RULES", (*rules, (dead, P())))
            with pytest.raises(ValueError, match=re.escape(f"rules {dead!r}: take them out")):
                partition.check_rules([jax.eval_shape(mlp_params)])


class TestBatch:
    def test_rows_go_to_devices_in_order(self):
        mesh = partition.make_mesh(2, 2, 2)
        image = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
        mask = np.eye(8, dtype=bool)
        batch = partition.to_global({"image": image, "token_mask": mask}, mesh)
        assert batch["image"].sharding == NamedSharding(mesh, P(("data", "fsdp")))
        assert batch["token_mask"].dtype == bool
        np.testing.assert_array_equal(batch["image"], image)
        assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 3)}
        devices = mesh.devices  # [data, fsdp, tensor]: shard (d, f) holds rows 2 (2 d + f) ...
        for shard in batch["image"].addressable_shards:
            d, f, _ = np.argwhere(devices == shard.device)[0]
            assert shard.index[0].start == 2 * (2 * d + f)

    def test_batch_that_does_not_split_is_refused(self):
        mesh = partition.make_mesh()
        with pytest.raises(ValueError, match="batch_size=12 .* 8 batch shards .*use 8 or 16"):
            partition.check_batch_size(12, mesh)
        with pytest.raises(ValueError, match="use 8, or"):
            partition.check_batch_size(4, mesh)
        with pytest.raises(ValueError, match="image"):
            partition.to_global({"image": np.zeros((12, 2))}, mesh)
        with pytest.raises(ValueError, match="scalar"):
            partition.to_global({"scalar": np.float32(1)}, mesh)

    def test_pictures_become_floats_on_the_devices(self):
        """All 256 levels, to float32 rounding, and back; all else stays as it is, and where it is."""
        mesh = partition.make_mesh(2, 2, 2)
        levels = np.arange(256, dtype=np.uint8).reshape(8, 4, 8)
        other = dict(
            low_res=np.linspace(-1, 1, 8, dtype=np.float32),
            tokens=np.arange(8, dtype=np.int32),
            token_mask=np.eye(8, dtype=bool),
        )
        batch = partition.on_devices(other | {"image": levels, "index": np.arange(8)}, mesh)
        assert set(batch) == {*other, "image"}
        np.testing.assert_allclose(batch["image"], levels / 127.5 - 1, rtol=0, atol=1e-7)
        assert batch["image"].dtype == np.float32
        assert batch["image"].min() == -1 and batch["image"].max() == 1
        for name, value in other.items():
            assert batch[name].dtype == value.dtype
            np.testing.assert_array_equal(batch[name], value)
        for value in batch.values():
            assert value.sharding == partition.batch_sharding(mesh)
        np.testing.assert_array_equal(to_uint8(batch["image"]), levels)

    def test_record_numbers_stay_on_the_host(self):
        assert set(partition.without_index({"index": np.arange(8), "image": np.zeros(8)})) == {"image"}


@pytest.mark.parametrize("sizes", [(1, 64, 1), (2, 32, 1), (4, 8, 2), (1, 8, 8)])
def test_hosts_of_a_torus_read_every_part_of_a_batch(monkeypatch, sizes):
    """The 16 hosts of 2 x 2 x 1 chips of a 4 x 4 x 4 slice: as many parts each, and together all of them."""
    chips = [of_torus(x, y, z) for z in range(4) for y in range(4) for x in range(4)]
    mesh = partition.make_mesh(*sizes, devices=chips)
    read = []
    for host in range(16):
        monkeypatch.setattr(jax, "process_index", lambda n=host: n)
        mine = partition.host_slice(mesh)
        assert mine["num_parts"] == sizes[0] * sizes[1]
        read.append(mine["parts"])
    shards = sizes[0] * sizes[1]
    assert collections.Counter(part for parts in set(read) for part in parts) == {i: 1 for i in range(shards)}
    assert sizes != (1, 64, 1) or read[0] == (0, 4, 16, 20)


class TestConstrain:
    def test_identity_without_a_mesh(self):
        x = jnp.ones((8, 2))
        assert partition.constrain(x) is x

    def test_splits_the_first_axis_inside_a_mesh(self):
        mesh = partition.make_mesh(2, 2, 2)
        with partition.use_mesh(mesh):
            y = jax.jit(lambda x: partition.constrain(x * 2))(jnp.ones((8, 4, 4, 2)))
        assert y.sharding.spec == P(("data", "fsdp"))

    def test_identity_where_the_batch_does_not_split(self):
        with partition.use_mesh(partition.make_mesh()):
            x = jnp.ones((3, 2))
            assert partition.constrain(x) is x
            scalar = jnp.ones(())
            assert partition.constrain(scalar) is scalar

    def test_gradients_pass(self):
        with partition.use_mesh(partition.make_mesh()):
            grad = jax.jit(jax.grad(lambda x: jnp.sum(partition.constrain(x) ** 2)))(jnp.ones((8, 2)))
        np.testing.assert_array_equal(grad, 2 * np.ones((8, 2)))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_loss_and_gradients_do_not_depend_on_the_mesh(sizes):
    """Sums over devices reorder additions: equal to a few float32 roundings."""
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    params = mlp_params()
    loss, grads = jax.jit(jax.value_and_grad(mlp_loss))(params, x)
    mesh = partition.make_mesh(*sizes)
    where = partition.shardings(params, mesh)
    with partition.use_mesh(mesh):
        placed = jax.device_put(params, where)
        batch = partition.to_global({"x": x}, mesh)["x"]
        step = jax.jit(jax.value_and_grad(mlp_loss), out_shardings=(partition.replicated(mesh), where))
        loss_there, grads_there = step(placed, batch)
    np.testing.assert_allclose(loss_there, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads_there, grads)
    assert grads_there["block"]["fc1"]["kernel"].sharding.spec == where["block"]["fc1"]["kernel"].spec


def gathered_shapes(mesh, table_spec):
    """Shapes that devices gather in the gradient of an embedding and two layers, and the parameters'."""
    params = mlp_params() | {"token_embedding": {"embedding": jnp.ones((32, 8)) / 3}}
    where = partition.shardings(params, mesh)
    where["token_embedding"]["embedding"] = NamedSharding(mesh, table_spec)
    tokens = partition.to_global({"tokens": np.arange(8 * 4, dtype=np.int32).reshape(8, 4)}, mesh)["tokens"]

    def loss(params, tokens):
        x = partition.constrain(params["token_embedding"]["embedding"][tokens])
        return mlp_loss(params, x)

    with partition.use_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=(where, tokens.sharding), out_shardings=where)
        program = step.lower(params, tokens).compile().as_text()
    found = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    return {tuple(map(int, sizes.split(","))) for sizes in found}, {x.shape for x in jax.tree.leaves(params)}


def test_fsdp_gathers_parameters_and_never_activations():
    mesh = partition.make_mesh(2, 4, 1)
    gathered, parameters = gathered_shapes(mesh, partition.spec_for("token_embedding/embedding", 2))
    assert gathered and gathered <= parameters
    if jax.__version_info__ < (0, 11):  # what the rule avoids; later versions of XLA find a way round it
        gathered, parameters = gathered_shapes(mesh, P(None, "fsdp"))
        assert (8, 4, 8) in gathered


REPORT = """
import json, jax
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.batch import to_uint8
partition.initialise()
partition.initialise()
count = len(jax.devices())
partition.initialise(cpu_devices=5)  # too late: must not raise
print(json.dumps([count, jax.config.jax_compilation_cache_dir]))
"""


def started_with(tmp_path, **env):
    keep = {
        k: v
        for k, v in os.environ.items()
        if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "DALLE2_JAX_CACHE")
    }
    keep.pop("JAX_COMPILATION_CACHE_DIR", None)
    env = (
        keep | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)} | env
    )
    done = subprocess.run(
        [sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestInitialise:
    def test_one_device_a_core_and_a_cache(self, tmp_path):
        count, cache = started_with(tmp_path)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert 1 <= count <= min(8, cores) and count & (count - 1) == 0
        assert cache.startswith(str(tmp_path / ".cache" / "dalle2_jax" / "xla"))
        assert os.path.isdir(cache)

    def test_the_users_settings_win(self, tmp_path):
        count, cache = started_with(tmp_path, JAX_NUM_CPU_DEVICES="3", DALLE2_JAX_CACHE="")
        assert count == 3 and not cache
        mine = str(tmp_path / "mine")
        flags = "--xla_force_host_platform_device_count=6"
        assert started_with(tmp_path, XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=mine) == [6, mine]
        unwritable = tmp_path / "file"
        unwritable.write_text("")
        assert not started_with(tmp_path, DALLE2_JAX_CACHE=str(unwritable))[1]

    def test_container_quota_counts(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
        monkeypatch.setattr(machine.Path, "read_text", lambda self: "350000 100000\n")
        assert machine._available_cores() == 4
        monkeypatch.setattr(machine.Path, "read_text", lambda self: "max 100000\n")
        assert machine._available_cores() == 64


def test_compiler_options_are_those_of_the_meshs_devices():
    """A mesh of TPUs may be described on a machine that has none."""
    one = types.SimpleNamespace(platform="tpu")
    described = types.SimpleNamespace(devices=np.array([one], dtype=object))
    compiler_options = partition.compiler_options.__wrapped__  # in its place stands that of conftest.py
    assert set(compiler_options(mesh=described)) == {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}
    here = partition.make_mesh(devices=jax.devices()[:1])
    assert compiler_options(mesh=here) == compiler_options()
    assert compiler_options(once=True) != compiler_options()


def test_several_gpus_hide_the_time_of_their_messages(monkeypatch):
    """The mesh stands for one of GPUs. XLA refuses an option that it does not know, on any platform."""

    def options(count):
        gpus = types.SimpleNamespace(platform="gpu")
        return partition.compiler_options(
            mesh=types.SimpleNamespace(devices=np.array([gpus] * count), size=count)
        )

    assert options(1) is None
    assert jax.jit(jnp.sin, compiler_options=options(2))(0.0) == 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(jnp.sin, compiler_options={name + "s": True for name in options(2)})(0.0)


MAPPED = """
import ctypes, numpy as np
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.batch import to_uint8
partition.initialise()
partition.make_mesh()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks "
                "uordblks fordblks keepcost".split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
before = mallinfo().hblks
there = np.ones(1 << 24)
print(mallinfo().hblks - before)
"""


def test_on_cpus_large_arrays_come_from_memory_that_is_kept():
    """128 MiB are a mapping of their own by default, which goes back to the system when the array does."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("a C library other than glibc 2.33 or newer")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    plain |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    for own, mappings in (({}, 0), ({"MALLOC_TOP_PAD_": "131072"}, 1)):
        done = subprocess.run([sys.executable, "-c", MAPPED], env=plain | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.splitlines()[-1]) == mappings

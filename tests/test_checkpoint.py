"""Checkpoints of a run."""

import errno
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.multihost import multihost

from dalle2_jax.runtime import checkpoint, checksums, orbax_errors, partition, processes
from dalle2_jax.train import optim


def make_params(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return {
        "conv_in": {"kernel": array(3, 3, 3, 8), "bias": array(8)},
        "block_0": {"fc1": {"kernel": array(8, 16)}, "norm1": {"scale": array(8)}},
        "token_embedding": {"embedding": array(24, 8)},
    }


def make_state(mesh, seed=0):
    params = make_params(seed)
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "ema_params": make_params(seed + 100),
        "opt_state": optax.adamw(1e-3).init(params),
    }
    return jax.device_put(state, partition.shardings(state, mesh))


def abstract(state, mesh):
    where = partition.shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def raising(error):
    def fail(*args, **options):
        raise error

    return fail


@pytest.fixture
def mesh():
    return partition.make_mesh(2, 4, 1)


class TestCheckpointer:
    def test_restores_to_the_bit_on_another_mesh(self, tmp_path, mesh):
        state = make_state(mesh, 3)
        with checkpoint.Checkpointer(tmp_path) as saver:
            assert saver.latest_step() is None
            assert saver.save(3, state, {"fingerprint": "abc", "bad_records": {"empty": 2}})
        for sizes in ((2, 4, 1), (8, 1, 1), (1, 2, 4)):
            other = partition.make_mesh(*sizes)
            with checkpoint.Checkpointer(tmp_path) as loader:
                restored, meta = loader.restore(abstract(state, other))
            assert meta == {"fingerprint": "abc", "bad_records": {"empty": 2}}
            assert_same(restored, state)
            kernel = restored["params"]["block_0"]["fc1"]["kernel"]
            assert kernel.sharding.mesh.shape == other.shape
            assert (
                kernel.sharding.spec
                == partition.shardings(state, other)["params"]["block_0"]["fc1"]["kernel"].spec
            )

    def test_leaves_that_older_checkpoints_lack_are_zero(self, tmp_path, mesh):
        """But for those that their list of checksums has: such a checkpoint has lost them."""
        state = make_state(mesh, 3)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(3, state, {})
        new = {"count": jnp.int32(7), "memory": {"loss": jnp.ones((8, 16)), "known": jnp.int32(2)}}
        where = partition.replicated(mesh)
        asked = abstract(state, mesh) | jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), new
        )
        with checkpoint.Checkpointer(tmp_path, zero_at_first=("count", "memory")) as loader:
            restored, _ = loader.restore(asked)
            assert restored["memory"]["loss"].sharding.is_equivalent_to(where, 2)
            assert_same(restored, state | jax.tree.map(jnp.zeros_like, new))
            with pytest.raises(ValueError, match="missing: other"):
                loader.restore(asked | {"other": asked["count"]})
        with checkpoint.Checkpointer(tmp_path, zero_at_first=("count",)) as loader:
            with pytest.raises(ValueError, match="missing: memory/known"):
                loader.restore(asked)
        path = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
        contents = json.loads(path.read_text())
        contents["checksums"]["count"] = 0
        path.write_text(json.dumps(checksums.sealed(contents)))
        with checkpoint.Checkpointer(tmp_path, zero_at_first=("count", "memory")) as loader:
            with pytest.raises(checkpoint.DamagedCheckpoint, match="1 leaves are not what was saved .count."):
                loader.restore(asked)

    @pytest.mark.parametrize(
        "changed", [dict(grad_clip=1.0), dict(weight_decay=0.1), dict(grad_clip=1.0, weight_decay=0.1)]
    )
    @pytest.mark.parametrize("back", [False, True])
    def test_an_optimizer_with_another_chain_finds_its_leaves(self, tmp_path, mesh, changed, back):
        settings = dict(learning_rate=0.1, num_steps=9)
        one, other = (
            optim.make_optimizer(**settings | more) for more in ((changed, {}) if back else ({}, changed))
        )
        params = make_params()
        grads = make_params(1)
        opt_state = one.init(params)
        for _ in range(2):
            _, opt_state = one.update(grads, opt_state, params)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(2, {"opt_state": opt_state}, {})
            saver.wait()
            asked = {"opt_state": other.init(params)}
            restored, _ = saver.restore(abstract(asked, mesh))
            assert jax.tree.structure(restored) == jax.tree.structure(asked)
            found, expected = jax.tree.leaves(restored), jax.tree.leaves(opt_state)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
            assert [int(x) for x in found if x.ndim == 0] == [2, 2]
            muon = optim.make_optimizer(**settings, muon_learning_rate=0.02)
            with pytest.raises(ValueError, match="missing: opt_state"):
                saver.restore(abstract({"opt_state": muon.init(params)}, mesh))

    def test_saving_is_asynchronous_and_the_state_may_be_donated(self, tmp_path, mesh):
        """The next step overwrites the state's buffers while they are still being written."""
        state = make_state(mesh, 1)
        where = partition.shardings(state, mesh)
        expected = partition.to_host(state)
        train_step = jax.jit(
            lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0, out_shardings=where
        )
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, state, {})
            for _ in range(3):
                state = train_step(state)
            saver.wait()
            restored, _ = saver.restore(abstract(state, mesh))
        assert_same(restored, expected)

    def test_only_the_newest_are_kept(self, tmp_path, mesh):
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path, max_to_keep=2) as saver:
            for step in (10, 20, 30):
                saver.save(step, state, {"at": step})
            saver.wait()
            assert saver.all_steps() == [20, 30]
            assert saver.latest_step() == 30
            assert saver.restore(abstract(state, mesh), 20)[1] == {"at": 20}
            assert not saver.save(30, state, {})  # is there already
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]

    def test_committed_is_said_only_when_it_is(self, tmp_path, mesh, caplog):
        with caplog.at_level("INFO", logger="absl"), checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(7, make_state(mesh), {})
            saver.wait()
        lines = [r.getMessage() for r in caplog.records if "committed" in r.getMessage()]
        assert lines == [f"committed checkpoint {tmp_path / 'checkpoints' / '7'}"]

    def test_no_checkpoint(self, tmp_path, mesh):
        with checkpoint.Checkpointer(tmp_path) as loader:
            with pytest.raises(FileNotFoundError, match=f"no committed checkpoint in {tmp_path}"):
                loader.restore(abstract(make_state(mesh), mesh))
            loader.save(1, make_state(mesh), {})
            loader.wait()
            with pytest.raises(FileNotFoundError, match="step 5 .*there are 1"):
                loader.restore(abstract(make_state(mesh), mesh), 5)

    def test_other_leaves_shapes_and_dtypes_are_named(self, tmp_path, mesh):
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, make_state(mesh), {})
            saver.wait()
            expected = abstract(make_state(mesh), mesh)

            def complaint(change):
                tree = jax.tree.map(lambda x: x, expected)
                change(tree["params"])
                with pytest.raises(ValueError, match="does not fit the model") as error:
                    saver.restore(tree)
                assert str(tmp_path) in str(error.value)
                return str(error.value)

            leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=partition.replicated(mesh))
            half = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=partition.replicated(mesh))
            assert "missing: params/extra [4, 4]" in complaint(lambda p: p.update(extra=leaf))
            assert "surplus: params/conv_in/bias [8]" in complaint(lambda p: p["conv_in"].pop("bias"))
            text = complaint(lambda p: p["block_0"]["fc1"].update(kernel=leaf))
            assert "misshapen: params/block_0/fc1/kernel has [8, 16], the model expects [4, 4]" in text
            text = complaint(lambda p: p["block_0"]["fc1"].update(kernel=half))
            assert "dtype: params/block_0/fc1/kernel is float32, the model expects bfloat16" in text

    def test_damage_names_the_path_and_says_what_to_do(self, tmp_path, mesh):
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path) as saver:
            for step in (1, 2, 3):
                saver.save(step, state, {})
        data = [
            p
            for p in (tmp_path / "checkpoints" / "3" / "state").rglob("*")
            if p.is_file() and p.parent.name == "d"
        ]
        assert data
        for path in data:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").unlink()
        with checkpoint.Checkpointer(tmp_path) as loader:
            for step in (3, 2):
                with pytest.raises(ValueError, match=rf"checkpoint \S*/checkpoints/{step} .*earlier step"):
                    loader.restore(abstract(state, mesh), step)
            assert_same(loader.restore(abstract(state, mesh), 1)[0], state)

    def test_a_flipped_bit_is_found_and_its_leaf_named(self, tmp_path, mesh):
        """Orbax's data is compressed, so a state with one other bit gets the checksums of the first."""
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, state, {})
            bits = np.array(state["ema_params"]["conv_in"]["bias"])
            bits.view(np.uint32)[3] ^= 1
            state["ema_params"]["conv_in"]["bias"] = jnp.asarray(bits)
            saver.save(2, state, {})
        first, second = (tmp_path / "checkpoints" / step / "meta" / "metadata" for step in "12")
        sums = [json.loads(path.read_text())["checksums"] for path in (first, second)]
        assert [name for name in sums[0] if sums[0][name] != sums[1][name]] == ["ema_params/conv_in/bias"]
        second.write_text(first.read_text())
        with checkpoint.Checkpointer(tmp_path) as loader:
            with pytest.raises(
                ValueError, match=r"checkpoints/2 is damaged: 1 leaves .*\(ema_params/conv_in/bias\)"
            ):
                loader.restore(abstract(state, mesh))
            loader.restore(abstract(state, mesh), 1)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.restore_ema_params(tmp_path)
        checkpoint.restore_subtree(tmp_path, "params")  # not damaged
        first_state = abstract(state, mesh)
        with checkpoint.Checkpointer(tmp_path) as loader:
            step, restored, _ = loader.restore_newest(first_state)
            assert step == 1 and loader.all_steps() == [1]
            assert [p.name.split("_")[0] for p in (tmp_path / "damaged").iterdir()] == ["2"]
            assert loader.save(2, restored, {})
            loader.wait()
            assert loader.restore_newest(first_state)[0] == 2

    # Orbax leaves coroutines behind where a file of several is damaged.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_bit_flipped_anywhere_on_the_disk_changes_nothing_that_is_read(self, tmp_path, mesh, caplog):
        """Every file of a checkpoint, at random places: what is restored is what was saved, or the one
        before, and then the damage is logged. It never looks like another dataset, model or format."""
        before, state = make_state(mesh, 1), make_state(mesh, 2)
        metas = {1: {"fingerprint": "abc"}, 2: {"fingerprint": "abc", "bad_records": {"empty": 2}}}
        with checkpoint.Checkpointer(tmp_path / "whole") as saver:
            saver.save(1, before, metas[1])
            saver.save(2, state, metas[2])
        whole = tmp_path / "whole" / "checkpoints" / "2"
        files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
        assert {pathlib.Path("meta/metadata"), pathlib.Path("state/_METADATA")} <= set(files)
        found = set()
        for number, name in enumerate(files * 3):
            workdir = tmp_path / str(number)
            shutil.copytree(tmp_path / "whole", workdir)
            path = workdir / "checkpoints" / "2" / name
            data = np.frombuffer(path.read_bytes(), np.uint8).copy()
            if not data.size:
                continue
            draw = np.random.default_rng([number // len(files), data.size])
            data[draw.integers(data.size)] ^= np.uint8(1 << draw.integers(8))
            path.write_bytes(data.tobytes())
            caplog.clear()
            with checkpoint.Checkpointer(workdir) as loader:
                step, restored, meta = loader.restore_newest(abstract(state, mesh))
            assert_same(restored, {1: before, 2: state}[step])
            assert meta == metas[step], name
            logged = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
            assert any("/checkpoints/2 " in text for text in logged) == (step == 1), (name, logged)
            assert (workdir / "damaged").exists() == (step == 1)
            found.add((str(name), step))
            shutil.rmtree(workdir)
        noticed = {name for name, step in found if step == 1}
        assert {"meta/metadata", "state/_METADATA"} <= noticed and any("/d/" in name for name in noticed)

    def test_with_no_whole_checkpoint_left_nothing_is_moved(self, tmp_path, mesh):
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, state, {})
        (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").unlink()
        with checkpoint.Checkpointer(tmp_path) as loader:
            with pytest.raises(checkpoint.DamagedCheckpoint, match="checkpoints/1 cannot be read"):
                loader.restore_newest(abstract(state, mesh))
        assert (tmp_path / "checkpoints" / "1").exists() and not (tmp_path / "damaged").exists()

    def test_what_was_read_of_a_damaged_one_makes_room_for_the_one_before(self, tmp_path, mesh, monkeypatch):
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path) as saver:
            for step in (1, 2):
                saver.save(step, state, {})
        path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
        contents = json.loads(path.read_text())
        contents["checksums"]["step"] += 1
        path.write_text(json.dumps(checksums.sealed(contents)))
        held = []
        with checkpoint.Checkpointer(tmp_path) as loader:
            read = loader._state.restore

            def restore(*args, **options):
                held.append(len(jax.live_arrays()))
                return read(*args, **options)

            monkeypatch.setattr(loader._state, "restore", restore)
            assert loader.restore_newest(abstract(state, mesh))[0] == 1
        assert len(held) == 2 and held[0] == held[1]

    def test_damage_that_another_process_finds_is_damage_here(self, tmp_path, mesh, monkeypatch):
        """This process reads step 2 whole, the other does not. Before that is told neither waits for the
        other, which would be in another place."""
        before, state = make_state(mesh, 1), make_state(mesh, 2)
        others, calls = iter([True, False, False]), []  # step 2 is read; step 1 is, and its sums are right

        def gather(own, count):
            calls.append("told")
            return np.append(own, next(others))

        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, before, {})
            saver.save(2, state, {})
            saver.wait()
            monkeypatch.setattr(processes, "gather", gather)
            monkeypatch.setattr(multihost, "sync_global_processes", lambda name, **_: calls.append(name))
            step, restored, _ = saver.restore_newest(abstract(state, mesh))
        assert step == 1 and calls == ["told"] * 3
        assert_same(restored, before)
        assert [path.name.split("_")[0] for path in (tmp_path / "damaged").iterdir()] == ["2"]

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ESTALE, "Stale file handle"),
            OSError(errno.EMFILE, "Too many open files"),
            PermissionError("of a service, without a number"),
            MemoryError(),
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            ValueError("UNKNOWN: Error reading local file [os_error_code='116'] [tensorstore_spec='{}']"),
            ValueError("PERMISSION_DENIED: Failed to open: Permission denied [os_error_code='13']"),
            ValueError("UNAVAILABLE: Error reading gs://bucket/run: HTTP response code: 503"),
        ],
    )
    def test_what_cannot_be_read_just_now_is_no_damage(self, tmp_path, mesh, monkeypatch, error):
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, state, {})
            saver.save(2, state, {})
            saver.wait()
            with monkeypatch.context() as patched:
                patched.setattr(saver._state, "restore", raising(error))
                with pytest.raises(
                    orbax_errors.ReadFailed, match="checkpoints/2 cannot be read by this process"
                ):
                    saver.restore_newest(abstract(state, mesh))
            assert not (tmp_path / "damaged").exists()
            assert saver.restore_newest(abstract(state, mesh))[0] == 2

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError("without a number, as Orbax raises it"),
            OSError(errno.EISDIR, "Is a directory"),
            ValueError("NOT_FOUND: Error reading Byte range [0, 265) of local file"),
            ValueError("UNKNOWN: Failed to open: Too many levels of symbolic links [os_error_code='40']"),
            ValueError("OUT_OF_RANGE: Requested byte range [0, 265) is not valid for value of size 132"),
            ValueError("DATA_LOSS: Error decoding manifest"),
        ],
    )
    def test_what_is_missing_or_no_file_is_damage(self, tmp_path, mesh, monkeypatch, error):
        state = make_state(mesh)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, state, {})
            saver.wait()
            monkeypatch.setattr(saver._state, "restore", raising(error))
            with pytest.raises(checkpoint.DamagedCheckpoint, match="incomplete or damaged"):
                saver.restore(abstract(state, mesh))

    def test_killed_while_saving(self, tmp_path):
        """The step being written when the process dies does not count, and what it left is cleaned up."""
        code = f"""
import os
import numpy as np
from dalle2_jax.runtime import checkpoint
state = {{"ema_params": {{"kernel": np.arange(4_000_000, dtype=np.float32).reshape(2000, 2000)}}}}
saver = checkpoint.Checkpointer({str(tmp_path)!r})
saver.save(1, state, {{}})
saver.wait()
rename = os.rename
def died_before(source, target, *args, **options):
    if os.path.basename(target) == "2":  # all is written, and would count now
        os._exit(9)
    rename(source, target, *args, **options)
os.rename = os.replace = died_before
saver.save(2, state, {{}})
saver.wait()
os._exit(3)
"""
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 9, done.stderr
        directory = tmp_path / "checkpoints"
        assert any(p.name.startswith("2.") for p in directory.iterdir())  # the fault really happened
        assert checkpoint.restore_ema_params(tmp_path)["kernel"][1999, 1999] == 3_999_999
        with checkpoint.Checkpointer(tmp_path) as loader:
            assert loader.all_steps() == [1]
            loader.save(2, {"kernel": np.zeros(3)}, {})
        assert sorted(p.name for p in directory.iterdir()) == ["1", "2"]


class TestWithoutRenaming:
    """R43: buckets, and gcsfuse as it is mounted by default, cannot rename folders."""

    @pytest.fixture
    def refused(self, monkeypatch):
        """The folders whose renaming was refused."""
        refused = []
        for name in ("rename", "replace"):
            whole = getattr(os, name)

            def rename(source, target, *args, whole=whole, **options):
                if os.path.isdir(source):
                    refused.append(os.fspath(source))
                    raise OSError(errno.EMFILE, "Too many open files")
                return whole(source, target, *args, **options)

            monkeypatch.setattr(os, name, rename)
        return refused

    def test_a_step_counts_once_its_commit_file_is_there(self, tmp_path, mesh, refused):
        state = make_state(mesh, 3)
        with checkpoint.Checkpointer(tmp_path) as saver:
            for step in (1, 2, 3):
                saver.save(step, state, {})
        assert len(refused) == 1  # when it was tried
        folder = tmp_path / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
        (folder / "3" / checkpoint.COMMIT).unlink()  # what a process leaves that is killed while it saves
        assert_same(checkpoint.restore_ema_params(tmp_path), state["ema_params"])
        with pytest.raises(FileNotFoundError, match="there are 1, 2"):
            checkpoint.restore_ema_params(tmp_path, 3)
        with checkpoint.Checkpointer(tmp_path) as loader:
            assert loader.all_steps() == [1, 2]
            step, restored, _ = loader.restore_newest(abstract(state, mesh))
            assert step == 2 and loader.save(3, restored, {})
        assert_same(checkpoint.restore_subtree(tmp_path, "params", 3), state["params"])

    def test_a_damaged_one_is_set_aside_by_copying(self, tmp_path, mesh, refused):
        state = make_state(mesh, 3)
        with checkpoint.Checkpointer(tmp_path) as saver:
            for step in (1, 2):
                saver.save(step, state, {})
        (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").unlink()
        with checkpoint.Checkpointer(tmp_path) as loader:
            assert loader.restore_newest(abstract(state, mesh))[0] == 1
        (aside,) = (tmp_path / "damaged").iterdir()
        assert refused and aside.name.startswith("2_") and (aside / "meta" / "metadata").is_file()
        assert not (tmp_path / "checkpoints" / "2").exists()


def test_two_damaged_ones_of_a_second_are_both_kept(tmp_path, mesh, monkeypatch):
    """R42: the clock that names them stands still."""
    monkeypatch.setattr(time, "strftime", lambda form: "20260101_000000")
    state = make_state(mesh)
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, state, {})
        for _ in range(2):
            saver.save(2, state, {})
            saver.wait()
            (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").unlink()
            assert saver.restore_newest(abstract(state, mesh))[0] == 1
    names = sorted(path.name for path in (tmp_path / "damaged").iterdir())
    assert names == ["2_20260101_000000", "2_20260101_000000_1"]


def test_of_what_fails_beside_the_one_error_asyncio_does_not_tell(tmp_path, caplog):
    """It would, when Python frees what Orbax leaves behind: in the midst of the log, or after the error."""
    with checkpoint.Checkpointer(tmp_path):
        pass
    told = "Task exception was never retrieved\nfuture: <Task finished coro=<%s() done, defined at %s:126>>"
    logging.getLogger("asyncio").error(told, "serialize", "site-packages/orbax/checkpoint/serialization.py")
    logging.getLogger("asyncio").error(told, "ours", "dalle2_jax/studio/server.py")
    assert [("ours()" in r.getMessage()) for r in caplog.records if r.name == "asyncio"] == [True]


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_alone(tmp_path, mesh):
    state = make_state(mesh)
    with checkpoint.Checkpointer(tmp_path) as saver:
        saver.save(1, state, {})
        saver.save(2, state, {})
    meta = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    contents = json.loads(meta.read_text())
    assert contents["format"] == checksums.FORMAT
    meta.write_text(json.dumps(checksums.sealed(contents | {"format": checksums.FORMAT + 1})))
    with (
        checkpoint.Checkpointer(tmp_path) as loader,
        pytest.raises(ValueError, match="has format 2, .* up to 1"),
    ):
        loader.restore_newest(abstract(state, mesh))
    with pytest.raises(ValueError, match="has format 2"):
        checkpoint.restore_ema_params(tmp_path)
    assert not (tmp_path / "damaged").exists()


class TestChecksum:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, bool])
    def test_host_and_devices_agree_however_the_array_is_split(self, mesh, dtype):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 6)) * 100).astype(dtype)
        expected = int(checksums.checksum(np.asarray(x)))
        for spec in (PartitionSpec(), PartitionSpec("fsdp", "data"), PartitionSpec(None, ("data",), None)):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            assert int(jax.jit(checksums.checksum)(placed)) == expected
            assert checksums.checksums({"x": placed}) == {"x": expected}

    def test_by_hand(self):
        """Bits 5, 7, 2^31 with weights 1, 3, 5: 5 + 21 + 5 * 2^31 = 26 + 2^31 modulo 2^32."""
        assert int(checksums.checksum(np.uint32([5, 7, 2**31]))) == 26 + 2**31
        assert int(checksums.checksum(np.float32(1.0).reshape(()))) == 0x3F800000

    def test_every_bit_and_the_order_count(self):
        x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
        whole = int(checksums.checksum(x))
        for element in range(15):
            for bit in range(32):
                changed = x.copy()
                changed.view(np.uint32).flat[element] ^= np.uint32(1 << bit)
                assert int(checksums.checksum(changed)) != whole
        assert int(checksums.checksum(x[::-1].copy())) != whole


class TestRestoreSubtree:
    def test_reads_one_part_without_its_class(self, tmp_path, mesh):
        state = make_state(mesh, 5)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(5, state, {})
            saver.wait()
            got = checkpoint.restore_ema_params(tmp_path)  # while the run still holds the folder
        assert_same(got, state["ema_params"])
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))
        assert_same(checkpoint.restore_subtree(tmp_path, "params", 5), state["params"])

    def test_errors(self, tmp_path, mesh):
        with pytest.raises(FileNotFoundError, match="not a training workdir"):
            checkpoint.restore_ema_params(tmp_path)
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(FileNotFoundError, match="no committed checkpoint"):
                checkpoint.restore_ema_params(tmp_path)
            saver.save(1, make_state(mesh), {})
        with pytest.raises(ValueError, match="no 'emma': it has ema_params, opt_state, params, step"):
            checkpoint.restore_subtree(tmp_path, "emma")


def test_late_failures_of_other_leaves_are_not_told_and_everything_else_is(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for _ in range(2):
        checkpoint.Checkpointer(tmp_path).close()
    others = [RuntimeError("Event loop is open"), ValueError("Event loop is closed")]
    for error in [RuntimeError("Event loop is closed"), *others]:
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [unraisable.exc_value for unraisable in told] == others

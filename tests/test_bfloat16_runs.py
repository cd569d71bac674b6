"""Runs whose products are in bfloat16: who decides, what the workdir keeps, and that resuming is exact."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.nets import cpu
from dalle2_jax.models.stages import Loss
from dalle2_jax.runtime import machine, partition
from dalle2_jax.train import checks, plan
from tests import tiny_run
from tests.tiny_run import assert_same, config, stored_state

pytestmark = pytest.mark.usefixtures("one_device")


@dataclasses.dataclass(frozen=True)
class Dense(tiny_run.Tiny):
    """The tiny stage with the layers' products."""

    def loss(self, params, key, batch, *, step=0, train=True):
        def dense(x, name):
            return cpu.dot_general(x, params[name]["kernel"], (((1,), (0,)), ((), ())))

        pictures = batch["image"].reshape(-1, 192)
        return Loss(jnp.square(dense(jnp.tanh(dense(pictures, "fc1")), "fc2") - pictures).mean())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_ROUNDED_PRODUCTS", 0)
    monkeypatch.setattr(cpu, "MIN_SIDE", 0)


def machine_has(monkeypatch, fast: bool):
    monkeypatch.setattr(machine, "has_fast_bfloat16", lambda: fast)


def status(settings, workdir, monkeypatch, allow_changed=()):
    with monkeypatch.context() as patched:
        patched.setattr(models, "build_stage", lambda config: Dense())
        return tiny_run.run_main(settings, workdir, patched.setattr, allow_changed)


def kept(workdir) -> str:
    return json.loads((workdir / "config.json").read_text())["cpu_products"]


def test_a_run_keeps_its_products_on_another_machine_to_the_bit(data, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="absl")
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    machine_has(monkeypatch, True)
    assert status(config(data, 4), whole, monkeypatch) == 0
    assert status(config(data, 2), parts, monkeypatch) == 0
    assert "bfloat16 operands and float32 sums" in caplog.text and "slower" not in caplog.text
    machine_has(monkeypatch, False)
    assert status(config(data, 4), parts, monkeypatch) == 0
    assert "float32 sums; slower than float32 on this machine" in caplog.text
    assert kept(parts) == kept(whole) == "bfloat16"
    assert_same(stored_state(whole, 4), stored_state(parts, 4))

    caplog.clear()
    assert status(config(data, 2), plain, monkeypatch) == 0
    machine_has(monkeypatch, True)
    assert status(config(data, 4), plain, monkeypatch) == 0
    assert kept(plain) == "float32" and "bfloat16" not in caplog.text
    one, other = stored_state(whole, 4), stored_state(plain, 4)
    assert any((one[name] != other[name]).any() for name in one)


def test_a_run_from_before_the_setting_stays_in_float32(data, tmp_path, monkeypatch):
    machine_has(monkeypatch, False)
    assert status(config(data, 2), tmp_path, monkeypatch) == 0
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["cpu_products"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    machine_has(monkeypatch, True)
    assert status(config(data, 4), tmp_path, monkeypatch) == 0 and kept(tmp_path) == "float32"


def test_other_products_take_permission(data, tmp_path, monkeypatch, caplog):
    assert status(config(data, 2, cpu_products="bfloat16"), tmp_path, monkeypatch) == 0
    other = config(data, 4, cpu_products="float32")
    assert status(other, tmp_path, monkeypatch) == checks.FAILED
    assert "cpu_products: 'bfloat16' in the workdir, 'float32' now" in caplog.text
    assert status(other, tmp_path, monkeypatch, ["cpu_products"]) == 0 and kept(tmp_path) == "float32"
    assert status(config(data, 4, cpu_products="int8"), tmp_path / "new", monkeypatch) == checks.FAILED
    assert "cpu_products 'int8' is unknown; choose 'float32' or 'bfloat16'" in caplog.text


def test_the_machine_decides_by_its_cpu_and_jax(data, monkeypatch):
    monkeypatch.setattr(models, "build_stage", lambda config: Dense())
    for flags, version, expected in (
        ("flags : fpu amx_bf16 amx_tile", (0, 12, 0), "bfloat16"),
        ("flags : fpu amx_bf16 amx_tile", (0, 10, 2), "float32"),
        ("flags : fpu avx512_bf16", (0, 12, 0), "float32"),
        ("", (0, 12, 0), "float32"),
    ):
        monkeypatch.setattr(machine, "_cpu_flags", lambda flags=flags: flags)
        monkeypatch.setattr(machine.jax, "__version_info__", version)
        assert plan.make_plan(config(data, 2)).config["cpu_products"] == expected
    monkeypatch.setattr(machine, "_cpu_flags", lambda: "flags : amx_bf16")
    monkeypatch.setattr(machine.jax, "__version_info__", (0, 12, 0))
    tpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
    assert plan.cpu_products({}, tpu) == "float32"
    assert plan.cpu_products({}, partition.make_mesh()) == "bfloat16"

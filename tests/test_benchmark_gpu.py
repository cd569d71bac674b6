"""The script for accelerators: that it runs, what it writes when, and what it does where memory is short."""

import json

import jax
import pytest

from benchmarks import gpu
from dalle2_jax import benchmark


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """The machine is measured by products and copies that take milliseconds."""
    monkeypatch.setattr(benchmark, "MATRIX_SIDE", {"cpu": 256})
    monkeypatch.setattr(benchmark, "COPY_BYTES", {"cpu": 4 << 20})


@pytest.mark.slow
def test_every_kind_of_case_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", 3)
    path = tmp_path / "gpu.json"
    kinds = ["decoder64_192", "drawing_8", "attention", "decoder64_512_text"]
    assert gpu.main([f"--json={path}", "--debug", f"--cases={','.join(kinds)}"]) == 0
    found = json.loads(path.read_text())
    assert found["failed"] == {} and list(found["cases"]) == kinds and found["debug"]
    for name in ("decoder64_192", "decoder64_512_text"):
        case = found["cases"][name]
        assert case["batch_size"] == 8 and case["planned_memory"] > 0 and case["of_matrix"] > 0
        assert case["seconds_per_example"] == pytest.approx(case["seconds"]["median"] / 8)
    drawing = found["cases"]["drawing_8"]
    stages = [drawing[name] for name in gpu.STAGES]
    assert drawing["seconds_per_picture"] == pytest.approx(sum(s["seconds_per_example"] for s in stages))
    assert not found["cases"]["attention"]["8x8"]["cudnn_ran"]  # on a CPU
    assert f"{drawing['seconds_per_picture']:.3g} s a picture" in capsys.readouterr().out


def test_results_are_written_as_they_come_and_late_cases_are_left_out(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"

    def broken(debug, machine):
        yield {"half": 1}
        assert json.loads(path.read_text())["cases"] == {"attention": {"half": 1}}
        raise jax.errors.JaxRuntimeError("INTERNAL: lost")

    monkeypatch.setitem(gpu.CASES, "attention", broken)
    assert gpu.main([f"--json={path}", "--debug", "--cases=attention"]) == 1
    found = json.loads(path.read_text())
    assert found["cases"] == {"attention": {"half": 1}}
    assert found["failed"] == {"attention": "JaxRuntimeError: INTERNAL: lost"}
    assert gpu.main([f"--json={path}", "--debug", "--cases=attention", "--seconds=0"]) == 1
    assert "left out" in json.loads(path.read_text())["failed"]["attention"]
    with pytest.raises(SystemExit):
        gpu.parse([f"--json={path}", "--cases=decoder"])


def test_half_as_many_where_the_memory_is_not_enough():
    tried = []

    def run(size, fits=16, message="RESOURCE_EXHAUSTED: out of memory"):
        tried.append(size)
        if size > fits:
            raise jax.errors.JaxRuntimeError(message)
        return size

    assert gpu.largest_that_fits(run, 64, 8) == 16 and tried == [64, 32, 16]
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        gpu.largest_that_fits(lambda size: run(size, fits=4), 64, 8)
    tried.clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        gpu.largest_that_fits(lambda size: run(size, message="INTERNAL"), 64, 8)
    assert tried == [64]


def test_the_papers_decoder_is_measured_without_its_text_tower():
    config = gpu.settings(gpu.decoder64, False, text=None, channels=320)
    assert config["model"]["text"] is None and config["model"]["dtype"] == "bfloat16"
    stage = gpu.models.build_stage(config)
    assert stage.context_length is None and stage.net.body["channels"] == 320


@pytest.mark.parametrize(
    ("backend", "ran", "errors", "said"),
    [
        ("gpu", True, (0.01, 0.019), None),
        ("gpu", False, (0.01, 0.01), "cuDNN was not chosen"),
        ("cpu", False, (0.01, 0.01), None),
        ("gpu", True, (0.01, 0.021), "cuDNN's error 0.021, XLA's 0.01"),
        ("gpu", True, (0.01, float("nan")), "cuDNN's error nan"),
    ],
)
def test_a_wrong_kernel_fails_behind_its_numbers(backend, ran, errors, said, tmp_path, monkeypatch):
    row = dict(cudnn_ran=ran, xla=dict(error=errors[0]), cudnn=dict(error=errors[1]))
    monkeypatch.setattr(gpu, "both_attentions", lambda *sizes: row)
    machine = benchmark.measure_machine(gpu.partition.make_mesh(), ["float32"])
    monkeypatch.setattr(benchmark, "measure_machine", lambda *which: machine)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    path = tmp_path / "gpu.json"
    assert gpu.main([f"--json={path}", "--debug", "--cases=attention"]) == bool(said)
    found = json.loads(path.read_text())
    assert found["cases"]["attention"]["8x8"]["cudnn_ran"] is ran
    assert (said in found["failed"]["attention"]) if said else found["failed"] == {}


def test_an_error_that_is_no_number_is_not_lost(monkeypatch):
    attention = gpu.layers.attention

    def broken(q, k, v, *, cudnn):
        return attention(q, k, v, cudnn=False) * (jax.numpy.nan if cudnn else 1)

    monkeypatch.setattr(gpu.layers, "attention", broken)
    monkeypatch.setattr(gpu, "STEPS", 1)
    row = gpu.both_attentions(16, 2, 2)
    assert row["cudnn"]["error"] != row["cudnn"]["error"] and row["xla"]["error"] < 0.1

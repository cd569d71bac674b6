"""What the benchmark counts, and when the comparison with others gives no ratio or no result at all."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from benchmarks import compare, paired
from configs import decoder64
from dalle2_jax import benchmark, flops, models


def side(**changes):
    """One side of a comparison."""
    return paired.Side(**dict(run=lambda: None, batch=4, parameters=1000, flops=10**9) | changes)


def test_a_spread_is_median_and_quartiles_and_turns_round_for_rates():
    spread = benchmark.Spread.of([1.0, 2.0, 4.0, 5.0, 3.0])
    assert (spread.median, spread.low, spread.high) == (3.0, 2.0, 4.0)
    assert spread.relative == pytest.approx(2 / 3)
    rate = spread.rate(12)
    assert (rate.median, rate.low, rate.high) == (4.0, 3.0, 6.0)


def test_a_ratio_is_of_medians_and_is_refused_where_the_times_spread():
    case = paired.Case("x", side(), side())
    steady, wide = [1.0, 1.02, 0.98, 1.0], [1.0, 2.0, 0.5, 3.0]
    result = paired.judged(case, steady, [3 * t for t in steady], 0.1)
    assert result.ratio == pytest.approx(3.0) and "**3.00**" in result.line()
    for ours, peer in ((wide, steady), (steady, wide)):
        result = paired.judged(case, ours, peer, 0.1)
        assert result.ratio is None and result.spread > 0.1 and "refused" in result.line()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(parameters=1021), "parameters"),
        (dict(flops=int(1.06e9)), "flops"),
        (dict(batch=8), "batch"),
        (dict(steps=2), "steps"),
        (dict(precision="bfloat16"), "precision"),
        (dict(guidance=2.0), "guidance"),
    ],
)
def test_unequal_work_is_refused_before_it_is_timed(changes, named):
    def never():
        raise AssertionError("it was run")

    case = paired.Case("x", side(run=never), side(run=never, **changes))
    with pytest.raises(ValueError, match=named):
        paired.measure(case, rounds=3)
    paired.check_equal(paired.Case("x", side(), side(parameters=1015, flops=int(1.04e9))))


def test_both_sides_run_equally_often_and_may_time_themselves():
    calls = []
    ours = side(run=lambda: calls.append("ours") or 2.0)
    peer = side(run=lambda: calls.append("peer") or 3.0)
    result = paired.measure(paired.Case("x", ours, peer), rounds=3)
    assert result.ratio == pytest.approx(1.5) and result.rounds == 3
    assert calls == ["peer", "ours", "ours", "peer"] * 2


def test_options_of_the_comparison_are_checked(capsys):
    for wrong in (["--cases=decoder"], ["--rounds=2"]):
        with pytest.raises(SystemExit):
            compare.parse(wrong)
    said = capsys.readouterr().err
    assert "--cases: decoder unknown" in said and "--rounds must be 3 or more" in said
    assert set(compare.parse([]).cases.split(",")) == compare.CASES.keys()


def test_torchs_arithmetic_is_counted_as_ours():
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(128, 5)
    )
    x, q = torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 6, 4)
    assert compare.flops_of(lambda: net(x)) == 2 * 2 * (16 * 8 * 27 + 128 * 5)
    attended = compare.flops_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attended == 2 * 2 * 2 * 6 * 6 * 4


@pytest.fixture(scope="module")
def config():
    settings = models.to_plain(decoder64.get_config("debug"))
    settings["model"] |= dict(channels=8, image_size=8, attention_resolutions=[4])
    return settings


def test_a_training_step_is_measured(config):
    report = benchmark.run(config, steps=3)
    stage = models.build_stage(config)
    assert report.model_flops == flops.of_step(stage, stage.batch_spec(config["batch_size"]))
    assert report.of_matrix == report.model_flops / report.seconds.median / report.machine.matrix["float32"]
    assert 0 < report.of_matrix < 1 and report.machine.copy > 1e8 and report.of_datasheet is None
    said = json.loads(report.to_json())
    assert said["examples_per_second"]["median"] == config["batch_size"] / report.seconds.median
    assert "% of the products" in "\n".join(report.lines())
    known = dataclasses.replace(report, machine=dataclasses.replace(report.machine, datasheet=1e15))
    assert known.of_datasheet == report.flops_per_second / 1e15


def test_drawing_holds_no_state_of_training_and_the_machine_is_measured_last(config, monkeypatch):
    """A training state is four times the parameters: themselves, two moments and an average."""
    held, order = [], []
    measure_machine, timed = benchmark.measure_machine, benchmark.timed

    def measured(mesh, dtypes):
        order.append("machine")
        return measure_machine(mesh, dtypes)

    def noted(run, *how):
        order.append("stage")
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return timed(run, *how)

    before = sum(x.nbytes for x in jax.live_arrays())
    monkeypatch.setattr(benchmark, "measure_machine", measured)
    monkeypatch.setattr(benchmark, "timed", noted)
    monkeypatch.setattr(benchmark, "MATRIX_SIDE", {"cpu": 64})
    report = benchmark.run(config, sample=8, steps=3, warm_up=0)
    assert order[:2] == ["stage", "machine"]
    parameters = 4 * report.parameters
    assert parameters < held[0] - before < 2 * parameters
    assert benchmark.run(config, sample=8, steps=3, machine=report.machine).machine == report.machine
    assert order.count("machine") == 1


def test_what_cannot_be_measured_is_refused(config):
    with pytest.raises(ValueError, match="--sample=3 does not split"):
        benchmark.run(config, sample=3)
    from configs import clip

    with pytest.raises(ValueError, match="does not draw"):
        benchmark.run(models.to_plain(clip.get_config("debug")), sample=8)


def test_it_loads_no_tensorflow():
    code = "import sys, dalle2_jax.benchmark; sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_memory_is_what_a_run_adds_at_most():
    """In a process of its own: 64 MiB that are freed again count, 32 MiB that were there before do not."""
    code = (
        "import numpy as np; from benchmarks.paired import added_memory; there = np.ones(4 << 20)\n"
        "print(added_memory(lambda: np.ones(8 << 20).sum()), added_memory(lambda: there.sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.split()[0] == "None":
        pytest.skip("this system does not tell how much memory a process held")
    of_both = [int(number) for number in done.stdout.split()]
    assert 60 << 20 < of_both[0] < 72 << 20 and of_both[1] < 8 << 20

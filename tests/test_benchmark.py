"""What the benchmark counts, and when the comparison with others gives no ratio or no result at all."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import compare, first_pictures, jpeg_shards, paired, scores
from benchmarks.trained import Trained
from configs import prior
from dalle2_jax import benchmark
from dalle2_jax.models import flops, models
from tests.data.shards_for_tests import colour_of, sample, write_tar


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
    assert compare.parse([]).rounds is None and compare.ROUNDS.keys() == compare.CASES.keys()


def test_torchs_arithmetic_is_counted_as_ours():
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(128, 5)
    )
    x, q = torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 6, 4)
    assert compare.flops_of(lambda: net(x)) == 2 * 2 * (16 * 8 * 27 + 128 * 5)
    attended = compare.flops_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attended == 2 * 2 * 2 * 6 * 6 * 4


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """The machine is measured by products and copies that take milliseconds."""
    monkeypatch.setattr(benchmark, "MATRIX_SIDE", {"cpu": 256})
    monkeypatch.setattr(benchmark, "COPY_BYTES", {"cpu": 4 << 20})


@pytest.fixture(scope="module")
def config():
    settings = models.to_plain(prior.get_config("debug"))
    settings["model"] |= dict(num_steps=2)
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


ROOT = Path(__file__).resolve().parents[1]


def test_each_case_has_its_rounds_and_the_memory_of_a_warm_start_is_that_of_one(monkeypatch, capsys):
    """Here a start takes 5 MiB where it has to fill the cache, and 1 MiB where it finds it."""
    caches = []

    def start(m, who, cache):
        if who == "peer":
            return 1.0, 2 << 20
        caches.append(cache)
        warm = os.path.isdir(cache) and os.listdir(cache)
        os.makedirs(cache, exist_ok=True)
        Path(cache, "program").touch()
        return 1.0, (1 if warm else 5) << 20

    monkeypatch.setattr(compare, "Models", lambda folder: types.SimpleNamespace(folder=folder))
    monkeypatch.setattr(
        compare, "end_to_end", lambda m: paired.Case("end_to_end", side(), side(), "pictures")
    )
    monkeypatch.setattr(compare, "_start", start)
    monkeypatch.setattr(paired, "PAUSE", 0)
    assert compare.main(["--cases=warm_start,cold_start"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], *row[-3:]) for row in rows] == [
        ("| warm_start", "3", "1", "2 |"),
        ("| cold_start", "3", "5", "2 |"),
    ]
    assert len(set(caches[:5])) == 1 and len(set(caches[5:])) == 5
    assert compare.main(["--cases=cold_start", "--rounds=4"]) == 0
    assert " | 4 | " in capsys.readouterr().out


def test_starts_are_of_the_same_work_or_refused(monkeypatch, capsys):
    unequal = paired.Case("end_to_end", side(), side(flops=2 * 10**9), "pictures")
    monkeypatch.setattr(compare, "Models", lambda folder: types.SimpleNamespace(folder=folder))
    monkeypatch.setattr(compare, "end_to_end", lambda m: unequal)
    monkeypatch.setattr(compare, "_start", None)
    assert compare.main(["--cases=cold_start,warm_start"]) == 1
    said = capsys.readouterr().err
    assert "cold_start: flops differ" in said and "warm_start: flops differ" in said


def test_first_pictures_import_nothing_of_the_other_side_and_measure_their_own_process():
    if first_pictures.peak_memory() is None:
        pytest.skip("this system does not tell how much memory a process held")
    assert first_pictures.peak_memory() > 128 << 20  # of which a child's ru_maxrss begins
    code = "import sys\nfrom benchmarks import first_pictures\nprint(first_pictures.peak_memory())\n"
    code += "sys.exit(bool({'jax', 'torch', 'numpy', 'dalle2_jax'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 20


def test_what_the_priors_program_leaves_out_is_noticed():
    stage = models.build_stage(models.to_plain(prior.get_config("debug")))
    params = jax.eval_shape(stage.init, jax.random.key(0), stage.batch_spec(1))
    batch, keys = stage.batch_spec(4), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))

    def counted(steps, guidance):
        own = dict(num_steps=steps, guidance_scale=guidance, num_candidates=1, method="ddpm")
        return flops.count(lambda p, k, b: stage.sample(p, k, b, **own), params, keys, batch)

    for guidance, rows in ((1.0, 4), (4.0, 8)):
        whole = flops.of_step(stage, stage.batch_spec(rows)) // flops.TRAINING_PASSES
        found = compare.of_whole_sequences(stage, params, counted(10, guidance), 10, rows)
        assert found == 10 * whole > counted(10, guidance)
        with pytest.raises(ValueError, match="in the place of"):
            compare.of_whole_sequences(stage, params, counted(9, guidance), 10, rows)
    with pytest.raises(ValueError, match="in the place of"):
        compare.of_whole_sequences(stage, params, counted(10, 1.0), 10, 8)


def test_the_peers_moments_are_there_before_its_first_run(monkeypatch):
    torch = pytest.importorskip("torch", reason="the peer is in torch")
    made, net = [], torch.nn.Linear(4, 4)

    class Noted(torch.optim.AdamW):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    before = [p.detach().clone() for p in net.parameters()]
    step = compare.torch_step((net,), lambda x: net(x).square().mean(), dict(x=torch.ones(2, 4)))
    assert made[0].defaults["fused"]
    for p, old in zip(net.parameters(), before, strict=True):
        assert {"exp_avg", "exp_avg_sq"} <= made[0].state[p].keys()
        assert p.grad is None and torch.equal(p, old)
    step.run()
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def shards(folder, count):
    """Two tar shards of so many flat PNGs, every one of another colour."""
    for shard in range(2):
        numbers = range(shard * count // 2, (shard + 1) * count // 2)
        members = [member for number in numbers for member in sample(number)]
        write_tar(folder / f"train-{shard:05d}.tar", members)


def test_the_pictures_that_are_decoded_are_those_that_the_pipeline_read(tmp_path, monkeypatch):
    from dalle2_jax.data import transforms

    shards(tmp_path, 1000)
    monkeypatch.setattr(compare, "DATA", dict(count=128, side=8))
    case = compare.data_against_decoding(None, str(tmp_path))
    decode, until_idle, decoded, at = transforms.decode, compare.until_idle, [], []

    def noted(content, **how):
        decoded.append(content)
        return decode(content, **how)

    def idle():
        used = until_idle()
        at.append(len(decoded))
        return used

    monkeypatch.setattr(transforms, "decode", noted)
    monkeypatch.setattr(compare, "until_idle", idle)
    assert case.ours.run() > 0
    first, last = at
    assert first > 32 and last - first == 128 and last == len(decoded)  # it had read ahead, and no further
    ours = decoded[first:]
    decoded.clear()
    assert case.peer.run() > 0
    assert sorted(decoded) == sorted(ours) and len(set(ours)) == 128


def test_cases_of_data_name_the_option_that_they_need():
    with pytest.raises(ValueError, match="--data=FOLDER"):
        compare.data_against_decoding(None, "")


def test_shards_are_written_again_as_jpegs(tmp_path):
    source, out = tmp_path / "png", tmp_path / "jpeg"
    source.mkdir()
    shards(source, 4)
    command = [sys.executable, "-m", "benchmarks.jpeg_shards", str(source), str(out), "--side=32"]
    subprocess.run(command, cwd=ROOT, check=True)
    for shard in range(2):
        with tarfile.open(out / f"train-{shard:05d}.tar") as archive:
            names = [member.name for member in archive]
            keys = [f"{number:09d}" for number in range(2 * shard, 2 * shard + 2)]
            assert names == [f"{key}.{ending}" for key in keys for ending in ("jpg", "txt")]
            picture = Image.open(archive.extractfile(names[0]))
            assert picture.format == "JPEG" and picture.size == (32, 32)
            assert abs(picture.getpixel((9, 9))[0] - colour_of(2 * shard)[0]) < 3


def test_grain_makes_files_larger(tmp_path):
    source, sizes = tmp_path / "png", []
    source.mkdir()
    shards(source, 4)
    for grain in (0, 8):
        out = tmp_path / f"grain{grain}"
        command = [sys.executable, "-m", "benchmarks.jpeg_shards", str(source), str(out)]
        subprocess.run([*command, "--side=64", f"--grain={grain}"], cwd=ROOT, check=True)
        with tarfile.open(out / "train-00000.tar") as archive:
            sizes.append([member.size for member in archive if member.name.endswith(".jpg")])
    assert all(grained > 1.5 * plain for plain, grained in zip(*sizes, strict=True))


def test_grain_is_noise_of_brightness_that_keeps_the_mean_colour():
    plain = Image.new("RGB", (64, 64), (90, 120, 150))
    grained = np.asarray(jpeg_shards.grainy(plain, 8, np.random.default_rng(0)), np.float32)
    assert abs(grained.mean(axis=(0, 1)) - (90, 120, 150)).max() < 0.5
    assert 7.5 < grained.std(axis=(0, 1)).min() and grained.std(axis=(0, 1)).max() < 8.5
    assert np.ptp(grained - (90, 120, 150), axis=-1).max() == 0  # brightness alone: no colour of its own


@pytest.mark.slow
def test_cases_run_and_tell_the_memory_of_both_sides(tmp_path, monkeypatch):
    for name in ("torch", "diffusers", "transformers"):
        pytest.importorskip(name, reason="the peers are diffusers' and transformers' networks")
    monkeypatch.chdir(ROOT)
    path = tmp_path / "compare.json"
    assert compare.main(["--cases=prior_sampling,prior_step", "--rounds=3", f"--json={path}"]) == 0
    found = json.loads(path.read_text())["results"]
    assert [result["name"] for result in found] == ["prior_sampling", "prior_step"]
    for result in found:
        assert result["rounds"] == 3 and result["flops"] > 0 and result["parameters"] > 0
        assert result["ours_memory"] > 0 and result["peer_memory"] > 0


@pytest.mark.parametrize(("gate", "holds"), [(None, None), (np.float64(0.25), True), (0.75, False)])
def test_a_score_and_its_gate_become_json(gate, holds):
    score = scores.share("right", np.array([True, False]), gate)
    assert score.holds is holds
    assert json.loads(json.dumps({"holds": score.holds})) == {"holds": holds}


@pytest.mark.parametrize("field", ["", "caption"])
def test_a_trained_recipe_is_asked_in_the_wordings_that_it_read(tmp_path, field):
    run = Trained(tmp_path, ("model",))
    configs = {"decoder": {"data": {"caption_field": field}}}
    run.model = lambda name="": types.SimpleNamespace(engine=types.SimpleNamespace(configs=configs))
    asked = run.captions("pair", 65)
    assert len(asked) == 65 and (asked[:33], asked[33:]) == (
        (run.captions("pair_seen", 33), run.captions("pair_heldout_relation", 32))
    )
    plain = [
        bool(re.fullmatch(r"an? \w+ \w+ (above|below|to the (left|right) of) an? \w+ \w+", x)) for x in asked
    ]
    assert all(plain) if field else 0 < sum(plain) < 40

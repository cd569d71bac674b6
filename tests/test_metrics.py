"""The writer's files, the arithmetic of progress, and what importing all this costs."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.runtime import metrics


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines() if line]


def events_of(path):
    """(step, tag, value or kind) of all TensorBoard events, read by TensorBoard's own reader."""
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_file_loader", reason="needs tensorboard"
    )
    found = []
    for file in sorted(path.glob("events.out.tfevents.*")):
        for event in loader.LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found.append((event.step, value.tag, value.simple_value if kind == "simple_value" else kind))
    return found


class TestWriter:
    def test_scalars_go_to_json_lines_and_tensorboard(self, tmp_path):
        writer = metrics.Writer(tmp_path)
        writer.scalars(5, {"train/loss": np.float32(0.25), "train/count": 3})
        read = lines_of(tmp_path)  # visible before the writer is closed
        writer.close()
        assert read[0]["step"] == 5 and read[0]["train/loss"] == 0.25 and read[0]["train/count"] == 3.0
        assert (5, "train/loss", 0.25) in events_of(tmp_path)

    def test_a_resumed_run_appends(self, tmp_path):
        for step in (1, 2):
            writer = metrics.Writer(tmp_path)
            writer.scalars(step, {"loss": step})
            writer.close()
        assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]

    def test_a_torn_line_does_not_swallow_the_next(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
        writer = metrics.Writer(tmp_path)
        writer.scalars(3, {"loss": 3})
        writer.close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3 and json.loads(lines[2])["step"] == 3

    def test_what_is_not_a_number_is_null_in_json(self, tmp_path):
        writer = metrics.Writer(tmp_path)
        writer.scalars(1, {"loss": float("nan"), "norm": float("inf"), "fine": 1})
        writer.close()
        text = (tmp_path / "metrics.jsonl").read_text()
        assert "NaN" not in text and "Infinity" not in text
        (line,) = lines_of(tmp_path)
        assert line["loss"] is None and line["norm"] is None and line["fine"] == 1

    def test_images_become_a_png_that_knows_its_captions(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        captions = ["a red star", "一个蓝色的环", "c"]
        writer = metrics.Writer(tmp_path)
        writer.grid(40, "samples", metrics.labelled_grid(images, captions), captions)
        writer.close()
        with Image.open(tmp_path / "samples" / "samples_00000040.png") as png:
            grid = np.asarray(png)
            assert json.loads(png.info["captions"]) == captions
        np.testing.assert_array_equal(grid, metrics.labelled_grid(images, captions))
        assert (40, "samples", "image") in events_of(tmp_path)

    def test_text(self, tmp_path):
        writer = metrics.Writer(tmp_path)
        writer.text(2, "note", "红")
        writer.flush()
        assert lines_of(tmp_path)[0] == {"step": 2, "note": "红"}
        writer.close()
        writer.close()  # twice does no harm

    def test_other_processes_write_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        writer = metrics.Writer(tmp_path / "run")
        writer.scalars(1, {"loss": 1})
        writer.grid(1, "samples", np.zeros((8, 8, 3), np.uint8))
        writer.text(1, "a", "b")
        writer.flush()
        writer.close()
        assert not (tmp_path / "run").exists()

    def test_without_tensorboardx_json_lines_remain(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        writer = metrics.Writer(tmp_path)
        writer.scalars(1, {"loss": 1})
        writer.grid(1, "samples", np.zeros((8, 8, 3), np.uint8), ["x"])
        writer.close()
        assert lines_of(tmp_path)[0]["loss"] == 1 and not list(tmp_path.glob("events*"))

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_events_that_can_be_written_no_more_do_not_stop_the_run(self, tmp_path, caplog):
        """R08: the thread that writes them dies of a full disk; its queue of ten would stay full for ever."""
        writer = metrics.Writer(tmp_path)
        events = writer._board.file_writer.event_writer._ev_writer

        def full(event):
            raise OSError(28, "No space left on device")

        thread = writer._board.file_writer.event_writer._worker
        events.write_event = full
        writer.scalars(1, {"loss": 1})
        thread.join(timeout=30)
        assert not thread.is_alive()
        for step in range(2, 40):
            writer.scalars(step, {"loss": step})
        writer.close()
        assert len(lines_of(tmp_path)) == 39 and "can be written no more" in caplog.text

    def test_absent_wandb_says_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ValueError, match="pip install 'dalle2_jax.wandb.'"):
            metrics.Writer(tmp_path, wandb="project")

    def test_wandb_goes_on_in_the_same_run(self, tmp_path, monkeypatch):
        calls = []

        class Run:
            id = "abc"

            def log(self, values, step):
                calls.append((step, values))

            def finish(self):
                calls.append("finish")

        class Wandb:
            @staticmethod
            def init(**settings):
                calls.append(settings)
                return Run()

        monkeypatch.setitem(sys.modules, "wandb", Wandb)
        for _ in range(2):
            writer = metrics.Writer(tmp_path, wandb="team/project")
            writer.scalars(1, {"loss": 2})
            writer.close()
        assert calls[0]["entity"] == "team" and calls[0]["project"] == "project" and calls[0]["id"] is None
        assert calls[1:3] == [(1, {"loss": 2.0}), "finish"]
        assert calls[3]["id"] == "abc"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class TestProgress:
    def test_speed_and_time_left(self, clock):
        """10 steps in 20 s, 5 of them waiting: 0.5 steps/s, a quarter waiting, 90 more steps take 180 s."""
        out = io.StringIO()
        progress = metrics.Progress(100, batch_size=8, name="decoder", file=out, clock=clock)
        clock.now += 15
        with progress.waiting():
            clock.now += 5
        values = progress.report(10, loss=0.5)
        expected = {"steps_per_s": 0.5, "examples_per_s": 4, "wait": 0.25, "seconds_left": 180}
        assert values == pytest.approx({f"speed/{name}": value for name, value in expected.items()})
        line = out.getvalue()
        assert line.count("\n") == 1 and "\r" not in line
        for part in (
            "decoder 10/100 (10%)",
            "loss 0.5",
            "0.5 steps/s",
            "4 examples/s",
            "wait 25%",
            "20s gone, 3m00s left",
        ):
            assert part in line

    def test_windows_are_independent_and_resuming_counts_from_the_start_step(self, clock):
        progress = metrics.Progress(1000, 500, file=io.StringIO(), clock=clock)
        clock.now += 10
        with progress.waiting():
            clock.now += 10
        first = progress.report(510)
        clock.now += 10
        second = progress.report(520)
        assert first["speed/steps_per_s"] == pytest.approx(0.5) and first["speed/wait"] == pytest.approx(0.5)
        assert second["speed/steps_per_s"] == pytest.approx(1) and second["speed/wait"] == 0
        # 480 steps are left at something between the two speeds
        assert 480 < second["speed/seconds_left"] < 960
        assert "speed/examples_per_s" not in first
        assert progress.report(520) == {}

    def test_slow_input_is_told_but_not_at_the_start_nor_all_the_time(self, clock, caplog):
        progress = metrics.Progress(1000, file=io.StringIO(), clock=clock)
        told = []
        for step in range(10, 110, 10):
            clock.now += 60
            with progress.waiting():
                clock.now += 40 if step != 60 else 1
            progress.report(step)
            told.append(sum("waiting for input" in r.getMessage() for r in caplog.records))
        assert told == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3]
        assert "40% of the time of the last 10 steps was spent waiting for input" in caplog.text

    def test_pauses_do_not_slow_the_steps_but_take_their_time(self, clock):
        """Each 10 steps: 10 s of work and 20 s of evaluation, so 90 more steps take 270 s."""
        progress = metrics.Progress(100, file=io.StringIO(), clock=clock)
        clock.now += 10
        with progress.paused():
            clock.now += 20
        values = progress.report(10)
        assert values["speed/steps_per_s"] == pytest.approx(1)
        assert values["speed/seconds_left"] == pytest.approx(270)

    def test_time_left_follows_a_change_of_speed(self, clock):
        progress = metrics.Progress(2000, file=io.StringIO(), clock=clock)
        for step in range(10, 1001, 10):
            clock.now += 10 if step <= 500 else 40
            values = progress.report(step)
        assert values["speed/seconds_left"] == pytest.approx(4 * 1000, rel=0.25)  # 4 s a step by now, not 2.5
        assert values["speed/seconds_left"] > 3000

    def test_utilisation_where_the_peak_is_known(self, clock, monkeypatch):
        """4 devices of 100 TFLOP/s do 2 steps/s of 80 TFLOP: 160 of 400."""

        class Device:
            device_kind = "Some GPU"

        monkeypatch.setattr(metrics, "PEAK_FLOPS", (("Some GPU", 100e12),))
        monkeypatch.setattr(jax, "devices", lambda: [Device()] * 4)
        out = io.StringIO()
        progress = metrics.Progress(100, flops_per_step=80e12, file=out, clock=clock)
        clock.now += 5
        values = progress.report(10)
        assert values["speed/mfu"] == pytest.approx(0.4) and "speed/gflops" not in values
        assert "MFU 40.0%" in out.getvalue()

    def test_plain_speed_on_a_cpu_and_nothing_when_unknown(self, clock):
        out = io.StringIO()
        progress = metrics.Progress(100, flops_per_step=3e9, file=out, clock=clock)
        clock.now += 5
        values = progress.report(10)
        assert values["speed/gflops"] == pytest.approx(6) and "6 GFLOP/s" in out.getvalue()
        progress = metrics.Progress(100, flops_per_step=-1, file=out, clock=clock)  # XLA's word for unknown
        clock.now += 5
        assert "speed/gflops" not in progress.report(10)

    def test_a_fast_loop_does_not_flood_the_log(self, clock):
        out = io.StringIO()
        progress = metrics.Progress(100, file=out, clock=clock, print_every=5)
        for step in range(1, 101):
            clock.now += 0.1
            assert progress.report(step)["speed/steps_per_s"] == pytest.approx(10)
        printed = [int(line.split("/")[0]) for line in out.getvalue().splitlines()]
        assert printed == [1, 51, 100]  # the first, one 5 s later, the last

    def test_an_error_inside_a_wait_passes(self, clock):
        progress = metrics.Progress(10, file=io.StringIO(), clock=clock)
        with pytest.raises(StopIteration), progress.waiting():
            raise StopIteration


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_peaks_by_device_kind(kind, tera):
    assert metrics.peak_flops(kind) == tera * 1e12


def test_unknown_devices_have_no_peak():
    assert metrics.peak_flops("cpu") is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (59.6, "1m00s"),
        (61, "1m01s"),
        (3599.7, "1h00m"),
        (7800, "2h10m"),
        (200000, "2d07h"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds, shown):
    assert metrics.show_duration(seconds) == shown


def test_nothing_here_needs_tensorflow():
    code = """
import sys, tempfile
sys.modules["tensorflow"] = None
from dalle2_jax.runtime import checkpoint, grid, metrics, partition
from dalle2_jax.train import optim
writer = metrics.Writer(tempfile.mkdtemp())
writer.scalars(1, {"a": 1})
writer.close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
assert not [m for m in sys.modules if m.startswith(("dalle2_jax.models.nets", "dalle2_jax.models.stages"))]
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr

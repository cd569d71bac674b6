"""benchmarks.slices: the commands that it runs, what it writes of their reports, and where it goes on."""

import json
from pathlib import Path

import pytest

from benchmarks import slices, systems


@pytest.fixture
def compiled(monkeypatch):
    """Commands that took the place of preflight's: the one of 1024 chips does not fit, and has status 1."""
    commands = []

    def run(command):
        commands.append(command)
        flags = dict(flag.split("=", 1) for flag in command if flag.startswith("--"))
        batch, slice_ = int(flags["--config.batch_size"]), flags["--topology"]
        (chips,) = [n for n, name in slices.SLICES.items() if name == slice_]
        report = dict(
            chips=chips, batch_size=batch, total=2**31, fits=chips < 1024, seconds=batch / chips / 40
        )
        report |= dict(link_seconds=0.2, utilisation=0.5, utilisation_with_links=0.4, compile_seconds=90.0)
        Path(flags["--json"]).write_text(json.dumps(report))
        if not report["fits"]:
            raise RuntimeError("status 1")

    monkeypatch.setattr(systems, "run", run)
    return commands


def test_all_slices_of_a_network_are_compiled_once(compiled, tmp_path, capsys):
    assert slices.main([f"--out={tmp_path}", "transformer"]) == 0
    # 64 chips with 32 examples each have the whole batch.
    assert len(compiled) == 7 and all("--config.model.net.scan_blocks=True" in x for x in compiled)
    assert [x for x in compiled if "--config.mesh.fsdp=16" in x] == compiled[:2]
    shown = capsys.readouterr().out
    assert "| transformer | 64 | 2048 | 2.0 | 800 | 200.0 | 50.0% (40.0%) | 2 min |" in shown
    assert shown.count("does not fit") == 2
    assert (tmp_path / "slices.md").read_text() in shown
    assert (tmp_path / "slices.png").stat().st_size > 1000
    assert slices.main([f"--out={tmp_path}", "transformer", "--chips=16,64"]) == 0
    assert len(compiled) == 7


def test_examples_a_second_and_chip():
    report = dict(batch_size=64, chips=4, seconds=0.5, link_seconds=0.3)
    assert slices.rates(report) == pytest.approx((32, 20))
    assert slices.rates(report | {"seconds": 0.0}) is None


def test_an_unknown_number_of_chips_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        slices.main([f"--out={tmp_path}", "--chips=12"])
    assert "12 is unknown" in capsys.readouterr().err and not list(tmp_path.iterdir())

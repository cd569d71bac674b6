"""Numbers that README.md and the first table of docs/performance.md repeat from other tables."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a page's tables, without marks of code and bold."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" `*") for cell in line] for line in lines]


def found(text: str, start: str) -> list[str]:
    """The other cells of the row that begins with `start`."""
    return next(row[1:] for row in rows(text) if row[0].startswith(start))


def cases() -> dict[str, list[str]]:
    """Of docs/performance.md: case -> parameters, GFLOP, ours, peer, ratio, spread, MiB of both."""
    return {row[0]: row[1:] for row in rows(page("docs/performance.md")) if len(row) == 9}


def test_readme_has_the_speed_beside_peers():
    steps, sampling = (
        [float(row[4]) for name, row in cases().items() if name.endswith(kinds)]
        for kinds in (("_step",), ("_sampling", "end_to_end"))
    )
    assert len(steps) == len(sampling) == 4
    assert f"{min(steps):.2f} to {max(steps):.2f} times" in page("README.md")
    assert f"{min(sampling):.1f} to {max(sampling):.1f} times" in page("README.md")


def test_readme_has_the_bundled_models_scores():
    section = page("docs/quickstart.md").partition("## The bundled model\n")[2].partition("\n## ")[0]
    right = [found(section, f"two objects, {kind}")[-1] for kind in ("trained", "held-out")]
    assert f"| {' / '.join(right)} right" in page("README.md")
    alone = [found(section, f"one object, {kind}") for kind in ("trained", "held-out")]
    assert {row[-1] for row in alone} == {"1.00"}
    assert f"| {sum(int(row[0]) for row in alone)} of 64 pictures right" in page("README.md")


def test_the_seconds_are_those_of_the_tables_that_they_come_from():
    text = page("docs/performance.md").partition("## To go faster")[0]
    for start, case in {
        "a training step of 8: CLIP": "clip_step",
        "a training step of 8: prior": "prior_step",
        "a training step of 8: decoder": "decoder_step",
        "a training step of 8: upsampler": "upsampler_step",
        "a caption to eight pictures": "end_to_end",
        "reading 512 PNGs": "data_against_decoding",
    }.items():
        assert abs(float(found(text, start)[0]) / float(cases()[case][2]) - 1) < 0.02, start
    total = next(row[2] for row in rows(page("docs/quickstart.md")) if row[0] == "all")
    assert found(text, "[the quickstart]")[0] == total
    studio = {cell for row in rows(page("docs/studio.md")) for cell in row}
    for start in ("[the studio]", "the same, programs cached", "a further request"):
        assert found(text, start)[0] in studio, start
    scaling = {cell for row in rows(page("docs/scaling.md")) for cell in row}
    steps = [row[3] for row in rows(text) if re.match(r"(a step of the paper's|its) ", row[0])]
    assert len(steps) == 5 and {f"{1000 * float(seconds):.0f}" for seconds in steps} <= scaling


def test_readme_has_time_and_memory_of_released_models():
    measured = {(row[2], row[4]) for row in rows(page("docs/models.md")) if len(row) == 5}
    for model in ("Karlo, the open unCLIP", "GLIDE", "ADM 256", "DDPM, churches"):
        _, _, memory, seconds, _ = found(page("README.md"), model)
        assert (seconds, memory) in measured, model

"""python -m benchmarks.slices --out=DIR [--chips=16,64,256,1024] [unet] [transformer]

Compiles a training step of the decoder for slices of v5p, by `dalle2_jax.preflight`: the U-Net of
configs/decoder64.py and the transformer of configs/modern/decoder64.py with its blocks scanned. Each slice
gets 32 examples a chip, and the paper's whole batch of 2048. Parameters are sharded over at most 64 chips
(fsdp); more chips are replicas of those (data). No TPU is needed. A U-Net takes half an hour and 21 GiB to
compile, a transformer a few minutes.

DIR/NAME-CHIPS-BATCH.json is a report of preflight. DIR/slices.md and DIR/slices.png show all that are there:
examples a second and chip, with the links hidden and with what they add. The same command goes on where it
was.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import systems

SLICES = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8", 1024: "v5p:8x8x16"}  # chips: topology
EACH, WHOLE, SHARDED = 32, 2048, 64  # examples a chip; of the whole batch; chips of fsdp at most
SCANNED = ("--config.model.net.scan_blocks=True", "--config.model.text.scan_blocks=True")
NETWORKS = {"unet": ("configs/decoder64.py",), "transformer": ("configs/modern/decoder64.py", *SCANNED)}


def compile_step(network: str, chips: int, batch: int, path: Path) -> None:
    """Write preflight's report of a training step. Raises RuntimeError if there is none."""
    config, *flags = NETWORKS[network]
    fsdp = min(chips, SHARDED)
    command = ["-m", "dalle2_jax.preflight", f"--config={config}", f"--topology={SLICES[chips]}", *flags]
    command += [f"--config.batch_size={batch}", f"--config.mesh.fsdp={fsdp}", "--config.mesh.data=-1"]
    try:
        systems.run([*command, f"--json={path}"])
    except RuntimeError:  # also where it does not fit, as the report then says
        if not path.exists():
            raise


def found(folder: Path) -> list[dict]:
    """The reports of the folder, with `network`, in the order of network, chips and batch."""
    reports = []
    for path in folder.glob("*-*-*.json"):
        network = path.name.split("-")[0]
        reports.append(json.loads(path.read_text()) | {"network": network})
    return sorted(reports, key=lambda x: (x["network"], x["chips"], x["batch_size"]))


def rates(report: dict) -> tuple[float, float] | None:
    """Examples a second and chip if the links are hidden, and if none is; None without an estimate."""
    if not report.get("seconds"):
        return None
    each = report["batch_size"] / report["chips"]
    return each / report["seconds"], each / (report["seconds"] + report["link_seconds"])


def table(reports: list[dict]) -> str:
    """Markdown, one row a report."""
    rows = [
        "| network | chips | batch | memory, GiB | time, ms | links, ms | utilisation | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        speed = rates(report)
        time = (
            f"{report['seconds'] * 1e3:.0f} | {report['link_seconds'] * 1e3:.1f}" if speed else "refused | "
        )
        share = f"{report['utilisation']:.1%} ({report['utilisation_with_links']:.1%})" if speed else ""
        memory = f"{report.get('total', 0) / 2**30:.1f}" + ("" if report["fits"] else ", does not fit")
        took = f"{report['compile_seconds'] / 60:.0f} min"
        cells = (report["network"], report["chips"], report["batch_size"], memory, time, share, took)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows) + "\n"


def plot(reports: list[dict], path: Path) -> None:
    """Examples a second and chip against chips: one panel for a batch a chip, one for a whole batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {f"{EACH} examples a chip": lambda x: x["batch_size"] == EACH * x["chips"]}
    panels |= {f"{WHOLE} examples in all": lambda x: x["batch_size"] == WHOLE}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (title, chosen) in zip(axes, panels.items(), strict=True):
        for colour, network in enumerate(NETWORKS):
            own = [
                (x["chips"], rates(x)) for x in reports if x["network"] == network and chosen(x) and rates(x)
            ]
            if own:
                chips, speeds = zip(*own, strict=True)
                style = dict(color=f"C{colour}", marker="o")
                axis.plot(chips, [a for a, _ in speeds], label=f"{network}, links hidden", **style)
                axis.plot(chips, [b for _, b in speeds], "--", label=f"{network}, links not hidden", **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(SLICES), [str(chips) for chips in SLICES])
        axis.set(title=title, xlabel="chips (v5p)")
    axes[0].set(ylabel="examples / s / chip", ylim=(0, axes[0].get_ylim()[1]))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS)
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--chips", default=",".join(map(str, SLICES)), help="numbers of chips, commas between"
    )
    options = parser.parse_args(arguments)
    try:
        chosen = [int(word) for word in options.chips.split(",")]
    except ValueError:
        chosen = [0]
    if unknown := set(options.networks) - set(NETWORKS) | {str(n) for n in set(chosen) - set(SLICES)}:
        names = f"networks are {', '.join(NETWORKS)}, numbers of chips {', '.join(map(str, SLICES))}"
        parser.error(f"{', '.join(sorted(unknown))} is unknown: {names}")
    options.out.mkdir(parents=True, exist_ok=True)
    for network in options.networks:
        for chips in chosen:
            for batch in dict.fromkeys((EACH * chips, WHOLE)):
                path = options.out / f"{network}-{chips}-{batch}.json"
                if not path.exists():
                    compile_step(network, chips, batch, path)
                reports = found(options.out)
                (options.out / "slices.md").write_text(table(reports))
                plot(reports, options.out / "slices.png")
    print(table(found(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

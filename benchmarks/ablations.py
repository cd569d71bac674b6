"""python -m benchmarks.ablations scenes --out=DIR --clip=WORKDIR --prior=WORKDIR [WAY ...]
python -m benchmarks.ablations emoji_styles --out=DIR --shards=SHARDS --suite=SUITE --judge=MODEL [WAY ...]

Trains small decoders that differ in one thing (`WAYS`, by benchmarks/ablation_recipe.py) for equal CPU time,
draws at four points of each run, and scores. CPU time is that of training steps: `STEPS` steps of a pilot run
are timed, and the run gets as many as fit into --minutes. So other work beside does little harm.

    scenes        pairs of objects that are named right, and single objects; N captions each
    emoji_styles  the caption among the first five of 100, and the style right, by the judge

DIR/DATA/ablations.json, .md and .png get the scores, one row a way, and scores against minutes. The same
command goes on where it was.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import systems
from benchmarks.trained import Trained
from dalle2_jax.runtime import files, partition

WAYS: dict[str, tuple[str, ...]] = {
    "start": (),
    "unet": ("unet",),
    "unet-v": ("unet", "v"),
    "unet-min_snr": ("unet", "v", "min_snr"),
    "min_snr": ("min_snr",),
    "eps": ("eps",),
    "v": ("v",),
    "flow": ("flow",),
    "adamw": ("adamw",),
    "patch": (),  # the other size; see `preset`
    "float32": ("float32",),
}
OTHER_PATCH = {"scenes": "patch4", "emoji_styles": "patch2"}
WARM, STEPS, POINTS = 20, 100, 4  # steps of the two pilot runs, STEPS apart; scored points of a run
N = 128  # captions of a kind


@dataclasses.dataclass(frozen=True)
class Bench:
    """One data set.

    Attributes:
      data: its name. folder: what is written. flags: of training.
      parts: roles and workdirs of a model, besides the decoder.
      score: (folder of a run, model directory's name) -> {name: (share, of how
        many)}; the first name is plotted.
    """

    data: str
    folder: Path
    flags: tuple[str, ...]
    parts: dict[str, str]
    score: Callable[[Path, str], dict[str, tuple[float, int]]]

    def train(self, way: str, workdir: Path, steps: int, *flags: str) -> float:
        """Train to `steps` unless that is done; CPU seconds."""
        words = WAYS[way] + ((OTHER_PATCH[self.data],) if way == "patch" else ())
        preset = ",".join((self.data, *words))
        command = ["-m", "dalle2_jax.train", f"--config=benchmarks/ablation_recipe.py:{preset}"]
        command += [f"--workdir={workdir}", f"--config.num_steps={steps}"]
        command += [f"--config.optim.warmup_steps={min(100, steps // 10)}", *self.flags, *flags]
        return 0.0 if systems.trained(workdir) else systems.run(command)[1]

    def step_seconds(self, way: str) -> float:
        """CPU seconds of a training step, kept in a file."""
        path = self.folder / way / "pilot.json"
        if not path.exists():
            spent = {
                name: self.train(way, self.folder / way / f"pilot_{name}", steps)
                for name, steps in (("compile", WARM), ("few", WARM), ("many", WARM + STEPS))
            }
            path.write_text(json.dumps({"seconds": (spent["many"] - spent["few"]) / STEPS}))
        return json.loads(path.read_text())["seconds"]

    def run(self, way: str, seed: int, minutes: float) -> list[dict]:
        """The scores of one run, a dict for each point, in the order of minutes."""
        seconds, folder = self.step_seconds(way), self.folder / way / f"seed{seed}"
        steps = max(POINTS, int(minutes * 60 / seconds) // POINTS * POINTS)
        every = steps // POINTS
        flags = (f"--config.seed={seed}", f"--config.checkpoint_every={every}", "--config.keep_checkpoints=9")
        self.train(way, folder / "decoder", steps, *flags, f"--config.eval_every={every}")
        systems.make_model(folder, "model", self.parts | {"decoder": "decoder"})
        trained, found = Trained(folder, ("model",)), []
        for step in range(every, steps + 1, every):
            path = folder / f"scores_{step}.json"
            if not path.exists():
                path.write_text(json.dumps(self.score(folder, trained.at_step(step))))
            point = {"way": way, "seed": seed, "step": step, "minutes": step * seconds / 60}
            found.append(point | {"scores": json.loads(path.read_text())})
        return found


def score_scenes(folder: Path, name: str) -> dict[str, tuple[float, int]]:
    """Shares of named pairs and single objects."""
    run = Trained(folder, (name,))
    shares = {}
    for kind in ("pair", "single"):
        captions = run.captions(kind, N)
        shares[f"{kind}s right"] = float(run.named(run.draw(captions), captions).mean()), N
    return shares


def score_suite(suite: Path, judge: Path, folder: Path, name: str) -> dict[str, tuple[float, int]]:
    """Shares of a judged suite by kind, one drawing a caption."""
    drawn, out = folder / "drawn" / name, folder / "judged" / name
    evaluate = ["-m", "dalle2_jax.evaluate"]
    prompts = [f"--prompts={suite / 'prompts.jsonl'}", "--pictures=1", f"--out={drawn}"]
    systems.run([*evaluate, f"--model={folder / 'models' / name}", *prompts])
    judged = ["--metrics=clip_top,class_accuracy", f"--judge={judge}", f"--out={out}"]
    systems.run([*evaluate, f"--images={drawn}", *judged])
    entries = json.loads((out / "report.json").read_text())["metrics"]
    wanted = {key: x for key, x in entries.items() if key.startswith(("clip_top5", "class_accuracy"))}
    first = sorted(wanted, key=lambda key: (key != "clip_top5/train", key))
    return {key: (wanted[key]["value"], wanted[key]["captions"]) for key in first}


# Results


def mean_of(points: list[dict], name: str) -> tuple[float, float]:
    """(mean of the runs, its standard error by the pictures)."""
    values = [point["scores"][name] for point in points]
    n = sum(count for _, count in values)
    p = sum(value * count for value, count in values) / n
    return p, math.sqrt(p * (1 - p) / n)


def table(points: list[dict]) -> str:
    """A row a way, at the end of its runs: Markdown."""
    names = list(points[0]["scores"])
    lines = [f"| way | steps | CPU minutes | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for way in dict.fromkeys(point["way"] for point in points):
        last = max(point["step"] for point in points if point["way"] == way)
        ends = [point for point in points if point["way"] == way and point["step"] == last]
        cells = [f"{p:.2f} ± {error:.2f}" for p, error in (mean_of(ends, name) for name in names)]
        lines.append(f"| {way} | {last} | {ends[0]['minutes']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict], path: Path) -> None:
    """The first score against CPU minutes: a line a way, through the means of its seeds."""
    from matplotlib.figure import Figure

    name = next(iter(points[0]["scores"]))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for way in dict.fromkeys(point["way"] for point in points):
        own = [point for point in points if point["way"] == way]
        steps = sorted({point["step"] for point in own})
        at = [[point for point in own if point["step"] == step] for step in steps]
        minutes = [some[0]["minutes"] for some in at]
        (line,) = axes.plot(minutes, [mean_of(some, name)[0] for some in at], label=way)
        dots = [(point["minutes"], point["scores"][name][0]) for point in own]
        axes.plot(*np.transpose(dots), ".", color=line.get_color())
    axes.set(xlabel="CPU minutes of training", ylabel=name, ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def write(points: list[dict], folder: Path) -> None:
    """Write the three files of the module's docstring."""
    for name, text in (("ablations.json", json.dumps(points, indent=1)), ("ablations.md", table(points))):
        with files.atomic_write(folder / name) as partial:
            partial.write_text(text)
    plot(points, folder / "ablations.png")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=list(OTHER_PATCH))
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=15, help="of CPU time, for each run")
    parser.add_argument("--seeds", default="0,1", help="with commas between")
    parser.add_argument("--clip", type=Path, help="workdir, for scenes")
    parser.add_argument("--prior", type=Path, help="workdir, for scenes")
    parser.add_argument("--shards", type=Path, help="folder, for emoji_styles")
    parser.add_argument("--suite", type=Path, help="of configs/emoji_styles/suite.py, for emoji_styles")
    parser.add_argument("--judge", type=Path, help="model directory, for emoji_styles")
    options = parser.parse_args()
    needed = ("clip", "prior") if options.data == "scenes" else ("shards", "suite", "judge")
    paths = {name: getattr(options, name) for name in needed}
    if missing := [f"--{name}" for name, path in paths.items() if path is None or not path.exists()]:
        parser.error(f"{options.data} needs {', '.join(missing)}")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    partition.initialise()
    paths = {name: path.resolve() for name, path in paths.items()}
    folder = options.out.resolve() / options.data
    if options.data == "scenes":
        parts = {name: str(path) for name, path in paths.items()}
        bench = Bench("scenes", folder, (f"--config.clip={paths['clip']}",), parts, score_scenes)
    else:
        score = functools.partial(score_suite, paths["suite"], paths["judge"])
        bench = Bench("emoji_styles", folder, (f"--config.data.path={paths['shards']}",), {}, score)
    points: list[dict] = []
    for seed in map(int, options.seeds.split(",")):
        for way in options.ways or WAYS:
            points += bench.run(way, seed, options.minutes)
            write(points, folder)
    print(table(points))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compares sampling, edits and training of two commits, to the bit.

python -m benchmarks.same BASE [NEW] --out=DIR [--only=draw,edit,train,resume] [--cases=NAME,...]

BASE and NEW (default HEAD) are commits. Each is checked out under --out, and the same commands run in both.
Hashes differ between kinds of CPU and releases of jax: compare on one machine. Results of an earlier run are
read from found.json in DIR.

  draw    16 pictures of the bundled model, with two seeds
  edit    each edit of a picture of BASE
  train   20 steps of every stage's preset `debug`, and of other settings
  resume  workdirs of BASE, resumed by both for 4 steps

Prints a table; the status is 1 if anything differs or a command fails. All cases take about an hour on two
cores; programs that both commits share are compiled once.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("draw", "edit", "train", "resume")
CAPTIONS = ("a red star above a blue ring", "a yellow circle", "a green cross", "a purple square")
SEEDS = (0, 1)
STEPS, MORE_STEPS = 20, 4
DEVICES = "2"  # of each command

# edit: the arguments of `python -m dalle2_jax.edit`; A and B are pictures of BASE.
EDITS = {
    "variations": ("variations", "A", "--n=2"),
    "variations from noise": ("variations", "A", "--eta=0.5", "--strength=0.6"),
    "interpolate": ("interpolate", "A", "B", "--frames=3"),
    "textdiff": ("textdiff", "A", "a blue ring", "--source=a yellow circle", "--frames=3"),
    "image_to_image": ("image_to_image", "A", "a green cross", "--strength=0.5", "--negative=a circle"),
    "inpaint": ("inpaint", "A", "0.5,0,1,1", "a red star"),
    "outpaint": ("outpaint", "A", "a red star"),
    "invert": ("invert", "A", "--steps=10"),
    "upscale": ("upscale", "A"),
}

# case: (recipe, settings beside those of every case).
TRAININGS = {
    "clip": ("clip.py:debug", ()),
    "prior": ("prior.py:debug", ()),
    "ar_prior": ("ar_prior.py:debug", ()),
    "decoder64": ("decoder64.py:debug", ()),
    "upsampler256": ("upsampler256.py:debug", ()),
    "upsampler1024": ("upsampler1024.py:debug", ()),
    "classifier": ("tiny/classifier.py", ("data.path=debug_64", "optim.warmup_steps=0")),
    "muon": ("upsampler256.py:debug", ("optim.muon_learning_rate=0.02",)),
    "vlb": ("decoder64.py:debug", ("model.loss=vlb",)),
    "inpaint": ("decoder64.py:debug", ("model.inpaint=True",)),
    "labels": ("upsampler256.py:debug", ("model.num_classes=3", "data.classes=('circle', 'square', 'star')")),
    "low_res_noise": ("upsampler256.py:debug", ("model.low_res_noise=0.5",)),
    "last_step": ("upsampler256.py:debug", ("model.last_step=True",)),
    "grad_accum": ("decoder64.py:debug", ("grad_accum=2",)),
}
READ_CLIP = ("prior.py", "ar_prior.py", "decoder64.py")  # recipes with the CLIP of the case "clip"


@dataclasses.dataclass
class Side:
    """One commit, checked out.

    Attributes:
      commit: its hash. folder: of its outputs. found: case -> {name: hash or text}.
    """

    commit: str
    folder: Path
    found: dict[str, dict[str, str]]

    @classmethod
    def checked_out(cls, role: str, name: str, out: Path) -> "Side":
        """Raises ValueError for an unknown commit."""
        named = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
        commit = subprocess.run(named, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if not commit:
            raise ValueError(f"{name} is no commit of {ROOT}")
        folder = out / f"{role}-{commit[:12]}"
        if not (folder / "tree").exists():
            add = ["git", "worktree", "add", "--quiet", "--detach", str(folder / "tree"), commit]
            subprocess.run(add, cwd=ROOT, check=True)
        noted = folder / "found.json"
        return cls(commit, folder, json.loads(noted.read_text()) if noted.exists() else {})

    def run(self, *command: str) -> str:
        """Runs `python -m dalle2_jax.COMMAND ...` in the commit's tree; returns '' or the failure."""
        tree, program = self.folder / "tree", [sys.executable, "-P", "-m", f"dalle2_jax.{command[0]}"]
        environment = os.environ | {"PYTHONPATH": str(tree), "JAX_NUM_CPU_DEVICES": DEVICES}
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run([*program, *command[1:]], cwd=tree, env=environment, **output)
        return "" if done.returncode == 0 else "failed: " + " / ".join(done.stdout.splitlines()[-3:])

    def place(self, case: str) -> Path:
        """The folder of a case."""
        return self.folder / case.replace(" ", "-").replace(":", "-")

    def note(self, case: str, work: Callable[[Path], str], look: Callable[[Path], dict[str, str]]) -> None:
        """Sets found[case] by work(folder), then look(folder), unless an earlier run did."""
        if case in self.found:
            return
        folder = self.place(case)
        shutil.rmtree(folder, ignore_errors=True)
        began, failure = time.monotonic(), work(folder)
        found = {"failed": failure} if failure else look(folder)
        print(f"{self.commit[:12]} {case}: {time.monotonic() - began:.0f} s {failure}", flush=True)
        if not failure:  # else the next run tries again
            self.found[case] = found
            kept = {name: entry for name, entry in self.found.items() if "failed" not in entry}
            (self.folder / "found.json").write_text(json.dumps(kept, indent=1))
        else:
            self.found[case] = found | {"of": self.commit}  # differs from the other side's


def hash_of(array: np.ndarray) -> str:
    """sha256 of an array's bytes, shape and type."""
    array = np.asarray(array)
    about = f"{array.shape} {array.dtype} ".encode()
    return hashlib.sha256(about + np.ascontiguousarray(array).tobytes()).hexdigest()


def outputs_in(folder: Path) -> dict[str, str]:
    """Hashes of the pixels of every PNG file except grids, and of the arrays of every npz file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".png" and path.name != "grid.png":
            found[path.name] = hash_of(np.asarray(Image.open(path)))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found |= {f"{path.name}:{name}": hash_of(arrays[name]) for name in arrays.files}
    return found


def trained_in(folder: Path) -> dict[str, str]:
    """Hashes of the leaves of the last checkpoint, and the scalars that training logged."""
    os.environ["JAX_NUM_CPU_DEVICES"] = DEVICES  # a checkpoint is restored onto as many as saved it
    import orbax.checkpoint as ocp

    last = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / "checkpoints" / str(last) / "state").absolute())
    found = {f"step {last}:{name}": hash_of(leaf) for name, leaf in _leaves(tree)}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        for name, value in scalars.items():
            if name.startswith(("train/loss", "train/grad_norm", "eval/")):
                found[f"{name} at {scalars['step']}"] = repr(value)
    return found


def _leaves(tree, path: str = ""):
    if isinstance(tree, dict | list | tuple):
        for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(part, f"{path}/{name}" if path else str(name))
    elif tree is not None:
        yield path, tree


def reads_clip(case: str) -> bool:
    """Whether the recipe of a case needs a trained CLIP."""
    return TRAININGS[case][0].split(":")[0] in READ_CLIP


def training(side: Side, case: str, workdir: Path, steps: int, of_clip: Side) -> str:
    """Trains a case up to a number of steps, with the CLIP of `of_clip`; returns '' or the failure."""
    recipe, settings = TRAININGS[case]
    every = ("num_steps", "eval_every", "sample_every", "checkpoint_every")
    command = ["train", f"--config=configs/{recipe}", f"--workdir={workdir}", "--config.log_every=1"]
    command += [f"--config.{name}={steps}" for name in every]
    command += [f"--config.{setting}" for setting in settings]
    if reads_clip(case):
        command.append(f"--config.clip={of_clip.place('train:clip')}")
    return side.run(*command)


def compare(base: Side, new: Side, kinds: set[str], chosen: set[str]) -> list[str]:
    """Runs the cases of these kinds on both sides; returns their names. `chosen`: of cases, empty for all."""
    names = []

    def both(case: str, work: Callable[[Side, Path], str], look: Callable[[Path], dict[str, str]]) -> None:
        if not chosen or case.split(":")[1] in chosen:
            names.append(case)
            for side in (base, new):
                side.note(case, lambda folder, side=side: work(side, folder), look)

    if "draw" in kinds:
        for seed in SEEDS:
            how = (*CAPTIONS, "--n=2", f"--seed={seed}")
            both(
                f"draw:seed {seed}",
                lambda s, out, how=how: s.run("generate", *how, f"--out={out}"),
                outputs_in,
            )
    if "edit" in kinds:
        inputs = base.folder / "inputs"
        if not inputs.exists():
            failure = base.run("generate", "a yellow circle", "a red star", "--seed=7", f"--out={inputs}")
            if failure:
                raise ValueError(f"the pictures to edit could not be drawn: {failure}")
        drawn = sorted(path for path in inputs.glob("*.png") if path.name != "grid.png")
        pictures = {"A": str(drawn[0]), "B": str(drawn[1])}
        for name, words in EDITS.items():
            how = tuple(pictures.get(word, word) for word in words)
            both(f"edit:{name}", lambda s, out, how=how: s.run("edit", *how, f"--out={out}"), outputs_in)
    if kinds & {"train", "resume"} and any(chosen & {case} and reads_clip(case) for case in TRAININGS):
        chosen = chosen | {"clip"}
    for case in TRAININGS if kinds & {"train", "resume"} else ():
        both(f"train:{case}", lambda s, w, case=case: training(s, case, w, STEPS, s), trained_in)
    for case in TRAININGS if "resume" in kinds else ():

        def go_on(side: Side, workdir: Path, case=case) -> str:
            shutil.copytree(base.place(f"train:{case}"), workdir)
            return training(side, case, workdir, STEPS + MORE_STEPS, base)  # as the workdir's config says

        both(f"resume:{case}", go_on, trained_in)
    return names


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--out", required=True, type=Path, help="folder of worktrees, outputs and results")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of cases")
    parser.add_argument("--cases", default="", help="names of cases, such as muon,inpaint; default: all")
    options = parser.parse_args(argv)
    kinds, chosen = set(options.only.split(",")), set(filter(None, options.cases.split(",")))
    cases = {f"seed {seed}" for seed in SEEDS} | EDITS.keys() | TRAININGS.keys()
    if unknown := (kinds - set(KINDS)) | (chosen - cases):
        names = f"--only {', '.join(KINDS)}; --cases {sorted(cases)}"
        parser.error(f"{', '.join(sorted(unknown))} unknown: {names}")
    out = options.out.absolute()
    try:
        base, new = (
            Side.checked_out(role, name, out) for role, name in (("base", options.base), ("new", options.new))
        )
        names = compare(base, new, kinds, chosen)
    except ValueError as error:
        parser.error(str(error))
    differ = 0
    print(f"\n| case | hashes | {base.commit[:12]} and {new.commit[:12]} |\n|---|---|---|")
    for case in names:
        one, other = base.found[case], new.found[case]
        changed = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        differ += bool(changed)
        result = f"{len(changed)} differ, such as {changed[0]}" if changed else "equal"
        print(f"| {case} | {len(one)} | {result} |")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

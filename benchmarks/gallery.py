"""python -m benchmarks.gallery --model=MODEL --shards=SHARDS --out=DIR [--styles=... --seed=0]

Draws the gallery of a model of emoji in styles (docs/emoji.md). Every picture comes from a public command,
which is printed as one would type it. Captions are the lists below, or records drawn by --seed before
anything is drawn; no picture is chosen.

    DIR/commands.md         every command, with the file that shows its pictures
    DIR/concepts            concepts by styles; table.png marks the pairs that training did not have
    DIR/variations          of a training picture
    DIR/path                between two training pictures of one style
    DIR/textdiff, ..-N      drawn pictures, and one of them changed by text
    DIR/inpaint, ..-N       a drawn picture, and a part of it drawn anew
    DIR/chinese             Chinese captions of validation records; table.png has the English ones beside
    DIR/validation          fifty validation captions, a file each; table.png says what training lacked
    DIR/records             the training pictures that edits begin with

SHARDS has train-*.tar and val-*.tar of configs/emoji_styles/shards.py. An action that the model's stages
cannot do is left out, which commands.md says.
"""

import argparse
import dataclasses
import json
import random
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import systems
from dalle2_jax.configs.emoji_styles import shards, suite
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.grid import labelled_grid, save_png

WITH_HELD_OUT, WITHOUT, CHINESE, VALIDATION = 5, 3, 8, 50  # concepts of the table; captions
VARIATIONS, FRAMES, INPAINTED, COLUMNS = 7, 8, 3, 10
DIFFS = (  # source, target
    ("a fox in flat style", "a fox in 3D style"),
    ("a red apple, noto style", "a green apple, noto style"),
    ("a grinning face in 3D style", "a crying face in 3D style"),
)
INPAINTS = (  # what is drawn first, box that is drawn anew (left, top, right, bottom), caption
    ("a grinning face in 3D style", "0,0,1,0.45", "a cowboy hat face in 3D style"),
    ("a house in flat style", "0.5,0,1,1", "a house with garden in flat style"),
)
MARKS = {  # kinds of suite.py -> what training lacked
    "pair": "held out",
    "pair_twin": "held out, twin in training",
    "concept": "new concept",
    "concept_new_word": "new concept, new words",
}


@dataclasses.dataclass
class Gallery:
    """The commands of a model, run one after the other, and the lines of commands.md.

    Attributes:
      model: its directory. out: what is written. actions: that the model can do.
    """

    model: Path
    out: Path
    actions: tuple[str, ...]
    lines: list[str] = dataclasses.field(default_factory=list)

    def section(self, title: str, *texts: str) -> None:
        """A heading with paragraphs."""
        self.lines += [f"## {title}", *texts]

    def can(self, action: str) -> bool:
        """Whether the model has an action; a line says if not."""
        if action not in self.actions:
            self.lines.append(f"The model cannot do this: it has {', '.join(self.actions)}.")
        return action in self.actions

    def run(self, name: str, command: str, *arguments: str, shown: str = "grid.png") -> list[Path]:
        """Run `python -m dalle2_jax.COMMAND` into OUT/NAME. Returns the drawn files in their order.

        command: 'generate' or 'edit'. shown: the file in OUT/NAME that shows the pictures.
        """
        words = ["-m", f"dalle2_jax.{command}", *arguments]
        words += [f"--model={self.model}", f"--out={self.out / name}"]
        systems.run(words)
        self.lines.append(f"```bash\n{typed(words)}\n```")
        self.lines.append(f"![{name}]({name}/{shown})")
        drawn = json.loads((self.out / name / f"{command}.json").read_text("utf-8"))
        return [self.out / name / entry["file"] for entry in drawn["pictures"]]

    def table(self, name: str, captions: Sequence[str], marks: Sequence[str], columns: int) -> None:
        """Draw captions into OUT/NAME; table.png labels each with its mark in brackets, and its caption."""
        drawn = self.run(name, "generate", *captions, shown="table.png")
        labels = [
            f"[{mark}] {caption}" if mark else caption for mark, caption in zip(marks, captions, strict=True)
        ]
        save_png(self.out / name / "table.png", labelled_grid(read_pictures(drawn), labels, columns))

    def write(self) -> None:
        """Write commands.md."""
        (self.out / "commands.md").write_text("\n\n".join(self.lines) + "\n", "utf-8")


def typed(words: Sequence[str]) -> str:
    """The command `python WORDS` as it is typed: module and action, then a line for each argument."""
    first = 3 if words[1].endswith(".edit") else 2
    return " \\\n    ".join([shlex.join(["python", *words[:first]]), *map(shlex.quote, words[first:])])


# Records


def read_records(folder: Path, styles: Sequence[str]) -> list[dict]:
    """The records of both splits in these styles: fields of their JSON, 'key' and 'png', in order of keys."""
    found = [
        {"key": key} | record
        for split in ("train", "val")
        for key, record in suite.read(folder, split).items()
        if record["style"] in styles
    ]
    if not found:
        raise SystemExit(f"{folder} has no records of the styles {', '.join(styles)}")
    return sorted(found, key=lambda record: record["key"])


def name_of(record: dict) -> str:
    """The name in the caption of a record, such as 'a dog face' of 'a dog face in flat style'."""
    style = record["style"]
    word = shards.WORDS.get(style, style)
    for template in shards.SKETCH if style == "sketch" else shards.ENGLISH:
        parts = dict(s=word, n="\0", w="(?:render|drawing|icon)", a="an?")
        pattern = template.format(**parts).replace("\0", "(.+)")
        if match := re.fullmatch(pattern, record["caption"]):
            return match[1]
    return shards.with_article(record["concept"])


def chosen_concepts(records: list[dict], styles: Sequence[str], draw: random.Random) -> list[list[dict]]:
    """The records of some concepts that have all styles, in the order of the styles: those with a held-out
    pair first."""
    by_concept: dict[str, dict[str, dict]] = {}
    for record in records:
        if record["heldout"] != "concept":
            by_concept.setdefault(record["concept"], {})[record["style"]] = record
    rows = [[of[style] for style in styles] for of in by_concept.values() if len(of) == len(styles)]
    held_out = [row for row in rows if any(record["heldout"] for record in row)]
    others = [row for row in rows if not any(record["heldout"] for record in row)]
    return [
        *draw.sample(held_out, min(WITH_HELD_OUT, len(held_out))),
        *draw.sample(others, min(WITHOUT, len(others))),
    ]


def marks_of(some: Sequence[dict], records: Sequence[dict]) -> list[str]:
    """What training lacked of some of the records; '' for training records."""
    train = [record for record in records if not record["heldout"]]
    return [MARKS[suite.kind_of(record, train)] if record["heldout"] else "" for record in some]


def write_picture(record: dict, folder: Path) -> Path:
    """The picture of a record as a file."""
    path = folder / f"{record['key']}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record["png"])
    return path


def read_pictures(paths: Sequence[Path]) -> np.ndarray:
    """uint8 [N, H, W, 3] of PNG files of one size."""
    from PIL import Image

    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


# Sections


def concepts(gallery: Gallery, records: list[dict], styles: Sequence[str], draw: random.Random) -> None:
    """Concepts by styles, all in one wording."""
    rows = chosen_concepts(records, styles, draw)
    gallery.section(
        "Concepts and styles",
        f"Concepts drawn by the seed: up to {WITH_HELD_OUT} of those with a pair of concept and style that "
        f"training did not have, up to {WITHOUT} of the others. `concepts/table.png` marks these pairs.",
    )
    if not rows:
        gallery.lines.append("No concept has all styles.")
        return
    words = [shards.WORDS.get(style, style) for style in styles]
    captions = [f"{name_of(row[0])} in {word} style" for row in rows for word in words]
    gallery.table("concepts", captions, marks_of([x for row in rows for x in row], records), len(styles))


def variations(gallery: Gallery, records: list[dict], draw: random.Random) -> None:
    """Variations of a training picture."""
    record = draw.choice([record for record in records if not record["heldout"]])
    gallery.section("Variations", f'Of the training picture "{record["caption"]}", drawn by the seed.')
    if gallery.can("variations"):
        picture = write_picture(record, gallery.out / "records")
        gallery.run("variations", "edit", "variations", str(picture), f"--n={VARIATIONS}")


def paths(gallery: Gallery, records: list[dict], draw: random.Random) -> None:
    """A path between two training pictures of one style."""
    train = [record for record in records if not record["heldout"]]
    first = draw.choice(train)
    same = [record for record in train if record["style"] == first["style"] and record is not first]
    if not same:
        raise SystemExit(f"the training part has one picture of the style {first['style']}")
    second = draw.choice(same)
    gallery.section(
        "From one emoji to another",
        f'The training pictures "{first["caption"]}" and "{second["caption"]}", drawn by the seed.',
    )
    if gallery.can("interpolate"):
        ends = [str(write_picture(record, gallery.out / "records")) for record in (first, second)]
        gallery.run("path", "edit", "interpolate", *ends, f"--frames={FRAMES}")


def textdiffs(gallery: Gallery) -> None:
    """Drawn pictures changed by text."""
    gallery.section("Changed by text", "Captions of a fixed list.")
    if not gallery.can("textdiff"):
        return
    drawn = gallery.run("textdiff", "generate", *(source for source, _ in DIFFS))
    for number, (picture, (source, target)) in enumerate(zip(drawn, DIFFS, strict=True), 1):
        words = ["textdiff", str(picture), target, f"--source={source}", f"--frames={FRAMES}"]
        gallery.run(f"textdiff-{number}", "edit", *words)


def inpaints(gallery: Gallery) -> None:
    """A part of a drawn picture drawn anew."""
    gallery.section("A part drawn anew", "Captions and boxes of a fixed list.")
    if not gallery.can("inpaint"):
        return
    drawn = gallery.run("inpaint", "generate", *(source for source, _, _ in INPAINTS))
    for number, (picture, (_, box, caption)) in enumerate(zip(drawn, INPAINTS, strict=True), 1):
        words = ["inpaint", str(picture), box, caption, f"--n={INPAINTED}"]
        gallery.run(f"inpaint-{number}", "edit", *words)


def captions_of(gallery: Gallery, records: list[dict], draw: random.Random) -> None:
    """Chinese captions, then English ones, of validation records."""
    held_out = [record for record in records if record["heldout"]]
    if not held_out:
        raise SystemExit("the shards have no validation records of these styles")
    some = draw.sample(held_out, min(CHINESE, len(held_out)))
    about = "Of validation records drawn by the seed; their English captions, not given, in brackets."
    gallery.section("Chinese captions", about)
    # their meaning in brackets: not every machine has a font for the captions
    chinese, english = [x["caption_zh"] for x in some], [x["caption"] for x in some]
    gallery.table("chinese", chinese, english, columns=4)
    some = draw.sample(held_out, min(VALIDATION, len(held_out)))
    gallery.section(
        f"{len(some)} validation captions",
        "Drawn by the seed, a picture each; training had none of these pictures. `validation/table.png` says "
        "what training lacked; the folder has every picture at full size.",
    )
    gallery.table("validation", [record["caption"] for record in some], marks_of(some, records), COLUMNS)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--shards", type=Path, required=True, help="folder of train-*.tar and val-*.tar")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--styles", default="3d,flat,noto,twemoji", help="with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the records")
    options = parser.parse_args(arguments)
    styles = options.styles.split(",")
    records = read_records(options.shards, styles)
    options.out.mkdir(parents=True, exist_ok=True)
    partition.initialise()
    gallery = Gallery(options.model, options.out, tuple(Pipeline.load(options.model).actions))
    gallery.lines += ["# Gallery", f"By `{options.model}`; records are drawn by the seed {options.seed}."]

    def draws(section: str) -> random.Random:
        """Of a section alone, so that none depends on another."""
        return random.Random(f"{options.seed} {section}")

    concepts(gallery, records, styles, draws("concepts"))
    variations(gallery, records, draws("variations"))
    paths(gallery, records, draws("path"))
    textdiffs(gallery)
    inpaints(gallery)
    captions_of(gallery, records, draws("captions"))
    gallery.write()
    print(f"\n{options.out / 'commands.md'}")


if __name__ == "__main__":
    main()

"""Writes the captions by which drawings of emoji in styles are judged, with their real pictures.

python configs/emoji_styles/suite.py SHARDS SUITE [--styles=3d,flat,noto,twemoji]

SUITE has the layout of `evaluate --prompts`, so it is both the suite and the reference of its own scores:

    SUITE/prompts.jsonl             a caption a line, with kind, class, others, concept, style, key
    SUITE/00000/samples/0000.png    its real picture

    kind                what the training part has
    train               this picture (a random sample)
    pair                the concept in other styles, the style with other concepts
    pair_twin           the same, and the same design in the sister style (3d and flat, outline and sketch)
    concept             every word of the concept's name, in names of other concepts
    concept_new_word    not every word of it

`others` are 99 captions of other concepts in the same style, so that style is no help to find the right one.
"""

import argparse
import json
import random
import re
import tarfile
from pathlib import Path

STYLES = ("3d", "flat", "noto", "twemoji", "outline", "sketch")
SISTERS = {"3d": "flat", "flat": "3d", "outline": "sketch", "sketch": "outline"}
WORDS = {"3d": "3D"}  # a style's word in captions, where it is not its name
OTHERS = 99


def read(shards: Path, split: str) -> dict[str, dict]:
    """Key -> fields of a record's JSON, with its picture's bytes as 'png'."""
    found: dict[str, dict] = {}
    for shard in sorted(shards.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, end = member.name.rpartition(".")
                record = found.setdefault(key, {})
                if end in ("png", "json") and (file := tar.extractfile(member)):
                    data = file.read()
                    record.update({"png": data} if end == "png" else json.loads(data))
    if not found:
        raise SystemExit(f"{shards} has no {split}-*.tar")
    return found


def words(concept: str) -> set[str]:
    """The words of a concept's name."""
    return set(re.findall(r"\w+", concept.lower()))


def kind_of(record: dict, train: list[dict]) -> str:
    """The kind of a held-out record."""
    if record["heldout"] == "pair":
        sister = SISTERS.get(record["style"])
        twin = any(x["concept"] == record["concept"] and x["style"] == sister for x in train)
        return "pair_twin" if twin else "pair"
    known = set().union(*(words(x["concept"]) for x in train))
    return "concept" if words(record["concept"]) <= known else "concept_new_word"


def lines(train: dict, held_out: dict, styles: list[str], count: int, seed: int) -> list[tuple[dict, bytes]]:
    """(line of the suite, picture) of `count` training records and of all held-out ones, in these styles."""
    draw, of_train = random.Random(seed), list(train.values())
    usable = [{"key": key} | record for key, record in sorted(train.items()) if record["style"] in styles]
    chosen = [record | {"kind": "train"} for record in draw.sample(usable, min(count, len(usable)))]
    for key, record in sorted(held_out.items()):
        if record["style"] in styles:
            chosen.append({"key": key, "kind": kind_of(record, of_train)} | record)
    found = []
    for record in chosen:
        concept, style = record["concept"], record["style"]
        same = (x for x in (*of_train, *held_out.values()) if x["style"] == style and x["concept"] != concept)
        pool = sorted({x["caption"] for x in same} - {record["caption"]})
        line = {"prompt": record["caption"], "class": WORDS.get(style, style)}
        line |= {name: record[name] for name in ("kind", "concept", "style", "key")}
        found.append((line | {"others": draw.sample(pool, min(OTHERS, len(pool)))}, record["png"]))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of train-*.tar and val-*.tar")
    parser.add_argument("suite", type=Path, help="folder to write")
    parser.add_argument("--styles", default=",".join(STYLES), help="with commas between")
    parser.add_argument("--train", type=int, default=200, help="records of the training part")
    parser.add_argument("--seed", type=int, default=0, help="of the training part and of others")
    options = parser.parse_args(arguments)
    parts = read(options.shards, "train"), read(options.shards, "val")
    found = lines(*parts, options.styles.split(","), options.train, options.seed)
    for number, (_, picture) in enumerate(found):
        folder = options.suite / f"{number:05d}" / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0000.png").write_bytes(picture)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line, _ in found)
    (options.suite / "prompts.jsonl").write_text(text, "utf-8")
    kinds = [line["kind"] for line, _ in found]
    print(", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))


if __name__ == "__main__":
    main()

"""Builds the shards of emoji in styles from npm packages: one concept, six styles, captions that name both.

    pip install -e '.[emoji]'
    mkdir packages && cd packages && npm pack @lobehub/fluent-emoji-3d@1.1.0 \\
        @lobehub/fluent-emoji-flat@1.1.0 @iconify-json/noto@1.2.9 @twemoji/svg@15.0.0 openmoji@17.0.0 \\
        emojibase-data@17.0.0 && cd ..
    python configs/emoji_styles/shards.py packages SHARDS

SHARDS gets train-*.tar and val-00000.tar, as img2dataset writes them: KEY.png (RGB, 128 x 128, on white, the
drawing centred with 6 pixels of margin on its longer side), KEY.txt, KEY.json. Squares and diamonds that
differ in size alone keep their sizes. Packages are read as they are; nothing is unpacked.

records.txt, beside this file, is the list of the records. A line has the code points of a concept, the styles
of its training records, after a / those of its validation records, and its name in captions where that is not
its CLDR short name with an article. The list leaves out what was left out of the set: near-duplicates, most
skin tones, country flags, names with a colour in `sketch`, and a part for testing.

The pictures keep their licences, which every record names: MIT (3d, flat), Apache-2.0 (noto), CC BY 4.0
(twemoji), CC BY-SA 4.0 (outline, sketch); the names are Unicode's.
"""

import argparse
import io
import json
import random
import re
import tarfile
from pathlib import Path

from PIL import Image

SIDE, MARGIN, DRAWN = 128, 6, 512  # of a record's picture; DRAWN: of the drawing before it is cut
PER_SHARD = 1000
STYLES = {"3": "3d", "f": "flat", "n": "noto", "t": "twemoji", "o": "outline", "s": "sketch"}
SOURCES = {  # style -> package and version, licence
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "MIT"),
    "flat": ("@lobehub/fluent-emoji-flat@1.1.0", "MIT"),
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "twemoji": ("@twemoji/svg@15.0.0", "CC-BY-4.0"),
    "outline": ("openmoji@17.0.0", "CC-BY-SA-4.0"),
    "sketch": ("openmoji@17.0.0", "CC-BY-SA-4.0"),
}
NAMES = "emojibase-data@17.0.0"
FOLDERS = {"3d": "assets/", "flat": "assets/", "twemoji": "", "outline": "color/svg/", "sketch": "black/svg/"}
ENGLISH = ("{s} emoji of {n}", "{n}, {s} emoji", "{n}, {s} style", "{n} in {s} style", "{a} {s} {w} of {n}")
SKETCH = ("{a} black and white sketch of {n}", "sketch of {n}", "{n}, sketch", *ENGLISH[2:4])
CHINESE = ("{s}风格的{n}", "{n}，{s}风格", "{s}风格表情：{n}", "{n}，{s}表情符号")
WORDS = {"3d": "3D"}  # a style's word in captions, where it is not its name
CHINESE_WORDS = {
    "3d": "3D",
    "flat": "扁平",
    "noto": "Noto",
    "twemoji": "Twemoji",
    "outline": "描边",
    "sketch": "线稿",
}
DRAWINGS = {"3d": "render", "noto": "drawing", "outline": "drawing"}  # else an icon
SIZED = re.compile(r"(.*?)\b(?:large|medium-small|medium|small) (.*\b(?:square|diamond))")


def code_of(name: str) -> str:
    """'0034_20e3' of '34-FE0F-20E3': four digits or more, lower case, without variation selectors."""
    return "_".join(part.zfill(4) for part in re.split("[-_]", name.lower()) if part != "fe0f")


def members(packages: Path, package: str) -> dict[str, bytes]:
    """Name -> bytes of the files in a package of `npm pack`, without their first folder."""
    name, _, version = package.rpartition("@")
    path = packages / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: run npm pack {package} in {packages}")
    with tarfile.open(path) as tar:
        files = ((member, tar.extractfile(member)) for member in tar if member.isfile())
        return {member.name.partition("/")[2]: file.read() for member, file in files if file}


def drawings(packages: Path, style: str) -> dict[str, bytes]:
    """Code -> WebP or SVG of a style."""
    files = members(packages, SOURCES[style][0])
    if style != "noto":
        kept = (name for name in files if re.fullmatch(rf"{FOLDERS[style]}[^/]+\.(?:svg|webp)", name))
        return {code_of(Path(name).stem): files[name] for name in kept}
    icons, chars = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    size = icons.get("width", SIDE), icons.get("height", SIDE)
    found = {}
    for code, name in chars.items():
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if icon := icons["icons"].get(name):
            box = f"0 0 {icon.get('width', size[0])} {icon.get('height', size[1])}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
            found[code_of(code)] = svg.encode()
    return found


def names(packages: Path) -> dict[str, dict]:
    """Code -> {'en', 'zh', 'group', 'keywords'} by the CLDR short names of emojibase."""
    files, found = members(packages, NAMES), {}
    groups = {group["order"]: group["key"] for group in json.loads(files["en/messages.json"])["groups"]}
    for language in ("en", "zh"):
        for entry in json.loads(files[f"{language}/data.json"]):
            for one in (entry, *entry.get("skins", ())):
                about = found.setdefault(code_of(one["hexcode"]), {})
                about[language] = one["label"]
                if language == "en":
                    about["group"], about["keywords"] = groups.get(entry.get("group")), entry.get("tags", [])
    return found


def cut(data: bytes) -> Image.Image:
    """The drawing of a WebP or an SVG, RGBA, cut from its canvas."""
    if not data.startswith(b"RIFF"):
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=DRAWN, height=DRAWN))
    drawn = Image.open(io.BytesIO(data)).convert("RGBA")
    return drawn.crop(drawn.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())


def picture(drawn: Image.Image, longest: int) -> bytes:
    """The PNG of a record: a side of `longest` pixels of the drawing fills the record but for its margin."""
    scale = (SIDE - 2 * MARGIN) / longest
    size = tuple(max(1, round(side * scale)) for side in drawn.size)
    # with the colours of transparent pixels out of the mean
    small = drawn.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    made = Image.new("RGBA", (SIDE, SIDE), "white")
    made.alpha_composite(small, tuple((SIDE - side) // 2 for side in size))
    out = io.BytesIO()
    made.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def sized(name: str) -> str:
    """'black square' of 'black medium square': what differs from others in size alone; '' for other names."""
    found = SIZED.fullmatch(name)
    return found[1] + found[2] if found else ""


def largest(about: dict[str, dict], found: dict[str, bytes]) -> dict[str, int]:
    """Shape -> the longest side of the largest drawing of that shape in a style."""
    sides: dict[str, int] = {}
    for code in about.keys() & found.keys():
        if shape := sized(about[code]["en"]):
            sides[shape] = max(sides.get(shape, 0), *cut(found[code]).size)
    return sides


def with_article(name: str) -> str:
    """'an elf with dark skin tone' of 'elf: dark skin tone'."""
    thing, _, tone = name.partition(": ")
    article = "an" if thing[0] in "aeiou" else "a"
    return f"{article} {thing}" + (f" with {tone}" if tone else "")


def captions(key: str, style: str, name: str, chinese: str) -> tuple[str, str]:
    """(English, Chinese) caption of a record, in wordings drawn by its key."""
    draw, word = random.Random(key), WORDS.get(style, style)
    what = dict(n=name, s=word, w=DRAWINGS.get(style, "icon"), a="an" if word[0] in "aeiou" else "a")
    if style == "sketch":
        what["a"] = "a"
    text = draw.choice(SKETCH if style == "sketch" else ENGLISH).format(**what)
    chinese = " ".join(re.sub("[:,：，、]", " ", chinese).split())
    return text, draw.choice(CHINESE).format(n=chinese, s=CHINESE_WORDS[style])


def read_records(path: Path) -> list[tuple[str, str, str, str]]:
    """(code, style, 'train' or 'val', name in captions or '') of each record of the list."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        entry, _, name = line.partition("\t")
        code, _, styles = entry.partition(" ")
        train, _, val = styles.partition("/")
        parts = [(letter, "train") for letter in train] + [(letter, "val") for letter in val]
        found += [(code, STYLES[letter], split, name) for letter, split in parts]
    return found


def record(entry: tuple[str, str, str, str], about: dict, png: bytes, trained: set[str]) -> tuple[str, dict]:
    """(key, {ending: bytes}) of an entry of the list, about which `names` says this, with its picture.

    trained: codes of the concepts in the training part.
    """
    code, style, split, name = entry
    key, (source, licence) = f"{code}-{style}", SOURCES[style]
    text, chinese = captions(key, style, name or with_article(about["en"]), about["zh"])
    fields = dict(caption=text, caption_zh=chinese, concept=about["en"], style=style, group=about["group"])
    fields |= dict(keywords=about["keywords"], key=key, width=SIDE, height=SIDE)
    held_out = ("pair" if code in trained else "concept") if split == "val" else None
    fields |= dict(license=licence, source=source, heldout=held_out)
    return key, {"png": png, "txt": text.encode(), "json": json.dumps(fields, ensure_ascii=False).encode()}


def write(path: Path, part: list[tuple[str, dict]]) -> None:
    """A tar of records."""
    with tarfile.open(path, "w") as tar:
        for key, files in part:
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder where npm pack was run")
    parser.add_argument("shards", type=Path, help="folder to write")
    parser.add_argument("--records", type=Path, default=Path(__file__).with_name("records.txt"))
    parser.add_argument("--styles", default=",".join(STYLES.values()), help="with commas between")
    options = parser.parse_args(arguments)
    chosen, entries = options.styles.split(","), read_records(options.records)
    about = names(options.packages)
    trained = {code for code, _, split, _ in entries if split == "train"}
    made: dict[str, list] = {"train": [], "val": []}
    for style in chosen:
        found = drawings(options.packages, style)
        sides = largest(about, found)
        for entry in entries:
            code, of_style, split, _ = entry
            if of_style == style and code in found and code in about:
                drawn = cut(found[code])
                longest = sides.get(sized(about[code]["en"]), max(drawn.size))
                made[split].append(record(entry, about[code], picture(drawn, longest), trained))
            elif of_style == style:
                print(f"{code}-{style}: the packages have no drawing or no name of it")
        print(f"{style}: drawn", flush=True)
    options.shards.mkdir(parents=True, exist_ok=True)
    for split, found in made.items():
        random.Random(0).shuffle(found)
        for number, start in enumerate(range(0, len(found), PER_SHARD)):
            write(options.shards / f"{split}-{number:05d}.tar", found[start : start + PER_SHARD])
    print(", ".join(f"{len(found)} records for {split}" for split, found in made.items()))


if __name__ == "__main__":
    main()

"""The picture files of a folder, their captions, and the files that are left out, by reason."""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dalle2_jax.data import records, shards, transforms
from dalle2_jax.runtime import files

MAX_CAPTION_BYTES = 1 << 16
MAX_FILE_BYTES = 1 << 29  # a picture of MAX_PIXELS in 16 bits a channel, not compressed, has 400 million
EXTENSIONS = (*records.IMAGE_EXTENSIONS, *"bmp dib gif tif tiff ppm pgm pbm pnm jfif jpe".split())
_OTHER_PICTURES = frozenset(
    "avif heic heif jxl jp2 j2k tga ico icns psd svg eps pdf exr hdr pfm dds pcx raw dng cr2 nef arw".split()
)
# Files that accompany pictures; they are ignored without being counted.
_TEXTS = frozenset("txt json jsonl csv tsv md html xml yaml yml log parquet".split())
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5\n", b"P6\n")


def decode(data: bytes) -> Image.Image:
    """The RGB picture of a file, upright, transparency on white. Raises BadRecord."""
    return transforms.decode(data, formats=transforms.ALL_FORMATS)


class LeftOut:
    """Counts of pictures that are not measured, by reason, and the first example of each.

    The reasons are those of `records.BadRecord` and, in a folder, 'hidden', 'unreadable', 'other_format',
    'no_picture', 'shard' and 'not_listed'.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None):
        self.counts, self.examples = collections.Counter(counts or {}), dict(examples or {})

    def add(self, reason: str, example: str) -> None:
        """Count a picture, which `example` describes."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def describe(self) -> str:
        """'2 undecodable (such as x.png: ...), 1 animated (such as y.gif: 2 frames)'."""
        such = {reason: f" (such as {example})" for reason, example in self.examples.items()}
        counts = self.counts.items()
        return ", ".join(
            f"{count} {reason.replace('_', ' ')}{such.get(reason, '')}" for reason, count in counts
        )


@dataclasses.dataclass
class Folder:
    """Files in a folder and below, ordered by name: possible pictures, shards, left out files."""

    files: list[Path] = dataclasses.field(default_factory=list)
    shards: list[Path] = dataclasses.field(default_factory=list)
    left: LeftOut = dataclasses.field(default_factory=LeftOut)


def look_through(root: Path) -> Folder:
    """Sort all files in a folder and below. Raises OSError for a folder that cannot be listed."""
    found, visited = Folder(), set()

    def fail(error: OSError):
        raise error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        if os.path.realpath(folder) in visited:  # links may form cycles
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders.sort()
        for name in sorted(names):
            _sort_in(found, root, Path(folder) / name)
    return found


def _sort_in(found: Folder, root: Path, file: Path) -> None:
    """Add a file below `root` to the pictures, the shards or the left out files."""
    key = file.relative_to(root)
    extension = file.suffix[1:].lower()
    picture = extension in EXTENSIONS
    if any(part.startswith(".") for part in key.parts):
        if picture:
            found.left.add("hidden", key.as_posix())
    elif extension == "tar":
        found.shards.append(file)
    elif picture:
        found.files.append(file)
    elif extension in _OTHER_PICTURES:
        found.left.add("other_format", f"{key.as_posix()}: save it as PNG or JPEG")
    elif extension not in _TEXTS:
        if _begins_as_picture(file):
            found.files.append(file)
        else:
            found.left.add("no_picture", key.as_posix())


def _begins_as_picture(file: Path) -> bool:
    """Whether the first bytes of a file are those of a picture format."""
    if not file.is_file():  # opening a pipe would block
        return False
    try:
        with file.open("rb") as opened:
            return opened.read(8).startswith(_SIGNATURES)
    except OSError:
        return False


def read_bytes(file: Path) -> bytes:
    """The bytes of a file. Raises BadRecord for a missing, unreadable or too large file."""
    try:
        if not file.is_file():
            raise records.BadRecord("unreadable", "it is no file")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise records.BadRecord("too_large", f"{file.stat().st_size} bytes")
        return file.read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        raise records.BadRecord("unreadable", error.strerror or "") from None


def read_listed(path: Path) -> tuple[list[tuple[Path, str]], set[Path]]:
    """([(file, caption or '')] of the pictures in generate.json, all files that it names).

    Raises ValueError for a name outside its folder.
    """
    try:
        stored = json.loads(files.read_text(path))
        found = [(str(picture["file"]), picture.get("caption")) for picture in stored["pictures"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as dalle2_jax.generate writes it: {error!r}") from None
    for name, _ in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path} names {name!r}, which lies outside its folder")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path} names {name!r}, which is not there")
    entries = [
        (path.parent / name, shards.clean_caption(text) if isinstance(text, str) else "")
        for name, text in found
    ]
    return entries, {file for file, _ in entries} | {path.parent / str(stored.get("grid"))}


def read_suite(path: Path) -> tuple[list[tuple[Path, str]], set[Path], list[dict]]:
    """([(file, prompt)] of the samples that `prompts` drew into a folder, all its pictures, the line of each
    sample in prompts.jsonl, the file at `path`).

    Raises ValueError for a damaged file, and for a prompt without samples.
    """
    try:
        lines = [json.loads(line) for line in files.read_text(path).split("\n") if line.strip()]
        prompts = [shards.clean_caption(line["prompt"]) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not as dalle2_jax.evaluate writes it: {error!r}") from None
    entries, fields, every = [], [], set()
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=True)):
        folder = path.parent / f"{number:05d}"
        samples = sorted((folder / "samples").glob("*.png"))
        if not samples:
            raise ValueError(f"{folder} has no samples of {prompt!r}: draw the suite again, which goes on")
        entries += [(file, prompt) for file in samples]
        fields += [line] * len(samples)
        every |= {*samples, folder / "grid.png"}
    return entries, every, fields


def caption_beside(file: Path) -> tuple[str, str]:
    """(first line of KEY.txt or '', why it cannot be read or '')."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return "", ""
    try:
        with text.open("rb") as opened:
            data = opened.read(MAX_CAPTION_BYTES + 1)
        if len(data) > MAX_CAPTION_BYTES:  # complete lines only
            data = data[: data.rfind(b"\n", 0, MAX_CAPTION_BYTES) + 1]
        lines = files.decode_text(data, text.name).splitlines()
    except (OSError, ValueError) as error:
        return "", str(error)
    return next(filter(None, map(shards.clean_caption, lines)), ""), ""

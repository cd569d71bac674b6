"""docs/emoji.md: its program makes shards that training reads."""

import json
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dalle2_jax.data import shards

PAGE = Path(__file__).resolve().parents[1] / "docs/emoji.md"
FACES = {f"1f6{i:02x}": f"face {i}" for i in range(200)}


def test_the_program_makes_shards(tmp_path):
    pictures = tmp_path / "noto-emoji/png/128"
    pictures.mkdir(parents=True)
    for key in [*FACES, "2639_fe0f", "e000"]:  # the last has no name
        Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(pictures / f"emoji_u{key}.png")
    derived = {chr(0x2639): {"default": [], "tts": ["man: light skin, tone"]}}
    plain = {chr(int(key, 16)): {"default": [], "tts": [name]} for key, name in FACES.items()}
    plain["\u2640"] = {"default": ["no picture, no name"]}
    for kind, folder, texts in (
        ("annotations", "cldr-annotations-full", plain),
        ("annotationsDerived", "cldr-annotations-derived-full", derived),
    ):
        for language in ("en", "zh"):
            path = tmp_path / "cldr-json/cldr-json" / folder / kind / language / "annotations.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({kind: {"annotations": texts}}), "utf-8")
    program = re.search(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)[1]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert {path.name for path in (tmp_path / "emoji128").iterdir()} == {"val-00000.tar", "train-00000.tar"}
    found = []
    for split in ("train", "val"):
        source = shards.open_tar(str(tmp_path / "emoji128"), split)
        found += [source.read(i) for i in range(len(source))]
    captions = {record.captions["en"][0] for record in found}
    assert len(found) == 201 and captions == {*FACES.values(), "man light skin tone"}
    assert all(record.captions["zh"] for record in found)

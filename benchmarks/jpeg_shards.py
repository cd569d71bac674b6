"""python -m benchmarks.jpeg_shards SOURCE OUT [--side=512] [--quality=90] [--grain=0]

Writes the pictures of the tar shards train-*.tar in SOURCE as JPEGs of side x side pixels, with their
captions (.txt), to shards of the same names in OUT, for `benchmarks.compare --data=OUT`.

--grain adds normal noise of this standard deviation, of 255 levels, to every pixel's brightness: files, and
the time to decode them, become as large as those of photographs.
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dalle2_jax.data import records, transforms
from dalle2_jax.runtime import files


def grainy(picture: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """An RGB picture with normal noise of `deviation` levels, equal in its three colours."""
    noise = rng.normal(0, deviation, (picture.height, picture.width, 1))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("source", type=files.expand)
    parser.add_argument("out", type=files.expand)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--grain", type=float, default=0)
    options = parser.parse_args()
    source, out = Path(options.source), Path(options.out)
    shards = sorted(source.glob("train-*.tar"))
    if not shards:
        parser.error(f"{source} holds no train-*.tar")
    out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in shards:
        with tarfile.open(shard) as old, tarfile.open(out / shard.name, "w") as new:
            for member in old:
                key, _, ending = member.name.rpartition(".")
                if ending not in (*records.IMAGE_EXTENSIONS, "txt"):
                    continue
                content = old.extractfile(member).read()
                if ending != "txt":
                    jpeg, picture = io.BytesIO(), transforms.square(transforms.decode(content), options.side)
                    if options.grain:
                        picture = grainy(picture, options.grain, rng)
                    picture.save(jpeg, "JPEG", quality=options.quality)
                    content, ending = jpeg.getvalue(), "jpg"
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(content)
                new.addfile(entry, io.BytesIO(content))

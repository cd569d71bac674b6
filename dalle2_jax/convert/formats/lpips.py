"""LPIPS with VGG-16: a folder with torchvision's vgg16-*.pth and the linear weights, vgg.pth of LPIPS 0.1."""

from pathlib import Path

from dalle2_jax.convert.tables import Imported, Layout, Row, conv, read_stage
from dalle2_jax.convert.tensors import joined, open_tensors
from dalle2_jax.models.nets.vgg import DEPTHS

HELP = "LPIPS, a folder with torchvision's vgg16-*.pth and LPIPS's vgg.pth"
LICENCE = "BSD, torchvision's and LPIPS's"
_VECTOR = Layout(lambda x, n: [x[None, :, None, None]], lambda xs: xs[0][0, :, 0, 0])


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The frozen stage `features` in the folder `source`."""
    found = sorted(source.glob("vgg16*.pth"))
    if len(found) != 1 or not (source / "vgg.pth").is_file():
        raise FileNotFoundError(f"{source} must hold one vgg16-*.pth of torchvision, and LPIPS's vgg.pth")
    parts = {"vgg.": open_tensors(found[0]), "": open_tensors(source / "vgg.pth")}
    tensors = joined(parts)
    firsts = [sum(DEPTHS[:level]) * 2 + level for level in range(len(DEPTHS))]
    widths = [tensors.shape(f"vgg.features.{first}.weight")[0] for first in firsts]
    config = {"stage": "lpips", "model": {"widths": widths}}
    read = read_stage(config, lambda _: rows(), tensors, ignored=r"vgg\.classifier\..*")
    return Imported({"features": read}, None, [*parts.values()], LICENCE)


def rows() -> list[Row]:
    """The table. torchvision numbers convolutions, activations and poolings in one row."""
    found, number = [], 0
    for level, depth in enumerate(DEPTHS):
        for i in range(depth):
            found += conv(f"net/level_{level}_conv_{i}", f"vgg.features.{number}")
            number += 2
        number += 1
        found.append(Row(f"weights/level_{level}", (f"lin{level}.model.1.weight",), _VECTOR))
    return found

"""ADM's classifier of noised pictures (64x64_classifier.pt, ...), a guide for a decoder.

Sizes follow from the tensors; heads have 64 entries. Its noise schedule is that of ADM's generator of the
same side: cosine at 64 x 64, linear above. Names of classes are read from classes.txt beside the file, a name
a line in the order of ImageNet's numbers; guidance uses the class that a caption names. Without that file the
names are 'class 0', 'class 1', ...
"""

from collections.abc import Mapping
from pathlib import Path

from dalle2_jax.convert.formats.unet import HEAD_DIM, adm_rows, adm_settings
from dalle2_jax.convert.tables import (
    DENSE,
    OPENAI_LICENCE,
    POINTWISE,
    SAME,
    Imported,
    Row,
    dense,
    leaf,
    read_stage,
    under,
)
from dalle2_jax.convert.tensors import Tensors, open_tensors, parted
from dalle2_jax.runtime import files

HELP = "ADM's classifier of noised pictures, a .pt file"


def rows(params: Mapping) -> list[Row]:
    """The table of the classifier; q and kv are tensors that `split_qkv` makes."""
    pool = leaf("position/embedding", "positional_embedding", DENSE)
    for ours, theirs in (("q", "q_proj"), ("kv", "kv_proj"), ("out", "c_proj")):
        pool += dense(ours, theirs, layouts=(POINTWISE, SAME))
    return adm_rows(params) + under("net/pool", pool, "out.2.")


def split_qkv(tensors: Tensors) -> Tensors:
    """`tensors` with the pool's projection split in two: only the first position has a query."""
    third = tensors.shape("out.2.qkv_proj.bias")[0] // 3
    parts = {}
    for kind in ("weight", "bias"):
        for name, rows in (("q_proj", slice(0, third)), ("kv_proj", slice(third, None))):
            parts[f"out.2.{name}.{kind}"] = f"out.2.qkv_proj.{kind}", 0, rows
    return parted(tensors, parts)


def class_names(folder: Path, count: int) -> list[str]:
    """The names of `count` classes; ValueError if classes.txt in `folder` has another number of them."""
    path = folder / "classes.txt"
    if not path.is_file():
        return [f"class {number}" for number in range(count)]
    names = files.read_text(path).splitlines()
    if count and len(names) != count:
        raise ValueError(f"{path} has {len(names)} names, the model {count} classes")
    return names if count else []


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The classifier in the file `source`."""
    tensors = open_tensors(source)
    return Imported({"classifier": read(tensors, source.parent)}, None, [tensors], OPENAI_LICENCE)


def read(tensors: Tensors, folder: Path) -> tuple[dict, dict]:
    """(config, parameters) of a classifier, whose classes' names are in `folder`."""
    tensors = split_qkv(tensors)
    settings, attending = adm_settings(tensors)
    levels = len(settings["channel_mult"])
    last_side = round((tensors.shape("out.2.positional_embedding")[1] - 1) ** 0.5)
    side = last_side * 2 ** (levels - 1)
    model = settings | dict(
        num_classes=tensors.shape("out.2.c_proj.weight")[0],
        image_size=side,
        attention_resolutions=[side // 2**level for level in attending],
        head_dim=HEAD_DIM,
        schedule="cosine" if side <= 64 else "linear",
        net=dict(norm_groups=32),
    )
    data = {"classes": class_names(folder, model["num_classes"])}
    config = {"stage": "classifier", "model": model, "data": data}
    return read_stage(config, rows, tensors)

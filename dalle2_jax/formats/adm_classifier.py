"""ADM's classifier of noised pictures (64x64_classifier.pt and the like), which may steer a decoder.

Sizes are read off the tensors; heads have 64 entries. Its noise is the model's beside which ADM trained it:
the cosine schedule at 64 x 64, the linear one above. What the classes are called is read from classes.txt
beside the file, a name a line in the order of ImageNet's numbers; a caption steers where it holds a name.
"""

from collections.abc import Mapping
from pathlib import Path

from dalle2_jax import models
from dalle2_jax.formats import tables
from dalle2_jax.formats.tables import POINTWISE, Imported, Layout, Row, dense, leaf, under
from dalle2_jax.formats.tensors import Tensors, open_tensors
from dalle2_jax.formats.unet import adm_rows, adm_settings, check_groups

HELP = "ADM's classifier of noised pictures, a .pt file"
LICENCE = "OpenAI's are MIT; of other weights in this layout ask their makers"
HEAD_DIM = 64
TRANSPOSED = Layout(lambda x, n: [x.T], lambda xs: xs[0].T)


def rows(net: Mapping) -> list[Row]:
    """The table of the classifier; q and kv are tensors that `split_qkv` makes."""
    pool = "out.2."
    return [
        *under("net", adm_rows(net["net"], HEAD_DIM)),
        *leaf("net/pool/position/embedding", f"{pool}positional_embedding", TRANSPOSED),
        *dense("net/pool/q", f"{pool}q_proj", layout=POINTWISE),
        *dense("net/pool/kv", f"{pool}kv_proj", layout=POINTWISE),
        *dense("net/pool/out", f"{pool}c_proj", layout=POINTWISE),
        *dense("time/fc1", "time_embed.0"),
        *dense("time/fc2", "time_embed.2"),
    ]


def split_qkv(tensors: Tensors) -> Tensors:
    """`tensors` with the pool's one projection as two: its query is asked of the first position alone."""
    shapes, where = dict(tensors.shapes), {}
    for kind in ("weight", "bias"):
        whole = f"out.2.qkv_proj.{kind}"
        length, *rest = tensors.shape(whole)
        for name, part in (("q_proj", slice(0, length // 3)), ("kv_proj", slice(length // 3, length))):
            shapes[f"out.2.{name}.{kind}"] = (part.stop - part.start, *rest)
            where[f"out.2.{name}.{kind}"] = whole, part
        del shapes[whole]

    def read(name):
        whole, part = where.get(name, (name, slice(None)))
        return tensors[whole][part] if name in where else tensors[name]

    return Tensors(tensors.source, shapes, read, tensors.files)


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The classifier in the file `source`."""
    tensors = split_qkv(open_tensors(source))
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
    )
    names = source.parent / "classes.txt"
    classes = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    if classes and len(classes) != model["num_classes"]:
        raise ValueError(f"{names} has {len(classes)} names, the classifier {model['num_classes']} classes")
    config = {"stage": "classifier", "model": model, "data": {"classes": classes}}
    abstract = models.abstract_params(models.build_stage(config))
    check_groups(abstract["net"], 32, str(source))
    params = tables.imported(rows(abstract), tensors, abstract)
    return Imported({"classifier": (config, params)}, None, [tensors], LICENCE)

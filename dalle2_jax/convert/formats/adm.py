"""ADM's generators, upsamplers and classifiers: one .pt file, or a folder with the files of one model.

The kind of a file follows from its tensors: an upsampler has six input channels, a classifier ends in a pool.
So do all sizes; the first level with attention is always that of 32 x 32, which gives the side. Classes are
conditioned on by their names, as for the classifier: see adm_classifier.py. The LSUN generators
(lsun_bedroom.pt, lsun_cat.pt, lsun_horse.pt) are unconditional ones of 256 x 256, trained with dropout.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from dalle2_jax.convert.formats import adm_classifier
from dalle2_jax.convert.formats.adm_classifier import class_names
from dalle2_jax.convert.formats.unet import HEAD_DIM, adm_rows, adm_settings
from dalle2_jax.convert.tables import OPENAI_LICENCE, Imported, Row, leaf, read_stage
from dalle2_jax.convert.tensors import Tensors, open_tensors

HELP = "ADM's generator, upsampler or classifier, a .pt file, or a folder with the files of one model"
FIRST_ATTENTION = 32
# Settings in ADM's command lines, not in its tensors, by stage and side. Otherwise heads have 64 entries, the
# schedule is linear, and queries, keys and values are ordered by head.
RELEASED: dict[tuple[str, int], dict] = {
    ("decoder", 64): dict(schedule="cosine", blocks=True, dropout=0.1),
    ("decoder", 128): dict(num_heads=4),
    ("upsampler", 256): dict(num_heads=4),
}


def rows(params: Mapping, num_heads: int = 0, blocks: bool = False) -> list[Row]:
    """The table of a generator or an upsampler; arguments as of `adm_rows`."""
    label = leaf("label_embed/embedding", "label_emb.weight") if "label_embed" in params else []
    return adm_rows(params, num_heads=num_heads, blocks=blocks) + label


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The stages in the file, or the folder, `source`."""
    return import_files(source, _stage)


def import_files(
    source: Path, stage_of: Callable[[Tensors, Path], tuple[str, tuple[dict, dict]]]
) -> Imported:
    """The stages in the .pt file, or the folder, `source`; stage_of(tensors, folder) reads one of them."""
    files = sorted(source.glob("*.pt")) if source.is_dir() else [source]
    if not files:
        raise FileNotFoundError(f"{source} holds no .pt file")
    folder, stages, opened = files[0].parent, {}, []
    for path in files:
        tensors = open_tensors(path)
        role, stage = stage_of(tensors, folder)
        if role in stages:
            raise ValueError(f"{source} holds two files for the {role}, {path.name} is one too many")
        stages[role] = stage
        opened.append(tensors)
    return Imported(dict(sorted(stages.items())), None, opened, OPENAI_LICENCE)


def _stage(tensors: Tensors, folder: Path) -> tuple[str, tuple[dict, dict]]:
    """(name of the stage, (config, parameters))."""
    if "out.2.c_proj.weight" in tensors.shapes:
        return "classifier", adm_classifier.read(tensors, folder)
    channels = tensors.shape("input_blocks.0.0.weight")[1]
    if channels not in (3, 6):
        raise ValueError(f"{tensors.source} has {channels} input channels: a generator has 3, an upsampler 6")
    stage = "decoder" if channels == 3 else "upsampler"
    settings, attending = adm_settings(tensors)
    if not attending:
        raise ValueError(f"{tensors.source} has no attention, by which its side is found: it is not of ADM's")
    side = FIRST_ATTENTION * 2 ** attending[0]
    released = dict(RELEASED.get((stage, side), {}))
    blocks, num_heads = released.pop("blocks", False), released.get("num_heads", 0)
    num_classes = tensors.shapes.get("label_emb.weight", (0,))[0]
    model = settings | dict(
        image_size=side,
        attention_resolutions=[side // 2**level for level in attending],
        head_dim=HEAD_DIM,
        num_classes=num_classes,
        learned_variance=tensors.shape("out.2.weight")[0] == 6,
        schedule="linear",
        num_steps=250,
        spacing="adm",
        method="ddpm",
        net=dict(norm_groups=32),
    )
    if stage == "decoder":
        model |= dict(embed_dim=0, guidance_scale=1.0, process=dict(guide_rule="adm"))
        model |= dict(dropout=0.1) if Path(tensors.source).name.startswith("lsun_") else {}
    else:
        model |= dict(low_res_size=side // 4, crop_size=side, resize="linear")
    classes = class_names(folder, num_classes)
    config = {"stage": stage, "model": model | released, "data": {"classes": classes}}
    read = read_stage(config, lambda params: rows(params, num_heads, blocks), tensors)
    return (stage if stage == "decoder" else f"upsampler{side}"), read

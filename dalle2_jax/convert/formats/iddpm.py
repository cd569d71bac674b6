"""Improved DDPM's generators and upsampler: a .pt file of improved-diffusion, or a folder with such files.

The layout is ADM's, but that convolutions halve and double the side. Sizes follow from the tensors: the
first level with attention is that of 16 x 16, which gives the side. RELEASED has what the tensors do not say.
"""

from pathlib import Path

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import adm
from dalle2_jax.convert.formats.adm_classifier import class_names
from dalle2_jax.convert.formats.unet import adm_settings
from dalle2_jax.convert.tables import Imported
from dalle2_jax.convert.tensors import Tensors

HELP = "improved DDPM's generator or upsampler, a .pt file, or a folder with both"
FIRST_ATTENTION = 16
# (stage, side, with classes) -> schedule, T, heads, whether the network reads t 1000 / T.
RELEASED = {
    ("decoder", 32, False): ("cosine", 4000, 4, True),
    ("decoder", 64, False): ("cosine", 4000, 4, True),
    ("decoder", 64, True): ("cosine", 4000, 4, False),
    ("decoder", 256, False): ("linear", 1000, 1, False),
    ("upsampler", 256, True): ("linear", 4000, 4, False),
}


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The stages in the file, or the folder, `source`."""
    return adm.import_files(source, stage_of)


def stage_of(tensors: Tensors, folder: Path) -> tuple[str, tuple[dict, dict]]:
    """(name of the stage, (config, parameters)) in a file. Raises ValueError for one that is not built."""
    if not any(name.endswith(".0.op.weight") for name in tensors.shapes):
        raise ValueError(f"{tensors.source} halves the side by residual blocks: it is ADM's (convert adm)")
    stage = "upsampler" if tensors.shape("input_blocks.0.0.weight")[1] == 6 else "decoder"
    settings, attending = adm_settings(tensors)
    num_classes = tensors.shapes.get("label_emb.weight", (0,))[0]
    side = FIRST_ATTENTION * 2 ** attending[0] if attending else 0
    if (stage, side, num_classes > 0) not in RELEASED:
        raise ValueError(
            f"{tensors.source} is a {stage} of side {side or 'unknown'} with {num_classes} classes: improved "
            f"DDPM's authors released {sorted(RELEASED)}"
        )
    schedule, num_timesteps, num_heads, scaled = RELEASED[stage, side, num_classes > 0]
    net = dict(resample="conv", norm_groups=32) | (dict(time_scale=1000 / num_timesteps) if scaled else {})
    model = settings | dict(
        image_size=side,
        attention_resolutions=[side // 2**level for level in attending],
        num_heads=num_heads,
        dropout=0.3 if side == 32 else 0.0,
        num_classes=num_classes,
        learned_variance=tensors.shape("out.2.weight")[0] == 6,
        schedule=schedule,
        num_timesteps=num_timesteps,
        num_steps=250,
        spacing="adm",
        method="ddpm",
        net=net,
    )
    model |= (
        dict(embed_dim=0, guidance_scale=1.0)
        if stage == "decoder"
        else dict(low_res_size=side // 4, crop_size=side, resize="linear")
    )
    config = {"stage": stage, "model": model, "data": {"classes": class_names(folder, num_classes)}}
    read = tables.read_stage(config, lambda params: adm.rows(params, num_heads), tensors)
    return (stage if stage == "decoder" else f"upsampler{side}"), read

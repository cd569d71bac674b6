"""A transformer upsampler 16 -> 64 on scenes, on patches of 4 pixels: the quickstart's, without a U-Net.

python -m dalle2_jax.train --config=configs/modern/tiny_upsampler.py --workdir=DIR

It trains on windows of 32 pixels and draws whole pictures: positions are relative.
"""

from dalle2_jax.configs.modern import common
from dalle2_jax.configs.tiny import upsampler64


def get_config(preset: str = ""):
    """No presets."""
    config = common.without_unet(upsampler64.get_config(preset))
    config.model.update(
        common.FLOW,
        net=dict(kind="vit", patch_size=4, width=128, depth=4, num_heads=4, bottleneck=0),
    )
    return config

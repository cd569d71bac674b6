"""A transformer decoder at 16 x 16 on scenes, on patches of 2 pixels: the quickstart's, without a U-Net.

python -m dalle2_jax.train --config=configs/modern/tiny.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.modern import common
from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = common.without_unet(decoder.get_config(preset))
    config.model.update(
        common.FLOW,
        net=dict(
            kind="vit",
            patch_size=2,
            width=128,
            depth=6,
            num_heads=4,
            bottleneck=0,
            context_tokens=8,
        ),
    )
    return config

"""DDPM at 256 x 256 (appendix B): CelebA-HQ by default, or LSUN's bedroom, bedroom_large, cat, church.

python -m dalle2_jax.train --config=configs/ddpm/pictures256.py:church --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs.ddpm import common

STEPS = {"": 500_000, "bedroom": 2_400_000, "bedroom_large": 1_150_000, "cat": 1_800_000, "church": 1_200_000}


def get_config(preset: str = ""):
    """`preset`: a key of STEPS; '' is CelebA-HQ."""
    common.common.check_preset(preset, tuple(filter(None, STEPS)))
    config = common.get_config(
        dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), channels=192 if "large" in preset else 128)
    )
    config.model.dropout = 0.0
    config.data.flip = "bedroom" not in preset
    config.optim.learning_rate = 2e-5
    config.batch_size, config.num_steps = 64, STEPS[preset]
    return config

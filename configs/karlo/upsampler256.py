"""Karlo's upsampler, 64 -> 256.

    python -m dalle2_jax.train --config=configs/karlo/upsampler256.py --workdir=DIR --config.data.path=SHARDS

The architecture is that of the released weights but for their second network, which takes the last of seven
steps and was trained against a discriminator. The settings of training are those of configs/upsampler256.py.
`:debug` is the same code in small, with 128 channels: diffusers has 32 groups in each norm.
"""

from dalle2_jax.configs import upsampler256


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    config = upsampler256.get_config(preset)
    config.model.update(scale_shift=False, method="ddpm", spacing="uniform", num_steps=4 if preset else 7)
    if preset:
        config.model.channels = 128
    return config

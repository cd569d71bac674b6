"""Decoder of the paper's cascade in small, 64 x 64: before 64 -> 256 -> 1024; half an hour on two cores.

python -m dalle2_jax.train --config=configs/tiny/decoder64.py --workdir=DIR --config.clip=CLIP

The quickstart's decoder with two more levels around it. With plain cosine most of the steps would go to
times when 64 x 64 pixels already show the whole scene.
"""

from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    config.num_steps = 2600
    config.model.update(image_size=64, channels=8, channel_mult=(1, 2, 4, 8, 12), schedule="cosine:4")
    config.optim.final_fraction = 0.02
    return config

"""Decoder of the paper's cascade in small, 64 x 64: before 64 -> 256 -> 1024; fifteen minutes on two cores.

python -m dalle2_jax.train --config=configs/tiny/decoder64.py --workdir=DIR --config.clip=CLIP
"""

from configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    config.num_steps, config.batch_size = 1200, 16
    config.model.update(image_size=64, channels=16, channel_mult=(1, 2, 4, 6), attention_resolutions=(16, 8))
    config.optim.final_fraction = 0.02
    return config

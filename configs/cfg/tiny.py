"""Classifier-free guidance at 16 x 16 on scenes: captions alone, dropped for a tenth of the examples.

python -m dalle2_jax.train --config=configs/cfg/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.glide import tiny


def get_config(preset: str = ""):
    """No presets."""
    config = tiny.get_config(preset)
    config.model.update(text_drop=0.1, schedule="logsnr", num_timesteps=65_536)
    config.model.net = dict(time_scale=1000 / 65_536)
    return config

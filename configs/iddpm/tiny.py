"""Improved DDPM at 16 x 16 on scenes: DDPM's tiny recipe with a learned variance and cosine noise.

python -m dalle2_jax.train --config=configs/iddpm/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.ddpm import tiny


def get_config(preset: str = ""):
    """No presets."""
    config = tiny.get_config(preset)
    del config.model["process"]
    config.model.update(schedule="cosine", learned_variance=True, scale_shift=True)
    config.model.net = dict(resample="conv")
    config.num_steps = 3000
    return config

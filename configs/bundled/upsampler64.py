"""The bundled model's upsampler64: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/upsampler64.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import upsampler64


def get_config(preset: str = ""):
    """No presets."""
    config = upsampler64.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 800
    return config

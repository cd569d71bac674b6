"""The bundled model's upsampler256: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/upsampler256.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import upsampler256


def get_config(preset: str = ""):
    """No presets."""
    config = upsampler256.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 400
    return config

"""The bundled model's prior: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/prior.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.tiny import prior


def get_config(preset: str = ""):
    """No presets."""
    config = prior.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 4000
    return config

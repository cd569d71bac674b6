"""The quickstart's prior by flow matching, on scenes.

python -m dalle2_jax.train --config=configs/modern/tiny_prior.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.modern import prior as modern
from dalle2_jax.configs.tiny import prior


def get_config(preset: str = ""):
    """No presets."""
    config = prior.get_config(preset)
    config.model.update(modern.FLOW)
    return config

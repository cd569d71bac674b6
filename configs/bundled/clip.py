"""The bundled model's clip: the quickstart's, trained for longer and on captions in English and Chinese.

python -m dalle2_jax.train --config=configs/bundled/clip.py --workdir=DIR
"""

from configs.tiny import clip


def get_config(preset: str = ""):
    """No presets."""
    config = clip.get_config(preset)
    config.data.language = "any"
    config.checkpoint_every = 500
    config.num_steps = 3000
    return config

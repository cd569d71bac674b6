"""The bundled model's clip: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/clip.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import clip


def get_config(preset: str = ""):
    """No presets."""
    config = clip.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 2000
    config.optim.muon_learning_rate = 0.0
    return config

"""The bundled model's decoder: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/decoder.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.tiny import common, decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 6500
    config.ema_decay = 0.998
    config.model.text = dict(common.TEXT, width=96, depth=3, num_heads=6)
    config.optim.final_fraction = 0.02
    return config

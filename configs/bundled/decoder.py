"""The bundled model's decoder: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/decoder.py --workdir=DIR --config.clip=CLIP
"""

from configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 6500
    config.ema_decay = 0.998
    return config

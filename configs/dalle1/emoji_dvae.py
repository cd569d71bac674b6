"""DALL-E 1's dVAE on emoji in styles at 32 x 32: 8 x 8 codes of 256.

python -m dalle2_jax.train --config=configs/dalle1/emoji_dvae.py --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs.dalle1 import tiny_dvae
from dalle2_jax.configs.emoji_styles import common

STEPS = 3500


def get_config(preset: str = ""):
    """No presets."""
    tiny = tiny_dvae.get_config(preset)
    config = common.get_config(num_steps=STEPS, batch_size=32, learning_rate=2e-3)
    config.stage = "tokenizer"
    config.model = tiny.model
    config.model.quantizer.update(
        num_codes=256, tau=(1.0, 1 / 16, 4 * STEPS / 5), beta=(6.6, 6.6 / 4, STEPS / 2)
    )
    config.optim.muon_learning_rate = 0.02
    config.ema_decay = 0.99
    return config

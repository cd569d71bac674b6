"""DALL-E 1's transformer on emoji in styles: 32 tokens of a caption, then the 8 x 8 codes of `emoji_dvae.py`.

python -m dalle2_jax.train --config=configs/dalle1/emoji.py --workdir=DIR --config.data.path=SHARDS \
    --config.frozen.tokenizer=DVAE
"""

from dalle2_jax.configs.dalle1 import tiny
from dalle2_jax.configs.emoji_styles import common


def get_config(preset: str = ""):
    """No presets."""
    small = tiny.get_config(preset)
    config = common.get_config(num_steps=1500, batch_size=32, learning_rate=1e-3)
    config.stage = "token_model"
    config.data.language = "en"
    config.model = small.model
    config.model.update(num_codes=(256,))
    config.model.text.update(vocab_size=2048, context_length=32)
    config.model.net.update(width=160, depth=6, kinds=("row", "column", "row", "row", "column", "conv3"))
    config.tokenizer.context_length = 32
    config.frozen.tokenizer = ""  # workdir or model directory of `emoji_dvae.py`
    config.optim.update(beta2=0.96, weight_decay=0.045, muon_learning_rate=0.02)
    return config

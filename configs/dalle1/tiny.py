"""DALL-E 1's transformer in small: 20 tokens of a caption, then the 8 x 8 codes of `tiny_dvae.py`.

python -m dalle2_jax.train --config=configs/dalle1/tiny.py --workdir=DIR --config.frozen.tokenizer=DVAE
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=4000, batch_size=32, learning_rate=1e-3)
    config.stage = "token_model"
    config.model = dict(
        grids=((8, 8),),
        num_codes=(128,),
        text=dict(vocab_size=512, context_length=20),
        net=dict(width=96, depth=4, num_heads=4, kinds=("row", "column", "row", "conv3")),
    )
    config.frozen.tokenizer = ""  # workdir or model directory of `tiny_dvae.py`
    config.tokenizer.context_length = 20
    config.optim.update(beta2=0.96, weight_decay=0.045, muon_learning_rate=0.02)
    return config

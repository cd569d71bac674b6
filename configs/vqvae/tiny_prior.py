"""VQ-VAE's prior on scenes: gated causal convolutions over the 8 x 8 codes of `tiny.py`, of no class.

python -m dalle2_jax.train --config=configs/vqvae/tiny_prior.py --workdir=DIR --config.frozen.tokenizer=VQ
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=2000, batch_size=32, learning_rate=2e-3)
    config.stage = "pixelsnail"
    net = dict(width=64, hidden=64, num_blocks=2, num_res_blocks=2, kernel=3, attention=False, out_blocks=1)
    config.model = dict(grids=((8, 8),), num_codes=(128,), nets=(net,))
    config.frozen.tokenizer = ""  # workdir or model directory of `tiny.py`
    config.optim.beta2 = 0.99
    return config

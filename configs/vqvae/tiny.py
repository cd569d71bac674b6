"""VQ-VAE on scenes at 32 x 32: 8 x 8 codes of 128.

python -m dalle2_jax.train --config=configs/vqvae/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=2500, batch_size=32, learning_rate=1e-3)
    config.stage = "tokenizer"
    config.model = dict(
        image_size=32,
        net=dict(kind="vqvae", channels=64, residual_channels=32, num_res_blocks=2, strides=(4,)),
        quantizer=dict(kind="vq", num_codes=128, width=32, restart=0.1),
        data_variance=0.25,
    )
    config.data.flip = True
    config.optim.muon_learning_rate = 0.02
    config.ema_decay = 0.99
    return config

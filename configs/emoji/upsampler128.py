"""Upsampler on emoji: 32 -> 128, about ten minutes on two cores.

Why it predicts x0: configs/tiny/upsampler64.py.

python -m dalle2_jax.train --config=configs/emoji/upsampler128.py --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs.emoji import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=600, batch_size=16, learning_rate=1e-3)
    config.stage = "upsampler"
    config.model = dict(
        image_size=128,
        low_res_size=32,
        crop_size=64,
        channels=24,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        dropout=0.0,
        objective="x0",
        num_steps=8,
        spacing="uniform",
        method="ddim",
    )
    config.optim.muon_learning_rate = 0.02
    config.data.low_res_blur = 0.5
    return config

"""Upsampler on emoji: 32 -> 128.

python -m dalle2_jax.train --config=configs/emoji/upsampler128.py --workdir=DIR --config.data.path=SHARDS
"""

from configs.emoji import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=1500, batch_size=16, learning_rate=1e-3)
    config.stage = "upsampler"
    config.model = dict(
        image_size=128,
        low_res_size=32,
        crop_size=64,
        channels=32,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        dropout=0.0,
        objective="v",
        num_steps=15,
        spacing="uniform",
        method="ddim",
    )
    config.optim.muon_learning_rate = 0.02
    config.data.low_res_blur = 0.5
    return config

"""Upsampler on emoji in styles: 32 -> 128; 96 GFLOP a step, about an hour on two cores.

Why it predicts x0: configs/tiny/upsampler64.py.

python -m dalle2_jax.train --config=configs/emoji_styles/upsampler128.py --workdir=DIR \
    --config.data.path=SHARDS
"""

from dalle2_jax.configs.emoji_styles import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=3000, batch_size=16, learning_rate=1e-3)
    config.stage = "upsampler"
    config.model = dict(
        image_size=128,
        low_res_size=32,
        crop_size=64,
        channels=24,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        dropout=0.0,
        objective="x0",
        num_steps=4,
        spacing="uniform",
        method="ddim",
    )
    config.optim.muon_learning_rate = 0.02
    config.data.low_res_blur = 0.5
    return config

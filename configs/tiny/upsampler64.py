"""First upsampler of the quickstart: 16 -> 64, about two minutes and a half on two cores.

python -m dalle2_jax.train --config=configs/tiny/upsampler64.py --workdir=DIR

The small picture says almost all, so a network of this size that predicts the picture itself is soon right;
one that predicts v or eps has to hand the noise through exactly, and what it gets wrong stays as grain.
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=360, batch_size=32, learning_rate=2e-3)
    config.stage = "upsampler"
    config.model = dict(
        image_size=64,
        low_res_size=16,
        crop_size=32,
        channels=16,
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

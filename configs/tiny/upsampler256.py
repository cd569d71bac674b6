"""Second upsampler of the quickstart: 64 -> 256 on crops of a quarter of the side, a minute and a half.

python -m dalle2_jax.train --config=configs/tiny/upsampler256.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=120, batch_size=16, learning_rate=2e-3)
    config.stage = "upsampler"
    config.model = dict(
        image_size=256,
        low_res_size=64,
        crop_size=64,
        channels=16,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        dropout=0.0,
        objective="x0",
        num_steps=2,
        spacing="uniform",
        method="ddim",
    )
    config.optim.muon_learning_rate = 0.02
    config.data.update(path="quickstart_256", low_res_blur=0.5)
    config.num_samples = 4
    return config

"""Improved DDPM's class-conditional upsampler, 64 -> 256 on ImageNet.

python -m dalle2_jax.train --config=configs/iddpm/upsampler256.py --workdir=DIR --config.data.path=PATH

PATH: tar shards with KEY.cls; with --config.data.source=folder a folder of folders by class (ImageNet's).
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """No presets."""
    common.check_preset(preset, ())
    config = common.get_config()
    config.stage = "upsampler"
    config.model = dict(
        image_size=256,
        low_res_size=64,
        crop_size=256,
        channels=192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        num_heads=4,
        num_classes=1000,
        dropout=0.0,
        resize="linear",
        schedule="linear",
        num_timesteps=4000,
        learned_variance=True,
        num_steps=250,
        spacing="adm",
        method="ddpm",
        remat="products",
        net=dict(resample="conv", norm_groups=32),
    )
    config.optim.update(learning_rate=3e-4, warmup_steps=0)
    config.num_steps, config.batch_size = 500_000, 256
    return config

"""Imagen's first upsampler in small, 16 -> 32: an Efficient U-Net that reads the level of the added noise.

python -m dalle2_jax.train --config=configs/imagen/tiny_upsampler.py --workdir=DIR --config.frozen.t5=T5
"""

from dalle2_jax.configs.imagen.tiny import STATES
from dalle2_jax.configs.imagen.upsampler256 import NOISE
from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=10_000, batch_size=16, learning_rate=2e-3)
    config.stage = "upsampler"
    config.model = dict(
        image_size=32,
        low_res_size=16,
        crop_size=32,
        channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=(1, 2, 4),
        attention_resolutions=(4,),
        num_heads=4,
        dropout=0.0,
        scale_shift=False,
        text=dict(STATES),
        text_drop=0.1,
        threshold=99.5,
        objective="x0",
        num_steps=8,
        method="ddim",
        net=dict(efficient=True, context_norm="layer"),
        **NOISE,
    )
    config.optim.muon_learning_rate = 0.02
    config.frozen.t5 = ""
    return config

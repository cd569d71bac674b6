"""Imagen's first upsampler, 64 -> 256, an Efficient U-Net of 600M parameters.

python -m dalle2_jax.train --config=configs/imagen/upsampler256.py --workdir=DIR --config.data.path=SHARDS
--config.frozen.t5=T5
"""

from dalle2_jax.configs.imagen import common

# Noise of any level in training, a fifth in sampling (section 2.4).
NOISE = dict(low_res_noise=1.0, low_res_level=0.2, resize="linear")


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(
        "upsampler",
        dict(
            image_size=256,
            low_res_size=64,
            crop_size=256,
            channels=128,
            channel_mult=(1, 2, 4, 8),
            num_res_blocks=(2, 4, 8, 8),
            attention_resolutions=(16,),
            num_heads=8,
            dropout=0.0,
            scale_shift=False,
            text=dict(common.STATES, width=1024),
            num_steps=128,
            guidance_scale=8.0,
            net=dict(efficient=True, context_norm="layer", norm_groups=32, emb_dim=1024),
            **NOISE,
        ),
    )
    config.frozen.t5 = ""
    return config

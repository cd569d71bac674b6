"""Imagen's base model, captions -> 64 x 64, 2.3B parameters without T5.

python -m dalle2_jax.train --config=configs/imagen/decoder.py --workdir=DIR --config.data.path=SHARDS
--config.frozen.t5=T5
"""

from dalle2_jax.configs.imagen import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(
        "decoder",
        dict(
            image_size=64,
            embed_dim=0,
            channels=512,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(32, 16, 8),
            head_dim=64,
            dropout=0.0,
            text=dict(common.STATES, width=2048),
            num_steps=256,
            guidance_scale=7.0,
            net=dict(context_norm="layer", norm_groups=32),
        ),
    )
    config.optim.optimizer = "adafactor"
    config.frozen.t5 = ""  # the model directory of T5 v1.1 XXL
    return config

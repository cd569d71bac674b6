"""Imagen's second upsampler, 256 -> 1024: attention to the text alone, trained on windows of 256 pixels.

python -m dalle2_jax.train --config=configs/imagen/upsampler1024.py --workdir=DIR --config.data.path=SHARDS
--config.frozen.t5=T5
"""

from dalle2_jax.configs.imagen import upsampler256


def get_config(preset: str = ""):
    """No presets."""
    config = upsampler256.get_config(preset)
    config.model.update(
        image_size=1024,
        low_res_size=256,
        attention_resolutions=(64,),
        schedule="linear",
        num_steps=32,
    )
    config.model.net.context_only = True
    return config

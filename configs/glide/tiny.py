"""GLIDE at 16 x 16 on scenes: captions alone.

python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    del config.model["image_drop"]
    config.model.update(embed_dim=0, guidance_scale=3.0, weighting="snr:1,0.1,5")
    # Half of the times are in nearly pure noise, where only the caption tells what is there: to learn to read.
    config.model.process = dict(time_shift=16.0, time_shift_share=0.5)
    config.model.text.update(width=128, depth=2)
    # Relations of equal frequency in many wordings are not learned in so few steps.
    config.data.update(path="uneven_64", caption_field="caption")
    config.num_steps, config.optim.final_fraction = 5500, 0.02
    return config

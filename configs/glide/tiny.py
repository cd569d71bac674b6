"""GLIDE at 16 x 16 on scenes: captions alone.

python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    del config.model["image_drop"]
    config.model.update(embed_dim=0, guidance_scale=3.0, weighting="snr:1,0.1,5")
    config.model.text.update(width=128, depth=2)
    config.num_steps, config.optim.final_fraction = 5500, 0.02
    return config

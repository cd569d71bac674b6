"""GLIDE at 16 x 16 on scenes: captions alone.

python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    del config.model["image_drop"]
    # Captions are read in much noise, where no picture shows yet: twice the cosine's noise.
    config.model.update(
        embed_dim=0,
        channels=24,
        head_dim=24,
        text_drop=0.1,
        schedule="cosine:2",
        weighting="snr:1,0.1,5",
        guidance_scale=3.0,
    )
    config.model.text.update(width=128, depth=2)
    config.num_steps, config.optim.final_fraction = 7500, 0.02
    return config

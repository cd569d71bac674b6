"""GLIDE at 16 x 16 on scenes: captions alone.

It trains in three parts. The first is in nearly pure noise, where only the caption tells what is there. The
second has less noise; without it the network forgets what it reads. The third has uniform times.

python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=READER \
    --config.model.process.time_shift=16 --config.num_steps=1000
python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=RELATIONS \
    --config.model.process.time_shift=3 --config.num_steps=1200 --config.init_from=READER
python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=DIR --config.init_from=RELATIONS
"""

from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    del config.model["image_drop"]
    config.model.update(
        embed_dim=0, guidance_scale=3.0, weighting="snr:1,0.1,5", process=dict(time_shift=1.0)
    )
    config.model.text.update(width=128, depth=2)
    # Relations of equal frequency in many wordings are not learned in so few steps.
    config.data.update(path="uneven_64", caption_field="caption")
    config.num_steps, config.optim.final_fraction = 3300, 0.02
    return config

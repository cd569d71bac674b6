"""GLIDE at 16 x 16 on scenes: captions alone.

It trains in three parts. The first is in nearly pure noise, where only the caption tells what is there. The
second has less noise. The third has uniform times, for shapes.

python -m dalle2_jax.train --config=configs/glide/tiny.py:reader --workdir=READER
python -m dalle2_jax.train --config=configs/glide/tiny.py:relations --workdir=RELATIONS \
    --config.init_from=READER
python -m dalle2_jax.train --config=configs/glide/tiny.py --workdir=DIR --config.init_from=RELATIONS
"""

from dalle2_jax.configs import common
from dalle2_jax.configs.tiny import decoder

# Of each part: process.time_shift, steps, the rate of Muon, and the share of dropped captions. At .02 the
# third forgets what the others read. Captions are dropped in the last part only, as the paper fine-tunes for
# guidance.
PARTS = {
    "reader": (16.0, 1000, 0.02, 0.0),
    "relations": (3.0, 1200, 0.02, 0.0),
    "": (1.0, 3000, 0.01, 0.2),
}


def get_config(preset: str = ""):
    """The last part; presets `reader` and `relations`: those before it."""
    common.check_preset(preset, tuple(PARTS))
    config = decoder.get_config()
    del config.model["image_drop"]
    shift, steps, rate, drop = PARTS[preset]
    config.model.update(
        embed_dim=0,
        guidance_scale=3.0,
        text_drop=drop,
        weighting="snr:1,0.1,5",
        process=dict(time_shift=shift),
    )
    config.model.text.update(width=128, depth=2)
    # Relations of equal frequency in many wordings are not learned in so few steps.
    config.data.update(path="uneven_64", caption_field="caption")
    config.optim.update(muon_learning_rate=rate, learning_rate=rate / 10, final_fraction=0.02)
    config.num_steps = steps
    return config

"""Classifier-free guidance at 16 x 16 on scenes: captions alone, dropped for a tenth of the examples.

It trains in the three parts of `configs/glide/tiny.py`:

python -m dalle2_jax.train --config=configs/cfg/tiny.py:reader --workdir=READER
python -m dalle2_jax.train --config=configs/cfg/tiny.py:relations --workdir=RELATIONS \
    --config.init_from=READER
python -m dalle2_jax.train --config=configs/cfg/tiny.py --workdir=DIR --config.init_from=RELATIONS
"""

from dalle2_jax.configs.glide import tiny


def get_config(preset: str = ""):
    """The last part; presets `reader` and `relations`: those before it."""
    config = tiny.get_config(preset)
    config.model.update(schedule="logsnr", num_timesteps=65_536, text_drop=0.1)
    config.model.net = dict(time_scale=1000 / 65_536)
    if not preset:
        config.num_steps = 2000  # GLIDE needs 3,000
    return config

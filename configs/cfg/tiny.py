"""Classifier-free guidance at 16 x 16 on scenes: captions alone, dropped for a tenth of the examples.

It trains in the three parts of `configs/glide/tiny.py`:

python -m dalle2_jax.train --config=configs/cfg/tiny.py --workdir=READER \
    --config.model.process.time_shift=16 --config.num_steps=1000
python -m dalle2_jax.train --config=configs/cfg/tiny.py --workdir=RELATIONS \
    --config.model.process.time_shift=3 --config.num_steps=1200 --config.init_from=READER
python -m dalle2_jax.train --config=configs/cfg/tiny.py --workdir=DIR --config.init_from=RELATIONS
"""

from dalle2_jax.configs.glide import tiny


def get_config(preset: str = ""):
    """No presets."""
    config = tiny.get_config(preset)
    config.model.update(text_drop=0.1, schedule="logsnr", num_timesteps=65_536)
    config.model.net = dict(time_scale=1000 / 65_536)
    return config

"""Third stage of the paper's cascade in small: 256 -> 1024 on crops of an eighth of the side, six minutes.

python -m dalle2_jax.train --config=configs/tiny/upsampler1024.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import upsampler256


def get_config(preset: str = ""):
    """No presets."""
    config = upsampler256.get_config(preset)
    config.num_steps, config.batch_size = 300, 8
    config.model.update(image_size=1024, low_res_size=256, crop_size=128, tile=512)
    config.data.path = "quickstart_1024"
    config.num_samples, config.eval_batches = 1, 2
    return config

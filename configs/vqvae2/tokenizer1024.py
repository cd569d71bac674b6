"""VQ-VAE-2 at 1024 x 1024, of faces: 32 x 32, 64 x 64 and 128 x 128 codes.

python -m dalle2_jax.train --config=configs/vqvae2/tokenizer1024.py --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs.vqvae2 import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    return common.get_config(1024, (8, 2, 2), 304_741)

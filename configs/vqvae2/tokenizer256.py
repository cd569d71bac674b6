"""VQ-VAE-2 at 256 x 256: 32 x 32 and 64 x 64 codes, 1.72M parameters.

python -m dalle2_jax.train --config=configs/vqvae2/tokenizer256.py --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs.vqvae2 import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    return common.get_config(256, (4, 2), 2_207_444)

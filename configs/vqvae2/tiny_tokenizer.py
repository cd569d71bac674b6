"""VQ-VAE-2's tokenizer on scenes at 32 x 32: 4 x 4 and 8 x 8 codes of 64.

python -m dalle2_jax.train --config=configs/vqvae2/tiny_tokenizer.py --workdir=DIR
"""

from dalle2_jax.configs.vqvae import tiny


def get_config(preset: str = ""):
    """No presets."""
    config = tiny.get_config(preset)
    config.model.net.strides = (4, 2)
    config.model.quantizer.num_codes = 64
    # By Muon the upper codes collapse to one (docs/systems.md).
    config.optim.update(muon_learning_rate=0.0, learning_rate=2e-3)
    return config

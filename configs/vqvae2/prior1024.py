"""VQ-VAE-2's priors of 1024 x 1024, of faces: PixelSNAIL over 32 x 32, 64 x 64 and 128 x 128 codes of 512.

    python -m dalle2_jax.train --config=configs/vqvae2/prior1024.py --workdir=DIR
    --config.data.path=SHARDS --config.frozen.tokenizer=VQ

The levels have the sizes of `prior256.py`; the paper gives none of the middle's. Faces have no classes.
"""

from dalle2_jax.configs.vqvae2 import prior256


def get_config(preset: str = ""):
    """No presets."""
    config = prior256.get_config(preset)
    top, below = config.model.nets
    config.model.update(
        grids=((32, 32), (64, 64), (128, 128)), num_codes=(512,) * 3, nets=(top, below, below), num_classes=0
    )
    return config

"""VQ-VAE-2's priors of 256 x 256: PixelSNAIL over 32 x 32 and 64 x 64 codes of 512, of ImageNet's classes.

    python -m dalle2_jax.train --config=configs/vqvae2/prior256.py --workdir=DIR
    --config.data.path=SHARDS --config.frozen.tokenizer=VQ

Sizes after the paper's table 2, of which no count of parameters is known. The paper trains the priors apart,
with batches of 1024 and 512.
"""

from dalle2_jax.configs.vqvae2 import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.common.get_config()
    config.stage = "pixelsnail"
    net = dict(width=512, hidden=2048, num_blocks=4, num_res_blocks=5, num_heads=8, kernel=5, dropout=0.1)
    below = dict(hidden=1024, upper_blocks=20, attention=False)
    config.model = dict(
        grids=((32, 32), (64, 64)),
        num_codes=(512, 512),
        nets=(net | dict(out_blocks=20), net | below),
        num_classes=1000,
        dtype="bfloat16",
    )
    config.frozen.tokenizer = ""  # workdir or model directory of `tokenizer256.py`
    config.batch_size, config.num_steps = 1024, 1_600_000
    config.mesh.update(data=1, fsdp=-1)
    return config

"""VQ-VAE's prior of 128 x 128: gated causal convolutions over 32 x 32 codes of 512, of ImageNet's classes.

    python -m dalle2_jax.train --config=configs/vqvae/prior128.py --workdir=DIR
    --config.data.path=SHARDS --config.frozen.tokenizer=VQ

The paper names a PixelCNN without its sizes; depth and width are those of gated PixelCNN (arXiv 1606.05328).
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """No presets."""
    common.check_preset(preset, ())
    config = common.get_config()
    config.stage = "pixelsnail"
    net = dict(width=384, hidden=384, num_blocks=4, num_res_blocks=5, kernel=5, attention=False)
    config.model = dict(grids=((32, 32),), num_codes=(512,), nets=(net,), num_classes=1000, dtype="bfloat16")
    config.frozen.tokenizer = ""  # workdir or model directory of `pictures128.py`
    config.batch_size, config.num_steps = 1024, 200_000
    config.mesh.update(data=1, fsdp=-1)
    return config

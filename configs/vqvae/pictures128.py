"""VQ-VAE at 128 x 128 (section 4.1): 32 x 32 codes of 512. The encoder has 2.37M parameters.

python -m dalle2_jax.train --config=configs/vqvae/pictures128.py --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """No presets."""
    common.check_preset(preset, ())
    config = common.get_config()
    config.stage = "tokenizer"
    sizes = dict(channels=256, residual_channels=256, num_res_blocks=2)
    config.model = dict(
        image_size=128,
        net=dict(kind="vqvae", **sizes, strides=(4,), halved=False),
        # a book with its own loss, as in the paper's experiments; decay=.99 is its appendix A.1
        quantizer=dict(kind="vq", num_codes=512, width=64, beta=0.25, decay=0.0),
    )
    config.data.flip = True
    config.optim.update(learning_rate=2e-4, warmup_steps=0)
    config.batch_size, config.num_steps = 128, 250_000
    return config

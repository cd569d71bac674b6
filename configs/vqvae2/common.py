"""What the tokenizers of VQ-VAE-2 share (table 1 of the paper)."""

from dalle2_jax.configs import common


def get_config(image_size: int, strides: tuple[int, ...], num_steps: int):
    """A recipe; strides: of the levels, the bottom's first. The data's path is missing."""
    config = common.get_config()
    config.stage = "tokenizer"
    config.model = dict(
        image_size=image_size,
        net=dict(kind="vqvae", channels=128, residual_channels=64, num_res_blocks=2, strides=strides),
        quantizer=dict(kind="vq", num_codes=512, width=64, beta=0.25, decay=0.99),
    )
    config.data.flip = True
    config.optim.update(learning_rate=3e-4, warmup_steps=0)
    config.batch_size, config.num_steps = 128, num_steps
    return config

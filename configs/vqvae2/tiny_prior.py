"""VQ-VAE-2's priors on scenes: PixelSNAIL over the codes of `tiny_tokenizer.py`, by colour and shape.

python -m dalle2_jax.train --config=configs/vqvae2/tiny_prior.py --workdir=DIR --config.frozen.tokenizer=VQ
"""

from dalle2_jax.configs.tiny import classifier, common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=5000, batch_size=32, learning_rate=2e-3)
    config.stage = "pixelsnail"
    config.data.classes = tuple(classifier.get_config().data.classes)
    net = dict(width=64, hidden=64, num_blocks=2, num_res_blocks=2, num_heads=4, kernel=3, out_blocks=1)
    config.model = dict(
        grids=((4, 4), (8, 8)),
        num_codes=(64, 64),
        nets=(net, net | dict(upper_blocks=2)),
        num_classes=36,
        label_drop=0.1,
    )
    config.frozen.tokenizer = ""  # workdir or model directory of `tiny_tokenizer.py`
    config.optim.beta2 = 0.99
    return config

"""DALL-E 1's dVAE on scenes at 32 x 32: 8 x 8 codes of 128.

python -m dalle2_jax.train --config=configs/dalle1/tiny_dvae.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import common

STEPS = 2500


def get_config(preset: str = ""):
    """No presets. The temperature falls over four fifths of the run; the KL loses weight over half of it."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=STEPS, batch_size=32, learning_rate=2e-3)
    config.stage = "tokenizer"
    config.model = dict(
        image_size=32,
        net=dict(kind="dvae", channels=32, num_groups=3),
        quantizer=dict(
            kind="gumbel",
            num_codes=128,
            width=32,
            tau=(1.0, 1 / 16, 4 * STEPS / 5),
            # A code has a quarter of the paper's values. In so few steps a weight that begins at 0, as the
            # paper's, lets most codes die (docs/systems.md).
            beta=(6.6, 6.6 / 4, STEPS / 2),
        ),
        likelihood="logit_laplace",
        min_scale=0.1,  # backgrounds have one colour; see `reconstruction`
    )
    config.data.flip = True
    config.optim.muon_learning_rate = 0.02
    config.ema_decay = 0.99
    return config

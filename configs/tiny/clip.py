"""CLIP of the quickstart: a convolutional image tower at 32 x 32, about two minutes on two cores.

python -m dalle2_jax.train --config=configs/tiny/clip.py --workdir=DIR

Of 100 distinct unseen captions it then finds the right one for more than 80 % of the pictures.
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=700, batch_size=128, learning_rate=2e-3)
    config.stage = "clip"
    config.model = dict(
        embed_dim=common.EMBED_DIM,
        image_size=32,
        vision=dict(kind="resnet", width=16, depths=(1, 1, 1), num_heads=4),
        text=common.TEXT,
    )
    config.optim.update(beta2=0.98, weight_decay=0.05, muon_learning_rate=0.02)
    config.data.group = 2  # a scene and its twin, with one difference
    config.ema_decay = 0.99
    return config

"""CLIP on emoji in styles: a convolutional image tower at 64 x 64; 30 TFLOP, about six minutes on two cores.

python -m dalle2_jax.train --config=configs/emoji_styles/clip.py --workdir=DIR --config.data.path=SHARDS
"""

from dalle2_jax.configs.emoji_styles import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=800, batch_size=128, learning_rate=1e-3)
    config.stage = "clip"
    config.model = dict(
        embed_dim=common.EMBED_DIM,
        image_size=64,
        vision=dict(kind="resnet", width=24, depths=(1, 1, 1), num_heads=4),
        text=common.TEXT,
    )
    config.optim.update(beta2=0.98, weight_decay=0.1, warmup_steps=50, muon_learning_rate=0.02)
    config.ema_decay = 0.99
    return config

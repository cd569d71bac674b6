"""CLIP of noised 16 x 16 pictures, to guide the quickstart's decoder; its tokenizer is the other CLIP's.

python -m dalle2_jax.train --config=configs/tiny/noisy_clip.py --workdir=DIR \
    --config.tokenizer.path=CLIP/tokenizer
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=1500, batch_size=128, learning_rate=2e-3)
    config.stage = "clip"
    config.model = dict(
        embed_dim=common.EMBED_DIM,
        image_size=16,
        vision=dict(kind="vit", patch_size=2, width=64, depth=3, num_heads=4),
        text=common.TEXT,
        noise=dict(schedule="cosine"),
    )
    config.data.group = 2
    config.optim.update(beta2=0.98, weight_decay=0.05)
    config.ema_decay = 0.99
    return config

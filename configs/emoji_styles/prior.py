"""Diffusion prior on emoji in styles; 115 TFLOP, about twenty minutes on two cores.

python -m dalle2_jax.train --config=configs/emoji_styles/prior.py --workdir=DIR --config.clip=CLIP \
    --config.data.path=SHARDS
"""

from dalle2_jax.configs.emoji_styles import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=3000, batch_size=64, learning_rate=1e-3)
    config.stage = "prior"
    config.model = dict(
        embed_dim=common.EMBED_DIM,
        text=dict(common.TEXT, width=192, depth=6, num_heads=6),
        text_drop=0.1,
        num_steps=64,
        num_candidates=2,
        guidance_scale=1.0,
    )
    config.optim.update(beta2=0.98, muon_learning_rate=0.02)
    return config

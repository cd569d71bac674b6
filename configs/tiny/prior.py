"""Diffusion prior of the quickstart: a causal transformer of four layers, about two minutes on two cores.

python -m dalle2_jax.train --config=configs/tiny/prior.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=900, batch_size=64, learning_rate=1e-3)
    config.stage = "prior"
    config.model = dict(
        embed_dim=common.EMBED_DIM,
        text=dict(vocab_size=512, context_length=32, width=96, depth=4, num_heads=4),
        text_drop=0.1,
        num_steps=64,
        method="ddpm",
        num_candidates=2,
        guidance_scale=1.0,
    )
    config.optim.update(beta2=0.98, weight_decay=0.01, muon_learning_rate=0.02)
    return config

"""Autoregressive prior beside the quickstart's diffusion prior: 32 codes of 64 values.

python -m dalle2_jax.train --config=configs/tiny/ar_prior.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=2000, batch_size=64, learning_rate=1e-3)
    config.stage = "ar_prior"
    config.model = dict(
        embed_dim=common.EMBED_DIM,
        text=dict(vocab_size=512, context_length=32, width=96, depth=2, num_heads=4),
        latent=dict(width=96, depth=4, num_heads=4),
        num_components=48,
        num_buckets=64,
        num_dot_buckets=16,
        fit_rows=8192,
        num_candidates=2,
    )
    config.optim.update(beta2=0.98, weight_decay=0.01, muon_learning_rate=0.02)
    return config

"""A text encoder of T5's shape for Imagen's tiny recipe: it restores masked captions. It is no T5.

python -m dalle2_jax.train --config=configs/imagen/tiny_t5.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=3000, batch_size=64, learning_rate=2e-3)
    vocab_size = common.TEXT["vocab_size"]
    config.stage = "t5"
    config.data.path = "complete_64"  # T5 has read of what the pictures do not show
    config.model = dict(
        vocab_size=vocab_size + 1,  # the last id stands for masked tokens
        mask_token=vocab_size,
        mask_rate=0.3,
        width=64,
        depth=2,
        num_heads=4,
        head_dim=16,
        mlp_width=128,
        context_length=common.TEXT["context_length"],
    )
    config.optim.muon_learning_rate = 0.02
    return config

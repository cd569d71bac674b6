"""Decoder on emoji: 32 x 32, about half an hour on two cores.

python -m dalle2_jax.train --config=configs/emoji/decoder.py --workdir=DIR --config.clip=CLIP \
    --config.data.path=SHARDS
"""

from dalle2_jax.configs.emoji import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=2000, batch_size=32, learning_rate=2e-3)
    config.stage = "decoder"
    config.model = dict(
        image_size=32,
        embed_dim=common.EMBED_DIM,
        channels=24,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=24,
        dropout=0.1,
        text=common.TEXT,
        image_drop=0.2,
        text_drop=0.2,
        objective="v",
        learned_variance=False,
        num_steps=50,
        method="ddim",
        guidance_scale=2.0,
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02, final_fraction=0.1)
    return config

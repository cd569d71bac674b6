"""Decoder of the quickstart: 16 x 16, about twelve minutes on two cores.

python -m dalle2_jax.train --config=configs/tiny/decoder.py --workdir=DIR --config.clip=CLIP

At this size a network that predicts v learns the background, which eps leaves to the first, noisiest steps;
the paper's learned variance matters to samplers of many steps and is left out here. Muon needs about half
the steps of AdamW. Both conditions are dropped often enough that guidance has an unconditional network to
lean on.
"""

from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=2600, batch_size=32, learning_rate=2e-3)
    config.stage = "decoder"
    config.model = dict(
        image_size=16,
        embed_dim=common.EMBED_DIM,
        channels=32,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=16,
        dropout=0.0,
        text=dict(common.TEXT, depth=1),
        image_drop=0.2,
        text_drop=0.2,
        objective="v",
        learned_variance=False,
        num_steps=25,
        method="ddim",
        guidance_scale=2.0,
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02, final_fraction=0.25)
    config.ema_decay = 0.997
    return config

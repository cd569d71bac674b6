"""A transformer decoder at 16 x 16 on scenes, on patches of 2 pixels: the quickstart's, without a U-Net.

python -m dalle2_jax.train --config=configs/modern/tiny.py --workdir=DIR --config.clip=CLIP
"""

from dalle2_jax.configs.tiny import decoder

UNET = ("channels", "channel_mult", "num_res_blocks", "attention_resolutions", "head_dim")


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    for name in UNET:
        del config.model[name]
    config.model.update(
        objective="x0",
        schedule="flow",
        weighting="flow",
        process=dict(times="logit_normal", time_mean=0.8, time_std=0.8),
        net=dict(
            kind="vit",
            patch_size=2,
            width=128,
            depth=6,
            num_heads=4,
            bottleneck=0,
            context_tokens=8,
        ),
    )
    return config

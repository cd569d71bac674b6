"""ADM's unconditional generator at 16 x 16 on scenes; configs/tiny/classifier.py steers it to a class.

python -m dalle2_jax.train --config=configs/adm/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import decoder


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    for name in ("text", "image_drop", "text_drop", "guidance_scale"):
        del config.model[name]
    config.model.update(
        embed_dim=0,
        learned_variance=True,
        weighting="min_snr",
        process=dict(guide_rule="adm"),
        num_steps=50,
        method="ddpm",
    )
    config.num_steps, config.optim.final_fraction = 3000, 0.02
    return config

"""Imagen's base model at 16 x 16 on scenes, which reads the states of configs/imagen/tiny_t5.py.

python -m dalle2_jax.train --config=configs/imagen/tiny.py --workdir=DIR --config.frozen.t5=T5
"""

from dalle2_jax.configs.tiny import common, decoder

STATES = dict(states_width=64, context_length=common.TEXT["context_length"], width=64, pool_heads=4)


def get_config(preset: str = ""):
    """No presets."""
    config = decoder.get_config(preset)
    del config.model["image_drop"], config.model["text"]
    config.model.update(
        embed_dim=0,
        text=dict(STATES),
        text_drop=0.1,
        guidance_scale=3.0,
        weighting="snr:1,0.1,5",
        threshold=99.5,
        net=dict(context_norm="layer"),
    )
    config.num_steps, config.optim.final_fraction = 5500, 0.02
    config.frozen.t5 = ""
    return config

"""The bundled model's upsampler64: the quickstart's, trained for longer.

python -m dalle2_jax.train --config=configs/bundled/upsampler64.py --workdir=DIR
"""

from configs.tiny import upsampler64


def get_config(preset: str = ""):
    """No presets."""
    config = upsampler64.get_config(preset)
    config.checkpoint_every = 500
    config.num_steps = 800
    # As the weights in dalle2_jax/bundled were trained.
    config.model.objective, config.model.num_steps = "v", 6
    config.optim.muon_learning_rate = 0.0
    return config

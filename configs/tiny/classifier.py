"""Classifier of noised 16 x 16 pictures: which colour and shape the one object has; to guide the decoder.

python -m dalle2_jax.train --config=configs/tiny/classifier.py --workdir=DIR
"""

from dalle2_jax.configs.tiny import common

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=1000, batch_size=64, learning_rate=2e-3)
    config.stage = "classifier"
    config.data.classes = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    config.model = dict(
        num_classes=36,
        image_size=16,
        channels=32,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=16,
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02)
    return config

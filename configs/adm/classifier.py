"""ADM's classifiers of noised pictures at 64, 128, 256 and 512 (table 12).

python -m dalle2_jax.train --config=configs/adm/classifier.py:256 --workdir=DIR --config.data.path=PATH

PATH: tar shards with KEY.cls; with --config.data.source=folder a folder of folders by class (ImageNet's).
"""

from dalle2_jax.configs.adm import common

MODELS = {
    "64": dict(image_size=64, channel_mult=(1, 2, 3, 4), num_res_blocks=4, schedule="cosine"),
    "128": dict(image_size=128, channel_mult=(1, 1, 2, 3, 4)),
    "256": dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
    "512": dict(image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4)),
}


def get_config(preset: str = "256"):
    """`preset`: a key of MODELS."""
    preset = preset or "256"
    common.common.check_preset(preset, tuple(MODELS))
    model = dict(
        num_classes=1000,
        channels=128,
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        schedule="linear",
    )
    config = common.get_config("classifier", model | MODELS[preset])
    config.data.random_crop = True
    config.optim.update(learning_rate=3e-4, schedule="linear", weight_decay=0.05)
    config.num_steps, config.batch_size = 300_000, 256
    return config

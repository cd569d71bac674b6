"""ADM's upsamplers, 64 -> 256 and 128 -> 512, class-conditional (table 11).

python -m dalle2_jax.train --config=configs/adm/upsampler.py:256 --workdir=DIR --config.data.path=PATH

PATH: tar shards with KEY.cls; with --config.data.source=folder a folder of folders by class (ImageNet's).
"""

from dalle2_jax.configs.adm import common

MODELS = {
    "256": dict(image_size=256, low_res_size=64, attention_resolutions=(32, 16, 8), num_heads=4),
    "512": dict(image_size=512, low_res_size=128, attention_resolutions=(32, 16)),
}
STEPS = {"256": 500_000, "512": 1_050_000}


def get_config(preset: str = "256"):
    """`preset`: '256' or '512'."""
    preset = preset or "256"
    common.common.check_preset(preset, tuple(MODELS))
    model = dict(
        channels=192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        head_dim=64,
        num_classes=1000,
        dropout=0.0,
        crop_size=MODELS[preset]["image_size"],
        resize="linear",
        schedule="linear",
        learned_variance=True,
        num_steps=250,
        spacing="adm",
        method="ddpm",
    )
    config = common.get_config("upsampler", model | MODELS[preset])
    config.optim.learning_rate = 1e-4
    config.num_steps, config.batch_size = STEPS[preset], 256
    return config

"""ADM's generators at 64, 128, 256 and 512, class-conditional; 256_unconditional has no classes (table 11).

python -m dalle2_jax.train --config=configs/adm/generator.py:256 --workdir=DIR --config.data.path=PATH

PATH: tar shards with KEY.cls; with --config.data.source=folder a folder of folders by class (ImageNet's).
"""

from dalle2_jax.configs.adm import common

MODELS = {
    "64": dict(image_size=64, channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, schedule="cosine"),
    "128": dict(image_size=128, channel_mult=(1, 1, 2, 3, 4), num_heads=4),
    "256": dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
    "256_unconditional": dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), num_classes=0),
    "512": dict(image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4)),
}
# steps, batch, learning rate
TRAINING = {"64": (540_000, 2048, 3e-4), "128": (4_360_000, 256, 1e-4), "512": (1_940_000, 256, 1e-4)}


def get_config(preset: str = "256"):
    """`preset`: a key of MODELS."""
    preset = preset or "256"
    common.common.check_preset(preset, tuple(MODELS))
    model = dict(
        embed_dim=0,
        channels=256,
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        num_classes=1000,
        dropout=0.1 if preset == "64" else 0.0,
        schedule="linear",
        learned_variance=True,
        num_steps=250,
        spacing="adm",
        method="ddpm",
        guidance_scale=1.0,
        process=dict(guide_rule="adm"),
    )
    config = common.get_config("decoder", model | MODELS[preset])
    steps, batch, rate = TRAINING.get(preset, (1_980_000, 256, 1e-4))
    config.optim.learning_rate = rate
    config.num_steps, config.batch_size = steps, batch
    return config

"""Improved DDPM's generators (its section 4 and appendix A).

python -m dalle2_jax.train --config=configs/iddpm/generator.py --workdir=DIR --config.data.path=PATH

PATH: tar shards, with KEY.cls for classes; with --config.data.source=folder a folder of folders by class.
cifar10 reads tfds. imagenet64 (default) has no classes; with model.loss=vlb it is trained on the bound alone.
"""

from dalle2_jax.configs import common

# Convolutions halve and double the side. The network reads t 1000 / T.
NET = dict(resample="conv", norm_groups=32)
MODELS = {
    "imagenet64": dict(image_size=64, channels=128),
    "width64": dict(image_size=64, channels=64),
    "width96": dict(image_size=64, channels=96),
    "width192": dict(image_size=64, channels=192),
    "conditional": dict(image_size=64, channels=192, num_classes=1000),
    "cifar10": dict(image_size=32, channels=128, channel_mult=(1, 2, 2, 2), dropout=0.3),
    "bedroom256": dict(
        image_size=256,
        channels=128,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(16,),
        num_heads=1,
        scale_shift=False,
        schedule="linear",
        num_timesteps=1000,
        net=NET,
    ),
}
# steps, batch, learning rate
TRAINING = {
    "conditional": (250_000, 2048, 3e-4),
    "cifar10": (500_000, 128, 1e-4),
    "bedroom256": (1_200_000, 128, 1e-4),
}


def get_config(preset: str = "imagenet64"):
    """`preset`: a key of MODELS."""
    preset = preset or "imagenet64"
    common.check_preset(preset, tuple(MODELS))
    config = common.get_config()
    config.stage = "decoder"
    config.model = dict(
        embed_dim=0,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        dropout=0.0,
        schedule="cosine",
        num_timesteps=4000,
        learned_variance=True,
        num_steps=4000,
        spacing="adm",
        method="ddpm",
        guidance_scale=1.0,
        remat="products",
        net=dict(NET, time_scale=0.25),
    )
    config.model.update(MODELS[preset])
    if preset in ("conditional", "bedroom256"):  # whose times are not scaled
        config.model.net = NET
    config.model.num_steps = config.model.num_timesteps
    steps, batch, rate = TRAINING.get(preset, (1_500_000, 128, 1e-4))
    config.optim.update(learning_rate=rate, warmup_steps=0)
    config.num_steps, config.batch_size = steps, batch
    if preset == "cifar10":
        config.data.update(source="tfds", path="cifar10", eval_split="test", flip=True)
    return config

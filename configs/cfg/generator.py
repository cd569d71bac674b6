"""Classifier-free guidance's own generators on ImageNet, 64 (default) and 128 (its section 4).

python -m dalle2_jax.train --config=configs/cfg/generator.py --workdir=DIR --config.data.path=PATH

PATH: tar shards with KEY.cls; with --config.data.source=folder a folder of folders by class (ImageNet's).

Its w is guidance_scale - 1 here. The class is dropped for a tenth of the examples; 0.2 is as good.
"""

from dalle2_jax.configs import common

TIMES = 65_536  # log SNR is continuous in the paper
MODELS = {
    "64": dict(
        image_size=64,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        process=dict(fixed_variance=0.3),
    ),
    "128": dict(
        image_size=128,
        channels=256,
        channel_mult=(1, 1, 2, 3, 4),
        num_heads=4,
        process=dict(fixed_variance=0.2),
    ),
}
STEPS = {"64": 400_000, "128": 2_700_000}


def get_config(preset: str = "64"):
    """`preset`: '64' or '128'."""
    preset = preset or "64"
    common.check_preset(preset, tuple(MODELS))
    config = common.get_config()
    config.stage = "decoder"
    model = dict(
        embed_dim=0,
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        num_classes=1000,
        label_drop=0.1,
        dropout=0.1 if preset == "64" else 0.0,
        schedule="logsnr",
        num_timesteps=TIMES,
        learned_variance=False,
        num_steps=256,
        method="ddpm",
        guidance_scale=1.1,
        remat="products",
        net=dict(norm_groups=32, time_scale=1000 / TIMES),
    )
    config.model = model | MODELS[preset]
    config.optim.update(learning_rate=3e-4 if preset == "64" else 1e-4)
    config.num_steps, config.batch_size = STEPS[preset], 2048 if preset == "64" else 256
    return config

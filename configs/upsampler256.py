"""The first upsampler of the paper: 64 -> 256, 700M parameters (Table 3, fifth column).

    python -m dalle2_jax.train --config=configs/upsampler256.py --workdir=DIR --config.data.path=SHARDS

1M steps of 1024 crops of 64 x 64, the small picture blurred (kernel 3, sigma 0.6), sampled with 27 DDIM
steps (GLIDE's list). `:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "upsampler"
    config.model = dict(
        image_size=256,
        low_res_size=64,
        crop_size=64,
        channels=320,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        dropout=0.1,
        schedule="cosine",
        num_steps=27,
        spacing="fast27",
        method="ddim",
        remat="products",
        dtype="bfloat16",
    )
    config.data.low_res_blur = 1.0
    config.optim.update(learning_rate=1.2e-4, beta2=0.999, eps=1e-8, weight_decay=0.0)
    config.batch_size = 1024
    config.num_steps = 1_000_000
    config.ema_decay = 0.9999
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                image_size=64,
                low_res_size=16,
                crop_size=16,
                channels=16,
                channel_mult=(1, 2),
                num_res_blocks=1,
                num_steps=4,
                spacing="uniform",
            ),
        )
    return config

"""The second upsampler of the paper: 256 -> 1024, 300M parameters (Table 3, sixth column).

    python -m dalle2_jax.train --config=configs/upsampler1024.py --workdir=DIR --config.data.path=SHARDS

1M steps of 512 crops of 256 x 256 beside small pictures degraded by BSR, a linear noise schedule, sampled
with 15 DDIM steps. `:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "upsampler"
    config.model = dict(
        image_size=1024,
        low_res_size=256,
        crop_size=256,
        channels=192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        dropout=0.0,
        schedule="linear",
        num_steps=15,
        spacing="uniform",
        method="ddim",
        remat="products",
        dtype="bfloat16",
    )
    config.data.low_res_bsr = "full"
    config.optim.update(learning_rate=1.0e-4, beta2=0.999, eps=1e-8, weight_decay=0.0)
    config.batch_size = 512
    config.num_steps = 1_000_000
    config.ema_decay = 0.9999
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                image_size=256,
                low_res_size=64,
                crop_size=64,
                channels=16,
                channel_mult=(1, 2),
                num_res_blocks=1,
                num_steps=3,
            ),
            side=256,
        )
    return config

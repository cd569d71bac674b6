"""The upsampler 256 -> 1024 on patches of 16 pixels, 300M parameters, for windows of 256 pixels.

    python -m dalle2_jax.train --config=configs/modern/upsampler1024.py --workdir=DIR
    --config.data.path=SHARDS

Rotary positions let it run on any window. It draws in windows of the side that it was trained on. The small
picture is degraded by BSR, as in the paper. `:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs.modern import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.common.check_preset(preset, ("debug",))
    config = common.get_config(
        "upsampler",
        512,
        dict(
            image_size=1024,
            low_res_size=256,
            crop_size=256,
            tile=256,
            num_steps=15,
            net=dict(
                kind="vit",
                patch_size=16,
                width=1024,
                depth=16,
                num_heads=8,
                mlp_width=2816,
                bottleneck=256,
            ),
        ),
    )
    config.data.low_res_bsr = "full"
    if preset == "debug":
        small = dict(image_size=256, low_res_size=64, crop_size=64, tile=64, num_steps=3)
        common.common.debug(config, small | dict(net=common.DEBUG), side=256)
    return config

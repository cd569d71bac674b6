"""The upsampler 64 -> 256 on patches of 16 pixels, 700M parameters; it trains on whole pictures.

    python -m dalle2_jax.train --config=configs/modern/upsampler256.py --workdir=DIR
    --config.data.path=SHARDS

The small picture is blurred as in the paper. `:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs.modern import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.common.check_preset(preset, ("debug",))
    config = common.get_config(
        "upsampler",
        1024,
        dict(
            image_size=256,
            low_res_size=64,
            crop_size=256,
            num_steps=25,
            net=dict(
                kind="vit",
                patch_size=16,
                width=1280,
                depth=24,
                num_heads=10,
                mlp_width=3328,
                bottleneck=256,
            ),
        ),
    )
    config.data.low_res_blur = 1.0
    if preset == "debug":
        small = dict(image_size=64, low_res_size=16, crop_size=32, num_steps=4, net=common.DEBUG)
        common.common.debug(config, small)
    return config

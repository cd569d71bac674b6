"""A decoder at 64 x 64 on patches of 4 pixels, 3.5B parameters with the paper's text transformer.

    python -m dalle2_jax.train --config=configs/modern/decoder64.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

Table 3's text, batch and dropping rates. `--config.model.net.scan_blocks=True` and
`--config.model.text.scan_blocks=True` compile one block in the place of all. `:debug` is the same code in
small, for a laptop.
"""

from dalle2_jax.configs.modern import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.common.check_preset(preset, ("debug",))
    config = common.get_config(
        "decoder",
        2048,
        dict(
            image_size=64,
            embed_dim=1024,
            text=dict(
                vocab_size=49408, context_length=256, width=2048, depth=24, num_heads=32, scan_blocks=False
            ),
            image_drop=0.1,
            text_drop=0.5,
            num_steps=50,
            guidance_scale=3.0,
            net=dict(
                kind="vit",
                patch_size=4,
                width=2048,
                depth=28,
                num_heads=16,
                mlp_width=5632,  # 8 / 3 of the width, in whole tiles of 256
                bottleneck=0,  # a patch has 48 entries
                scan_blocks=False,
            ),
        ),
    )
    config.tokenizer.context_length = 256
    if preset == "debug":
        text = dict(vocab_size=512, context_length=32, width=32, depth=1, num_heads=2)
        common.common.debug(
            config, dict(image_size=16, embed_dim=32, text=text, num_steps=4, net=common.DEBUG)
        )
    return config

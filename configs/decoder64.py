"""The decoder of the paper: 64 x 64, 3.5B parameters (Table 3, fourth column).

    python -m dalle2_jax.train --config=configs/decoder64.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

800K steps of 2048 pictures. The paper gives no learning-rate schedule: a warm-up of 10K steps and a constant
rate are ours. `:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "decoder"
    config.model = dict(
        image_size=64,
        embed_dim=1024,
        channels=512,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        dropout=0.1,
        text=dict(vocab_size=49408, context_length=256, width=2048, depth=24, num_heads=32),
        image_drop=0.1,
        text_drop=0.5,
        schedule="cosine",
        learned_variance=True,
        num_steps=250,
        method="ddpm",
        remat="products",
        dtype="bfloat16",
    )
    config.tokenizer.context_length = 256
    config.optim.update(learning_rate=1.2e-4, beta2=0.999, eps=1e-8, weight_decay=0.0)
    config.batch_size = 2048
    config.num_steps = 800_000
    config.ema_decay = 0.9999
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                image_size=16,
                embed_dim=32,
                channels=16,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(8,),
                head_dim=16,
                text=dict(vocab_size=512, context_length=32, width=32, depth=1, num_heads=2),
                num_steps=4,
            ),
        )
    return config

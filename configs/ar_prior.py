"""The autoregressive prior of the paper: 24 x 2048 text encoder, 24 x 1664 decoder of 319 codes (Table 3).

    python -m dalle2_jax.train --config=configs/ar_prior.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

1M steps of 4096 pairs. These sizes have 2.0B parameters where the table says 1B. `:debug` is the same code in
small, for a laptop.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "ar_prior"
    config.model = dict(
        embed_dim=1024,
        text=dict(vocab_size=49408, context_length=256, width=2048, depth=24, num_heads=32),
        latent=dict(width=1664, depth=24, num_heads=26),
        num_components=319,
        num_buckets=1024,
        text_drop=0.1,
        dot_quantile=0.5,
        remat="products",
        dtype="bfloat16",
    )
    config.tokenizer.context_length = 256
    config.optim.update(learning_rate=1.6e-4, beta2=0.91, eps=1e-10, weight_decay=4e-2)
    config.batch_size = 4096
    config.num_steps = 1_000_000
    config.ema_decay = 0.999
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                embed_dim=32,
                text=dict(vocab_size=512, context_length=32, width=32, depth=1, num_heads=2),
                latent=dict(width=32, depth=1, num_heads=2),
                num_components=8,
                num_buckets=16,
                num_dot_buckets=8,
                fit_rows=16,
            ),
        )
    return config

"""The diffusion prior of the paper: 24 x 2048 causal transformer, 1B parameters (Table 3, third column).

    python -m dalle2_jax.train --config=configs/prior.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

600K steps of 4096 pairs, sampled with 64 strided steps, of two candidates the one closer to the text kept.
`:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "prior"
    config.model = dict(
        embed_dim=1024,
        text=dict(vocab_size=49408, context_length=256, width=2048, depth=24, num_heads=32),
        text_drop=0.1,
        schedule="cosine",
        num_steps=64,
        method="analytic",
        num_candidates=2,
        guidance_scale=1.0,
        remat="products",
        dtype="bfloat16",
    )
    config.tokenizer.context_length = 256
    config.optim.update(learning_rate=1.1e-4, beta2=0.96, eps=1e-6, weight_decay=6e-2)
    config.batch_size = 4096
    config.num_steps = 600_000
    config.ema_decay = 0.9999
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                embed_dim=32,
                text=dict(vocab_size=512, context_length=32, width=32, depth=1, num_heads=2),
                num_steps=4,
            ),
        )
    return config

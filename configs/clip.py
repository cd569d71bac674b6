"""The CLIP of the paper: ViT-H/16 at 256 x 256 and a 24 x 1024 text transformer (section 3 and appendix C).

    python -m dalle2_jax.train --config=configs/clip.py --workdir=DIR --config.data.path=SHARDS

The paper draws pairs from two datasets with equal probability, those of CLIP and of DALL-E:

    python -m dalle2_jax.train --config=configs/clip.py --workdir=DIR
    --config.data.sources="({'path': 'SHARDS_A', 'weight': 1}, {'path': 'SHARDS_B', 'weight': 1})"

Learning rate 3e-4, SAM with rho 0.1 by replicas of 64 pairs; what the paper does not restate is CLIP's: batch
32768, weight decay 0.2 off gains and biases, warm-up 2000, cosine decay. `:debug` is the same code in small,
for a laptop.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.check_preset(preset, ("debug",))
    config = common.get_config()
    config.stage = "clip"
    config.model = dict(
        embed_dim=1024,
        image_size=256,
        vision=dict(kind="vit", patch_size=16, width=1280, depth=32, num_heads=16),
        text=dict(vocab_size=49408, context_length=77, width=1024, depth=24, num_heads=16),
        sam_rho=0.1,
        sam_batch_size=64,
        remat="products",
        dtype="bfloat16",
    )
    config.optim.update(
        learning_rate=3e-4, beta2=0.98, eps=1e-6, weight_decay=0.2, warmup_steps=2_000, schedule="cosine"
    )
    config.batch_size = 32_768
    config.num_steps = 390_000  # 32 epochs of CLIP's 400M pairs
    config.ema_decay = 0.999
    config.mesh.update(data=1, fsdp=-1)
    if preset == "debug":
        common.debug(
            config,
            dict(
                embed_dim=32,
                image_size=32,
                sam_batch_size=4,
                vision=dict(kind="vit", patch_size=8, width=32, depth=1, num_heads=2),
                text=dict(vocab_size=512, context_length=32, width=32, depth=1, num_heads=2),
            ),
        )
    return config

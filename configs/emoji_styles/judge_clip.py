"""CLIP that judges drawings: trained on the real pictures alone, with a network and seed of its own.

No stage of the cascade reads it. It compares captions of one style, so most of what it learns is the concept.

python -m dalle2_jax.train --config=configs/emoji_styles/judge_clip.py --workdir=DIR \
    --config.data.path=SHARDS
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """No presets."""
    common.check_preset(preset, ())
    config = common.get_config()
    config.stage = "clip"
    config.data.update(split="train", eval_split="val")
    config.tokenizer.update(vocab_size=2048, context_length=32)
    config.model = dict(
        embed_dim=128,
        image_size=64,
        vision=dict(kind="resnet", width=32, depths=(1, 1, 1), num_heads=4),
        text=dict(vocab_size=2048, context_length=32, width=128, depth=3, num_heads=4),
    )
    config.optim.update(
        learning_rate=1e-3,
        schedule="cosine",
        final_fraction=0.02,
        warmup_steps=200,
        beta2=0.98,
        weight_decay=0.2,
    )
    config.num_steps, config.batch_size = 1500, 192
    config.ema_decay = 0.995
    config.seed = 2702
    config.log_every, config.eval_every, config.eval_batches = 50, 250, 1
    config.checkpoint_every, config.keep_checkpoints = 100, 2
    return config

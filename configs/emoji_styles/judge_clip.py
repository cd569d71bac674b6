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
    config.tokenizer.update(vocab_size=2048, context_length=24)
    config.model = dict(
        embed_dim=128,
        image_size=48,
        vision=dict(kind="resnet", width=24, depths=(1, 1, 1), num_heads=4),
        text=dict(vocab_size=2048, context_length=24, width=96, depth=2, num_heads=3),
    )
    config.optim.update(
        learning_rate=1e-3,
        schedule="cosine",
        final_fraction=0.02,
        warmup_steps=50,
        beta2=0.98,
        weight_decay=0.1,
        muon_learning_rate=0.02,
    )
    config.num_steps, config.batch_size = 600, 128
    config.ema_decay = 0.99
    config.seed = 2702
    config.log_every, config.eval_every, config.eval_batches = 50, 300, 1
    config.checkpoint_every, config.keep_checkpoints = 50, 2
    return config

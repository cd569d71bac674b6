"""Classifier of style that judges drawings: trained on the real pictures alone, at 48 x 48.

It guides nothing, so its pictures are not noised. Mirroring changes no style.

python -m dalle2_jax.train --config=configs/emoji_styles/judge_style.py --workdir=DIR \
    --config.data.path=SHARDS
"""

from dalle2_jax.configs import common

STYLES = ("3D", "flat", "noto", "twemoji", "outline", "sketch")  # the words of the captions


def get_config(preset: str = ""):
    """No presets."""
    common.check_preset(preset, ())
    config = common.get_config()
    config.stage = "classifier"
    config.data.update(split="train", eval_split="val", flip=True, classes=STYLES)
    config.model = dict(
        num_classes=len(STYLES),
        image_size=48,
        channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(12,),
        head_dim=16,
        dropout=0.1,
        schedule=None,
    )
    config.optim.update(
        learning_rate=2e-3,
        schedule="cosine",
        final_fraction=0.02,
        warmup_steps=50,
        beta2=0.99,
        weight_decay=0.05,
        muon_learning_rate=0.02,
    )
    config.num_steps, config.batch_size = 500, 64
    config.ema_decay = 0.99
    config.seed = 2701
    config.log_every, config.eval_every, config.eval_batches = 50, 250, 3
    config.checkpoint_every, config.keep_checkpoints = 50, 2
    return config

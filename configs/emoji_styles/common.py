"""Common settings of the cascade on emoji in styles: 32 -> 128, captions in English and Chinese, tar shards.

The shards are those that `shards.py --styles=3d,flat,noto,twemoji` writes; give their folder with
--config.data.path. No picture is mirrored: arrows, clocks and letters would be wrong.
"""

from dalle2_jax.configs import common

EMBED_DIM = 128
TEXT = dict(vocab_size=2048, context_length=32, width=128, depth=3, num_heads=4)


def get_config(num_steps: int, batch_size: int, learning_rate: float):
    """A recipe on the shards; stage and model are missing."""
    config = common.get_config()
    config.data.update(source="tar", split="train", eval_split="val", language="any", flip=False)
    config.tokenizer.update(vocab_size=TEXT["vocab_size"], context_length=TEXT["context_length"])
    config.optim.update(
        learning_rate=learning_rate,
        schedule="cosine",
        final_fraction=0.02,
        warmup_steps=200,
        weight_decay=0.01,
    )
    config.num_steps, config.batch_size = num_steps, batch_size
    config.ema_decay = 0.998
    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 2
    config.sample_every = 1000
    config.checkpoint_every = 250
    config.keep_checkpoints = 2
    return config

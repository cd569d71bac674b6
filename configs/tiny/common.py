"""Common settings of the quickstart's recipes: the paper's cascade at 16 -> 64 -> 256 on scenes, for two CPU
cores."""

from dalle2_jax.configs import common

EMBED_DIM = 64
TEXT = dict(vocab_size=512, context_length=32, width=64, depth=2, num_heads=4)


def get_config(num_steps: int, batch_size: int, learning_rate: float):
    """A recipe on the scenes of the quickstart; stage and model are missing."""
    config = common.get_config()
    config.data.update(source="scenes", path="quickstart_64")
    config.tokenizer.update(vocab_size=TEXT["vocab_size"], context_length=TEXT["context_length"])
    config.optim.update(learning_rate=learning_rate, schedule="cosine", final_fraction=0.02, warmup_steps=100)
    config.num_steps, config.batch_size = num_steps, batch_size
    config.ema_decay = 0.995
    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 4
    config.sample_every = 1000
    config.checkpoint_every = 250
    config.keep_checkpoints = 2
    return config

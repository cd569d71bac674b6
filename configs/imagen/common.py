"""What Imagen's recipes share: the states of T5 v1.1 XXL, dropped for a tenth of the captions."""

from dalle2_jax.configs import common

STATES = dict(states_width=4096, context_length=128, pool_heads=64)


def get_config(stage: str, model: dict):
    """A recipe of a stage; 2.5M steps of 2048 pictures at 1e-4 after 10K steps of warm-up (appendix F)."""
    config = common.get_config()
    config.stage = stage
    config.model = dict(
        text_drop=0.1,
        threshold=99.5,
        schedule="cosine",
        learned_variance=False,
        method="ddpm",
        remat="products",
        dtype="bfloat16",
    )
    config.model.update(model)
    config.tokenizer.context_length = STATES["context_length"]
    config.optim.update(learning_rate=1e-4, schedule="cosine", eps=1e-8, weight_decay=0.0)
    config.batch_size, config.num_steps = 2048, 2_500_000
    config.mesh.update(data=1, fsdp=-1)
    return config
